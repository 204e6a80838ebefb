"""infuse::swiglu against float64, its registration, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import infuse
from infuse.ops.swiglu import ACTIVATIONS
from tests.ops.test_norms import assert_same_layouts, strided
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "quick_gelu": lambda g: g * torch.sigmoid(1.702 * g),
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "gelu_erf": F.gelu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "relu_squared": lambda g: F.relu(g) ** 2,
    "tanh": torch.tanh,
    "mish": F.mish,
}


def check(gate: Tensor, up: Tensor, formula: Callable[[Tensor, Tensor], Tensor], **flags: object) -> None:
    """Value and gradients of the operator, both overloads, beside those of eager code."""
    dout = torch.randn(gate.shape).to(gate.dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    reference, eager = formula(*doubles), formula(gate, up)
    exact = torch.autograd.grad(reference, doubles, dout.double())
    theirs = torch.autograd.grad(eager, (gate, up), dout)
    for operator in (OPS.swiglu, OPS.swiglu.inline):
        got = operator(gate, up, **flags)
        assert_close_to_fp64(got, eager, reference)
        for mine, other, right in zip(torch.autograd.grad(got, (gate, up), dout), theirs, exact):
            assert_close_to_fp64(mine, other, right)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (0, 4), (2, 3, 33)])
def test_value_and_gradients_are_as_near_to_float64_as_eager(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    gate, up = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    check(gate, up, lambda g, u: FORMULAS[activation](g) * u, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limit_and_offset(dtype: torch.dtype, activation: str) -> None:
    gate, up = (torch.randn(4, 33, dtype=dtype, requires_grad=True) for _ in range(2))

    def formula(g: Tensor, u: Tensor) -> Tensor:
        return FORMULAS[activation](g.clamp(max=0.75)) * (u.clamp(-0.75, 0.75) + 1)

    check(gate, up, formula, activation=activation, limit=0.75, up_offset=1.0)


def test_gpt_oss_gate_with_an_alpha_of_its_own() -> None:
    gate, up = (torch.randn(4, 33, requires_grad=True) for _ in range(2))
    check(gate, up, lambda g, u: g * torch.sigmoid(1.3 * g) * u, activation="quick_gelu", alpha=1.3)
    assert torch.equal(infuse.swiglu(gate, up, "quick_gelu", alpha=1.3), gate * torch.sigmoid(1.3 * gate) * up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_right_in_float64(activation: str) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for flags in ((activation,), (activation, 0.9, 1.3, 0.5)):
        assert torch.autograd.gradcheck(OPS.swiglu, (gate, up, *flags))
        assert torch.autograd.gradgradcheck(OPS.swiglu, (gate, up, *flags), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [(), ("quick_gelu", 7.0, 1.702, 1.0)])
def test_opcheck_passes(dtype: torch.dtype, flags: tuple[object, ...]) -> None:
    gate, up = (torch.randn(3, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    opcheck(OPS.swiglu.default, (gate, up, *flags))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_have_the_strides_of_their_fakes(activation: str) -> None:
    gate, up, dout = strided(3, 4, 5), strided(3, 4, 5), strided(3, 4, 5)
    flags = (activation, 1.0, 1.702, 1.0)
    assert_same_layouts([(OPS.swiglu, (gate, up, *flags)), (OPS.swiglu_bwd, (dout, gate, up, *flags))])


def test_other_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="up: got shape .2,., expected gate's .3, 2."):
        infuse.swiglu(torch.ones(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match="up: size of dimension 1: got 1, expected 2"):
        infuse.swiglu(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(TypeError, match="gate torch.float32, up torch.bfloat16"):
        infuse.swiglu(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="torch.complex64"):
        infuse.swiglu(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="activation: got 'elu', expected one of .*'silu'"):
        infuse.swiglu(torch.ones(2), torch.ones(2), "elu")
