"""infuse::attention against float64, its registration, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import infuse
from infuse.ops import problems
from infuse.ops.attention import attention_fwd_ref, expand_kv
from tests.ops.test_norms import assert_same_layouts
from tests.tolerances import assert_close_to_fp64, error

OPS = torch.ops.infuse
MASKS = ("none", "causal", "bool", "additive", "per head")


def attention_inputs(problem: problems.Attention, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    p = problem
    shapes = [
        (p.batch, p.heads, p.q_len, p.head_dim),
        (p.batch, p.kv_heads, p.kv_len, p.head_dim),
        (p.batch, p.kv_heads, p.kv_len, p.v_head_dim),
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def mask_of(kind: str, p: problems.Attention, dtype: torch.dtype) -> Tensor | None:
    if kind == "bool":
        mask = torch.rand(p.batch, 1, p.q_len, p.kv_len) > 0.3
        mask[..., 0] = True
        return mask
    if kind == "additive":
        return torch.randn(p.q_len, p.kv_len, dtype=dtype)
    if kind == "per head":
        return torch.randn(p.heads, 1, p.kv_len, dtype=dtype)
    return None


def hand_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """As models spell it; in float64 the reference."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("problem", problems.ATTENTIONS.values(), ids=problems.ATTENTIONS)
def test_attention_is_as_near_to_float64_as_eager(problem: Any, kind: str, dtype: torch.dtype) -> None:
    q, k, v = attention_inputs(problem, dtype, grad=True)
    mask, is_causal = mask_of(kind, problem, dtype), kind == "causal"
    dout = torch.randn(problem.batch, problem.heads, problem.q_len, problem.v_head_dim, dtype=dtype)

    def run(function: Any, tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        out = function(*tensors, mask, 0.3, is_causal)
        return [out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))]

    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    double_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    reference = run(hand_written, doubles, double_mask)
    eager = run(hand_written, [q, k, v], mask)
    for form in (OPS.attention, OPS.attention.inline, OPS.attention.expanded):
        got = run(form, [q, k, v], mask)
        for mine, theirs, exact in zip(got, eager, reference):
            assert_close_to_fp64(mine, theirs, exact)


def test_gradients_are_right_in_float64_for_a_mask_too() -> None:
    q, k, v = attention_inputs(problems.Attention(1, 4, 2, 2, 3, 2, 3), torch.float64, grad=True)
    mask = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: OPS.attention(*a, 0.4), (q, k, v, mask))
    assert torch.autograd.gradcheck(lambda *a: OPS.attention(*a, None, 0.4, True), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *a: OPS.attention(*a, 0.4), (q, k, v, mask), fast_mode=True)


def test_a_row_that_attends_to_nothing_gives_zeros_and_no_gradient() -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32, grad=True)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[3] = False
    out, lse = attention_fwd_ref(q, k, v, mask, 0.3, False)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == float("-inf")).all()
    dq, dk, dv = torch.autograd.grad(OPS.attention(q, k, v, mask, 0.3).sum(), (q, k, v))
    assert (dq[:, :, 3] == 0).all() and dk.isfinite().all() and dv.isfinite().all()


def test_a_mask_of_the_smallest_number_is_no_mask_of_infinity() -> None:
    """Hugging Face masks with finfo.min: a row masked whole averages v there, and must do so here."""
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32)
    mask = torch.full((8, 8), torch.finfo(torch.float32).min)
    for call in (OPS.attention.default, OPS.attention.inline):
        torch.testing.assert_close(call(q, k, v, mask, 0.3), v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_mask_of_few_dimensions_or_another_dtype_is_taken(dtype: torch.dtype) -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32)
    mask = torch.tensor([True] * 6 + [False] * 2) if dtype == torch.bool else torch.randn(8).to(dtype)
    expected = hand_written(q, k, v, mask, 0.3, False)
    for call in (OPS.attention.default, OPS.attention.inline):
        torch.testing.assert_close(call(q, k, v, mask, 0.3), expected)


def test_heads_are_grouped_as_repeat_interleave_does() -> None:
    kv = torch.randn(2, 3, 4, 5)
    assert torch.equal(expand_kv(kv, 6), kv.repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(dtype: torch.dtype) -> None:
    problem = problems.ATTENTIONS["grouped"]
    q, k, v = attention_inputs(problem, dtype, grad=True)
    opcheck(OPS.attention.default, (q, k, v, None, 0.3, True))
    opcheck(OPS.attention.default, (q, k, v, mask_of("bool", problem, dtype), 0.3))
    opcheck(OPS.attention.default, (q, k, v, torch.randn(5, 7, dtype=dtype, requires_grad=True), 0.3))


def test_results_have_the_strides_of_their_fakes() -> None:
    problem = problems.ATTENTIONS["grouped"]
    q, k, v = (
        tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in attention_inputs(problem, torch.float32)
    )
    mask = mask_of("per head", problem, torch.float32)
    out, lse = OPS.attention_fwd(q, k, v, mask, 0.3, False)
    dout = torch.randn_like(out).contiguous()
    assert_same_layouts(
        [
            (OPS.attention, (q, k, v, mask, 0.3)),
            (OPS.attention, (*(tensor.contiguous() for tensor in (q, k, v)), None, 0.3, True)),
            (OPS.attention_fwd, (q, k, v, mask, 0.3, False)),
            (OPS.attention_bwd, (dout, q, k, v, out, lse, mask, 0.3, False, True)),
            (OPS.attention_bwd, (dout, q, k, v, out, lse, mask, 0.3, False, False)),
        ]
    )


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (100 * tensor for tensor in attention_inputs(problems.ATTENTIONS["square"], torch.float32))
    reference = hand_written(q.double(), k.double(), v.double(), None, 1.0, False)
    assert error(attention_fwd_ref(q, k, v, None, 1.0, False)[0], reference) < 1e-3


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, "q: got 3 dimensions"),
        (lambda q, k, v: (q, k[:, :, :, :4], v), ValueError, "k: head_dim: got 4, expected 8"),
        (lambda q, k, v: (q, k, v[:, :1]), ValueError, "v: heads: got 1, expected 2"),
        (lambda q, k, v: (q[:, :5], k, v), ValueError, "q: heads modulo K/V heads: got 1, expected 0"),
        (lambda q, k, v: (q, k.bfloat16(), v), TypeError, "expected one dtype for all"),
        (lambda q, k, v: (q.int(), k, v), TypeError, "q: got dtype torch.int32"),
        (lambda q, k, v: (q, k, v, torch.ones(5, 7, dtype=torch.int32)), TypeError, "mask: got dtype torch.int32"),
    ],
)
def test_wrong_arguments_name_what_was_got_and_expected(change: Any, kind: Any, words: str) -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["grouped"], torch.float32)
    with pytest.raises(kind) as raised:
        infuse.attention(*change(q, k, v))
    assert words in str(raised.value)


def test_a_mask_beside_is_causal_is_refused() -> None:
    q, k, v = attention_inputs(problems.ATTENTIONS["square"], torch.float32)
    with pytest.raises(ValueError, match="expected one of them"):
        infuse.attention(q, k, v, torch.ones(8, 8, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("overload", ["default", "inline"])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9, float("-inf")])
def test_a_row_masked_by_low_numbers_has_the_gradient_of_the_written_out_softmax(overload: str, lowest: float) -> None:
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    if lowest != float("-inf"):
        allowed[0, :, :2] = False  # as left padding does
    mask = torch.where(allowed, 0.0, lowest)
    dout = torch.randn(2, 2, 5, 8)
    expected_out = torch.softmax(q @ k.mT * 0.3 + mask, -1) @ v
    expected = torch.autograd.grad(expected_out, (q, k, v), dout)
    out = getattr(torch.ops.infuse.attention, overload)(q, k, v, mask, 0.3, masked_rows="softmax")
    torch.testing.assert_close(out, expected_out)
    for got, wanted in zip(torch.autograd.grad(out, (q, k, v), dout), expected):
        torch.testing.assert_close(got, wanted)
