"""infuse::layer_norm and infuse::add_layer_norm against float64, their registration, and what they refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import infuse
from infuse.ops import problems
from tests.ops.test_norms import DTYPES, FLAGS, OPS, assert_same_layouts, strided
from tests.tolerances import assert_close_to_fp64, error

AFFINE = {"affine": (True, True), "weight only": (True, False), "bias only": (False, True), "plain": (False, False)}


def inputs(
    problem: problems.Norm, dtype: torch.dtype, affine: tuple[bool, bool] = (True, True), grad: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x and residual [..., D], weight and bias [D] or None."""
    x, residual = (torch.randn(problem.shape, dtype=dtype, requires_grad=grad) for _ in range(2))
    weight, bias = (
        torch.randn(problem.row_size, dtype=dtype, requires_grad=grad) if wanted else None for wanted in affine
    )
    return x, residual, weight, bias


def hand_written(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> Tensor:
    """As models spell it; in float64 the reference."""
    h = x if x.dtype == torch.float64 else x.float()
    d = h - h.mean(-1, keepdim=True)
    n = d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        n, h = n.to(x.dtype), x
    if weight is not None:
        n = n * (weight if cast_first else weight.to(h.dtype) + offset)
    return (n if bias is None else n + bias).to(x.dtype)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("problem", problems.NORMS.values(), ids=problems.NORMS)
def test_layer_norm_is_as_near_to_float64_as_eager(
    problem: problems.Norm, affine: tuple[bool, bool], flags: Any, dtype: torch.dtype
) -> None:
    x, residual, weight, bias = inputs(problem, dtype, affine)
    got = infuse.layer_norm(x, weight, bias, 1e-5, weight_offset=flags[0], cast_before_weight=flags[1])
    wide = double(x, weight, bias)
    assert_close_to_fp64(got, hand_written(x, weight, bias, 1e-5, *flags), hand_written(*wide, 1e-5, *flags))  # type: ignore[arg-type]
    y, total = infuse.add_layer_norm(x, residual, weight, bias, weight_offset=flags[0], cast_before_weight=flags[1])
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, OPS.layer_norm(total, weight, bias, 1e-5, *flags), rtol=0, atol=0)


@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_is_torchs(affine: tuple[bool, bool], dtype: torch.dtype) -> None:
    x, _, weight, bias = inputs(problems.Norm((3, 5), 32), dtype, affine)
    torch.testing.assert_close(infuse.layer_norm(x, weight, bias), F.layer_norm(x, (32,), weight, bias))


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_layer_norm_holds_far_from_zero(shift: float) -> None:
    x = torch.randn(4, 64) + shift
    exact = F.layer_norm(x.double(), (64,))
    assert error(infuse.layer_norm(x), exact) <= 2 * error(F.layer_norm(x, (64,)), exact)


def test_cast_first_with_float32_weight_or_bias_gives_float32() -> None:
    x, weight, bias = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16), torch.randn(16)
    rounded = F.layer_norm(x.float(), (16,)).bfloat16()
    for w, b in ((weight, bias), (weight, None), (None, bias)):
        got = infuse.layer_norm(x, w, b, cast_before_weight=True)
        assert got.dtype == torch.float32
        expected = rounded.float() if w is None else w * rounded
        torch.testing.assert_close(got, expected if b is None else expected + b, rtol=0, atol=0)


Op = Callable[..., Any]


@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_gradients_are_right_in_float64(flags: tuple[float, bool], affine: tuple[bool, bool]) -> None:
    x, residual, weight, bias = inputs(problems.Norm((3, 2), 5), torch.float64, affine, grad=True)
    assert torch.autograd.gradcheck(lambda *a: OPS.layer_norm(*a, 1e-3, *flags), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: OPS.add_layer_norm(*a, 1e-3, *flags), (x, residual, weight, bias))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_near_to_float64_as_eager(flags: tuple[float, bool], dtype: torch.dtype) -> None:
    x, _, weight, bias = inputs(problems.Norm((6, 7), 64), dtype, grad=True)
    dy = torch.randn(6, 7, 64, dtype=dtype)

    def gradients(function: Op, *given: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*given, 1e-5, *flags), given, dy.to(given[0].dtype))

    got, inlined, eager = (
        gradients(function, x, weight, bias) for function in (OPS.layer_norm, OPS.layer_norm.inline, hand_written)
    )
    for mine, open_form, theirs, exact in zip(got, inlined, eager, gradients(hand_written, *double(x, weight, bias))):
        assert_close_to_fp64(mine, theirs, exact)
        assert_close_to_fp64(open_form, theirs, exact)


def test_gradients_with_vectors_of_other_dtypes() -> None:
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, dtype=torch.float16, requires_grad=True)
    for cast_first in (False, True):
        y = infuse.layer_norm(x, weight, bias, cast_before_weight=cast_first)
        grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
        assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float16]


def test_second_derivatives_are_right() -> None:
    x, residual, weight, bias = inputs(problems.Norm((2, 2), 3), torch.float64, grad=True)
    check = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)
    assert check(lambda *a: OPS.layer_norm(*a, 1e-3), (x, weight, bias))
    assert check(lambda *a: OPS.add_layer_norm(*a, 1e-3), (x, residual, weight, bias))


@pytest.mark.parametrize(("affine", "flags"), list(zip(AFFINE.values(), [*FLAGS.values(), (0.0, False)])))
def test_layer_norms_pass_opcheck(affine: tuple[bool, bool], flags: tuple[float, bool]) -> None:
    x, residual, weight, bias = inputs(problems.Norm((3, 4), 16), torch.bfloat16, affine, grad=True)
    opcheck(OPS.layer_norm.default, (x, weight, bias, 1e-5, *flags))
    opcheck(OPS.add_layer_norm.default, (x, residual, weight, bias, 1e-5, *flags))


def test_layer_norms_return_the_strides_of_their_fakes() -> None:
    x, residual, dy = (strided(3, 4, 16) for _ in range(3))
    weight, bias, mean, rstd = torch.randn(32)[::2], torch.randn(32)[::2], strided(3, 4), strided(3, 4)
    flags = (0.0, False)
    calls = [
        (OPS.layer_norm, (x, weight, bias, 1e-5)),
        (OPS.layer_norm, (x, weight, bias, 1e-5, 0.0, True)),
        (OPS.layer_norm_fwd, (x, weight, None, 1e-5, *flags)),
        (OPS.layer_norm_fwd, (x, None, bias, 1e-5, 0.0, True)),
        (OPS.layer_norm_bwd, (dy, x, weight, bias, mean, rstd, *flags)),
        (OPS.layer_norm_bwd, (dy, x, None, None, mean, rstd, *flags)),
        (OPS.add_layer_norm, (x, residual, weight, bias, 1e-5)),
        (OPS.add_layer_norm_fwd, (x, residual, weight, bias, 1e-5, 0.0, True)),
        (OPS.add_layer_norm_bwd, (dy, residual, x, weight, bias, mean, rstd, *flags)),
    ]
    assert_same_layouts(calls)


def test_inline_is_seen_through_by_autograd() -> None:
    x, residual, weight, bias = inputs(problems.Norm((2,), 8), torch.float32, grad=True)
    assert "LayerNorm" in type(OPS.layer_norm(x, weight, bias, 1e-5).grad_fn).__name__
    assert "NativeLayerNorm" in type(OPS.layer_norm.inline(x, weight, bias, 1e-5).grad_fn).__name__
    expected = OPS.add_layer_norm(x, residual, weight, bias, 1e-5)
    torch.testing.assert_close(OPS.add_layer_norm.inline(x, residual, weight, bias, 1e-5), expected)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((torch.ones(3, 4, dtype=torch.int64), None, None), TypeError, ["layer_norm", "x", "torch.int64"]),
        ((torch.ones(3, 4), torch.ones(5), None), ValueError, ["weight", "got 5", "expected 4"]),
        ((torch.ones(3, 4), None, torch.ones(3, 4)), ValueError, ["bias", "2 dimensions", "[D]"]),
        ((torch.tensor(1.0), None, None), ValueError, ["x", "scalar"]),
    ],
)
def test_wrong_arguments_name_what_was_got_and_expected(arguments: Any, kind: Any, words: list[str]) -> None:
    for call in (infuse.layer_norm, lambda *a: OPS.layer_norm(*a, 1e-6)):
        with pytest.raises(kind) as raised:
            call(*arguments)
        assert all(word in str(raised.value) for word in words), raised.value


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_offset: got 1.0, expected 0"):
        infuse.layer_norm(torch.ones(2, 4), torch.ones(4), weight_offset=1.0, cast_before_weight=True)
    with pytest.raises(ValueError, match=r"residual: size of dimension 0: got 1, expected 3"):
        infuse.add_layer_norm(torch.ones(3, 4), torch.ones(1, 4))
    with pytest.raises(TypeError, match="one dtype"):
        infuse.add_layer_norm(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16))
