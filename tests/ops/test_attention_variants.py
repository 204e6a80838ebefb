"""infuse::attention with softcap, sinks, dropout, and rows that are masked whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import infuse
from infuse.ops import problems
from infuse.ops.attention_formulas import raised
from tests.ops.test_attention import attention_inputs, mask_of
from tests.ops.test_norms import assert_same_layouts
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
GROUPED = problems.ATTENTIONS["grouped"]
LARGE = -1e9


def variant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
) -> Tensor:
    """As models spell it; in float64 the reference."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * 0.3
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, LARGE if masked_rows == "mean" else float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1).to(scores.dtype)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    if masked_rows == "zeros" and mask is not None and mask.dtype == torch.bool:
        weights = torch.where(mask.any(-1, keepdim=True), weights, 0.0)
    return weights @ v


def calls(masked_rows: str) -> list[Any]:
    """Both overloads, inline also where it may round the scores."""
    return [
        lambda q, k, v, m, c, s: OPS.attention(q, k, v, m, 0.3, False, c, s, masked_rows),
        lambda q, k, v, m, c, s: OPS.attention.inline(q, k, v, m, 0.3, False, c, s, masked_rows),
        lambda q, k, v, m, c, s: OPS.attention.inline(q, k, v, m, 0.3, False, c, s, masked_rows, 0.0, True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (0.0, True), (1.5, True)])
def test_softcap_and_sinks_are_as_near_to_float64_as_eager(
    dtype: torch.dtype, kind: str, softcap: float, has_sinks: bool
) -> None:
    tensors = attention_inputs(GROUPED, dtype, grad=True)
    if has_sinks:
        tensors.append(torch.randn(GROUPED.heads, dtype=dtype, requires_grad=True))
    mask = mask_of(kind, GROUPED, dtype)
    dout = torch.randn(GROUPED.batch, GROUPED.heads, GROUPED.q_len, GROUPED.v_head_dim, dtype=dtype)

    def run(function: Any, tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        q, k, v, *rest = tensors
        out = function(q, k, v, mask, softcap, rest[0] if rest else None)
        return [out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))]

    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    reference = run(variant, doubles, mask.double() if kind == "additive" and mask is not None else mask)
    eager = run(variant, tensors, mask)
    for call in calls("zeros"):
        for mine, theirs, exact in zip(run(call, tensors, mask), eager, reference):
            assert_close_to_fp64(mine, theirs, exact)


def masked_in_row(row: int, dtype: torch.dtype) -> Tensor:
    """[8, 8]: everything is masked in one row."""
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[row], mask[:, 5] = False, False
    return mask if dtype == torch.bool else torch.zeros(8, 8, dtype=dtype).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("masked_rows", ["zeros", "nan", "mean"])
def test_rows_masked_whole_give_what_was_asked_for(masked_rows: str, dtype: torch.dtype, training: bool) -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32, grad=training)
    mask = masked_in_row(3, dtype)
    expected = variant(q, k, v, masked_in_row(3, torch.bool), masked_rows=masked_rows)
    for call in calls(masked_rows):
        torch.testing.assert_close(call(q, k, v, mask, 0.0, None), expected, equal_nan=True)
        torch.testing.assert_close(call(q, k, v, mask, 3.0, None)[:, :, 3], expected[:, :, 3], equal_nan=True)


@pytest.mark.parametrize("masked_rows", ["zeros", "mean"])
def test_gradients_of_rows_masked_whole_are_those_of_the_source(masked_rows: str) -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float64, grad=True)
    mask = masked_in_row(3, torch.bool)
    expected = torch.autograd.grad((variant(q, k, v, mask, masked_rows=masked_rows) ** 2).sum(), (q, k, v))
    for call in calls(masked_rows):
        got = torch.autograd.grad((call(q, k, v, mask, 0.0, None) ** 2).sum(), (q, k, v))
        torch.testing.assert_close(got, expected)


def test_a_row_of_sinks_only_gives_zeros() -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32)
    for call in calls("zeros"):
        assert (call(q, k, v, masked_in_row(3, torch.bool), 0.0, torch.randn(4))[:, :, 3] == 0).all()


def test_gradients_are_right_in_float64_twice() -> None:
    q, k, v = attention_inputs(problems.Attention(1, 4, 2, 2, 3, 2, 3), torch.float64, grad=True)
    mask = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(*args: Tensor) -> Tensor:
        return OPS.attention(*args[:4], 0.4, False, 1.3, args[4])

    assert torch.autograd.gradcheck(call, (q, k, v, mask, sinks))
    assert torch.autograd.gradgradcheck(call, (q, k, v, mask, sinks), fast_mode=True)


def test_second_order_gradients_of_rows_masked_whole_are_finite() -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float64, grad=True)
    out = OPS.attention(q, k, v, masked_in_row(3, torch.bool), 0.4)
    first = torch.autograd.grad((out**2).sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum((grad**2).sum() for grad in first), (q, k, v))  # type: ignore[arg-type]
    assert all(grad.isfinite().all() for grad in second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_gets_its_gradient_through_the_decomposition(dtype: torch.dtype) -> None:
    q, k, v = attention_inputs(GROUPED, dtype, grad=True)
    bias = torch.randn(1, GROUPED.heads, GROUPED.q_len, GROUPED.kv_len, dtype=dtype, requires_grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v, bias)]
    (exact,) = torch.autograd.grad((variant(*wide) ** 2).sum(), wide[3:])
    (eager,) = torch.autograd.grad((variant(q, k, v, bias) ** 2).sum(), [bias])
    for masked_rows in ("zeros", "none", "nan"):
        for call in calls(masked_rows):
            (got,) = torch.autograd.grad((call(q, k, v, bias, 0.0, None) ** 2).sum(), [bias])
            assert_close_to_fp64(got, eager, exact)


def test_dropout_of_the_inline_overload_is_torchs() -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32)
    torch.manual_seed(1)
    got = OPS.attention.inline(q, k, v, None, 0.3, False, 0.0, None, "none", 0.5)
    torch.manual_seed(1)
    expected = torch.nn.functional.dropout((q @ k.mT * 0.3).softmax(-1), 0.5) @ v
    torch.testing.assert_close(got, expected)


def test_dropout_keeps_the_mean() -> None:
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 2000, 8)
    out = infuse.attention(q, k, torch.ones(1, 1, 2000, 8), dropout_p=0.5)
    torch.testing.assert_close(out, torch.ones_like(out), atol=0.15, rtol=0)
    assert (out != 1).all()


def test_opcheck_passes() -> None:
    q, k, v = attention_inputs(GROUPED, torch.float32, grad=True)
    sinks = torch.randn(GROUPED.heads, requires_grad=True)
    opcheck(OPS.attention.default, (q, k, v, None, 0.3, True, 1.5, sinks))
    opcheck(OPS.attention.default, (q, k, v, mask_of("bool", GROUPED, q.dtype), 0.3, False, 0.0, None, "mean"))


def test_results_have_the_strides_of_their_fakes() -> None:
    q, k, v = attention_inputs(GROUPED, torch.float32)
    sinks, mask = torch.randn(GROUPED.heads), mask_of("per head", GROUPED, torch.float32)
    out, lse = OPS.attention_fwd(q, k, v, mask, 0.3, False, 1.5, sinks)
    dout = torch.randn_like(out).contiguous()
    assert_same_layouts(
        [
            (OPS.attention, (q, k, v, mask, 0.3, False, 1.5, sinks)),
            (OPS.attention, (q, k, v, mask, 0.3, False, 0.0, None, "nan")),
            (OPS.attention_fwd, (q, k, v, mask, 0.3, False, 1.5, sinks)),
            (OPS.attention_bwd, (dout, q, k, v, out, lse, mask, 0.3, False, True, 1.5, sinks)),
        ]
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"masked_rows": "ones"}, "masked_rows: got 'ones'"),
        ({"sinks": torch.zeros(3)}, "sinks: heads: got 3, expected 4"),
        ({"sinks": torch.zeros(4), "masked_rows": "nan"}, "beside sinks"),
    ],
)
def test_wrong_arguments_name_what_was_got_and_expected(given: dict[str, Any], words: str) -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32)
    with pytest.raises(ValueError, match=words):
        infuse.attention(q, k, v, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_raised_mask_keeps_its_order_and_what_is_masked(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    mask = torch.tensor(
        [float("-inf"), lowest, lowest * 0.75, lowest * 0.51, lowest * 0.25, -1e4, 0.0, 3.0], dtype=dtype
    )
    got = raised(mask)
    assert got.isneginf().tolist() == mask.isneginf().tolist()
    assert (got[1:] * 1.45).isfinite().all() and (got[:-1] < got[1:]).all()
    assert torch.equal(got[4:], mask[4:])
    half = mask.half()
    assert raised(half) is half


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked_rows", ["none", "nan"])
def test_a_row_of_the_lowest_numbers_is_what_the_softmax_makes_of_it(masked_rows: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, 32, 64, device="cuda", dtype=dtype) for _ in range(3))
    mask = torch.randn(2, 1, 32, 32, device="cuda", dtype=dtype)
    mask[..., 20:] = torch.finfo(dtype).min
    mask[:, :, 3] = torch.finfo(dtype).min
    out = OPS.attention(q, k, v, mask, 0.3, False, 0.0, None, masked_rows)
    exact = torch.softmax((q.double() @ k.double().mT * 0.3).to(dtype).double() + mask.double(), -1) @ v.double()
    eager = torch.softmax((q @ k.mT * 0.3).float() + mask.float(), -1).to(dtype) @ v
    exact[:, :, 3] = v.double().mean(2)
    assert_close_to_fp64(out, eager, exact)
