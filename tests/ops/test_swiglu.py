"""infuse::swiglu against float64, its registration, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import infuse
from tests.ops.test_norms import assert_same_layouts, strided
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (0, 4), (2, 3, 33)])
def test_value_and_gradients_are_as_near_to_float64_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    dout = torch.randn(shape, dtype=dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    reference, eager = F.silu(doubles[0]) * doubles[1], F.silu(gate) * up
    got = infuse.swiglu(gate, up)
    assert_close_to_fp64(got, eager, reference)
    exact = torch.autograd.grad(reference, doubles, dout.double())
    theirs = torch.autograd.grad(eager, (gate, up), dout)
    for mine, other, right in zip(torch.autograd.grad(got, (gate, up), dout), theirs, exact):
        assert_close_to_fp64(mine, other, right)


def test_gradients_are_right_in_float64() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(OPS.swiglu, (gate, up))
    assert torch.autograd.gradgradcheck(OPS.swiglu, (gate, up), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(3, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    opcheck(OPS.swiglu.default, (gate, up))


def test_results_have_the_strides_of_their_fakes() -> None:
    gate, up, dout = strided(3, 4, 5), strided(3, 4, 5), strided(3, 4, 5)
    assert_same_layouts([(OPS.swiglu, (gate, up)), (OPS.swiglu_bwd, (dout, gate, up))])


def test_other_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="up: got shape .2,., expected gate's .3, 2."):
        infuse.swiglu(torch.ones(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match="up: size of dimension 1: got 1, expected 2"):
        infuse.swiglu(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(TypeError, match="gate torch.float32, up torch.bfloat16"):
        infuse.swiglu(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="torch.complex64"):
        infuse.swiglu(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))
