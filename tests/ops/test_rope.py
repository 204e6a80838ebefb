"""infuse::rope against float64, its registration, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import infuse
from tests.ops.test_norms import assert_same_layouts, strided
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
# (x, cos): R = D and R < D, tables that broadcast over heads, over the batch, over nothing.
SHAPES = {
    "heads first": ((2, 3, 4, 8), (2, 1, 4, 8)),
    "heads last": ((2, 4, 3, 8), (4, 1, 8)),
    "partial": ((2, 3, 4, 8), (4, 6)),
    "one pair": ((5, 2), (1, 2)),
    "one row": ((6,), (4,)),
    "no rows": ((0, 3, 4), (4,)),
}
FLAGS = list(itertools.product((False, True), repeat=3))


def inputs(shapes: Any, per_pair: bool, dtype: torch.dtype, table: torch.dtype, grad: bool = False) -> list[Tensor]:
    """x, cos and sin; the tables are independent random numbers, no cosines."""
    (x_shape, shape) = shapes
    shape = (*shape[:-1], shape[-1] // 2) if per_pair else shape
    tensors = [torch.randn(x_shape, dtype=dtype), *(torch.randn(shape, dtype=table) for _ in range(2))]
    return [tensor.requires_grad_(grad) for tensor in tensors]


def by_matrices(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, inverse: bool) -> Tensor:
    """Element by element, from the definition."""
    rotary = cos.shape[-1] * (2 if per_pair else 1)
    half = rotary // 2
    y = [x[..., i] for i in range(x.shape[-1])]
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c1, c2 = (pair, pair) if per_pair else (first, second)
        sign = -1 if inverse else 1
        y[first] = x[..., first] * cos[..., c1] - sign * x[..., second] * sin[..., c1]
        y[second] = x[..., second] * cos[..., c2] + sign * x[..., first] * sin[..., c2]
    return torch.stack(y, dim=-1)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients_are_those_of_the_definition(shapes: Any, flags: tuple[bool, ...]) -> None:
    tensors = inputs(shapes, flags[1], torch.float64, torch.float64, grad=True)
    expected = by_matrices(*tensors, *flags)
    dy = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad(expected, tensors, dy)
    for operator in (OPS.rope.default, OPS.rope.inline):
        got = operator(*tensors, *flags)
        torch.testing.assert_close(got, expected)
        for mine, right in zip(torch.autograd.grad(got, tensors, dy), grads):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_near_to_float64_as_eager(
    dtype: torch.dtype, table: torch.dtype, flags: tuple[bool, ...], upcast: bool
) -> None:
    tensors = inputs(SHAPES["partial"], flags[1], dtype, table, grad=True)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    reference = by_matrices(*doubles, *flags)
    eager = by_matrices(*tensors, *flags).to(dtype)
    got = OPS.rope(*tensors, *flags, upcast)
    assert_close_to_fp64(got, eager, reference)
    dy = torch.randn(got.shape).to(dtype)
    exact = torch.autograd.grad(reference, doubles, dy.double())
    theirs = torch.autograd.grad(eager, tensors, dy)
    for mine, other, right in zip(torch.autograd.grad(got, tensors, dy), theirs, exact):
        assert_close_to_fp64(mine, other, right)


def test_upcast_computes_in_float32_and_rounds_once() -> None:
    x, cos, sin = inputs(SHAPES["heads first"], False, torch.bfloat16, torch.bfloat16)
    wide = infuse.rope(x.float(), cos, sin)
    assert torch.equal(infuse.rope(x, cos, sin, upcast=True), wide.bfloat16())
    assert not torch.equal(infuse.rope(x, cos, sin), wide.bfloat16())
    assert torch.equal(infuse.rope(x, cos.float(), sin.float()), wide.bfloat16())


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gradients_are_right_in_float64(flags: tuple[bool, ...]) -> None:
    tensors = inputs(((2, 3, 6), (3, 4)), flags[1], torch.float64, torch.float64, grad=True)
    assert torch.autograd.gradcheck(OPS.rope, (*tensors, *flags))
    assert torch.autograd.gradgradcheck(OPS.rope, (*tensors, *flags), fast_mode=True)


def test_x_is_saved_only_for_gradients_of_the_tables() -> None:
    x, cos, sin = inputs(SHAPES["heads first"], False, torch.float32, torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        infuse.rope(x.requires_grad_(), cos, sin)
        assert [tensor.data_ptr() for tensor in saved] == [cos.data_ptr(), sin.data_ptr()]
        infuse.rope(x, cos.requires_grad_(), sin)
    assert len(saved) == 5
    (dcos,) = torch.autograd.grad(infuse.rope(x.detach(), cos, sin).sum(), cos)
    assert dcos.shape == cos.shape


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(dtype: torch.dtype, flags: tuple[bool, ...]) -> None:
    tensors = inputs(SHAPES["partial"], flags[1], dtype, torch.float32, grad=True)
    opcheck(OPS.rope.default, (*tensors, *flags))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_results_have_the_strides_of_their_fakes(flags: tuple[bool, ...]) -> None:
    width = 2 if flags[1] else 4
    packed = torch.randn(3, 2, 4, 18).transpose(1, 2)[..., 3:9]
    for x in (strided(3, 4, 2, 6), packed, torch.randn(3, 1, 1, 6).expand(3, 4, 2, 6)):
        cos, sin = strided(3, 1, 2, width), torch.randn(1, width)
        calls = [(OPS.rope, (x, cos, sin, *flags)), (OPS.rope_bwd, (x, cos, sin, *flags, False))]
        assert_same_layouts([*calls, (OPS.rope_tables_bwd, (x, packed, cos, sin, *flags, True))])


def test_the_result_is_dense_in_the_order_of_x() -> None:
    x = torch.randn(2, 4, 3, 16).transpose(1, 2)[..., :8]
    y = infuse.rope(x, torch.randn(4, 8), torch.randn(4, 8))
    assert y.stride() == (96, 8, 24, 1)


def test_other_shapes_and_dtypes_are_refused() -> None:
    x = torch.ones(2, 3, 8)
    for cos, sin, per_pair, words in (
        (torch.ones(3, 8), torch.ones(3, 4), False, "sin: size of the last dimension: got 4, expected 8"),
        (torch.ones(3, 3), torch.ones(3, 3), False, "got 3 elements to rotate, expected an even number of at most 8"),
        (torch.ones(3, 8), torch.ones(3, 8), True, "got 16 elements to rotate"),
        (torch.ones(2, 8), torch.ones(3, 8), False, "cos: size of dimension -2: got 2, expected 3"),
        (torch.ones(3, 8), torch.ones(1, 2, 3, 8), False, "sin: got 4 dimensions, expected at most x's 3"),
        (torch.ones(()), torch.ones(()), False, "cos: got a scalar"),
    ):
        with pytest.raises(ValueError, match=words):
            infuse.rope(x, cos, sin, per_pair=per_pair)
    with pytest.raises(TypeError, match=r"cos: got dtype torch.complex64"):
        infuse.rope(x, torch.ones(3, 8, dtype=torch.complex64), torch.ones(3, 8))
