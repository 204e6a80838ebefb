"""The gradients of normalised and rotated heads: what the operators compute, and what is saved for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from infuse.ops import qk_norm_rope_bwd as op
from infuse.ops.qk_norm_rope import qk_norm_rope_ref

OPS = torch.ops.infuse
EPS = 1e-6
Flags = tuple[bool, bool, bool, bool]
PLAIN: Flags = (False, False, False, False)


def inputs(rotary_dim: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """dy, x [2, 3, 5, 16] in the memory order of a projection, cos, sin [5, rotary_dim], weight [16]."""
    torch.manual_seed(0)
    dy, x = (torch.randn(2, 5, 3, 16, dtype=dtype).transpose(1, 2) for _ in range(2))
    cos, sin = torch.randn(5, rotary_dim, dtype=dtype), torch.randn(5, rotary_dim, dtype=dtype)
    return dy, x, cos, sin, torch.rand(16, dtype=dtype) + 0.5


def normalised(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, offset: float, flags: Flags) -> Tensor:
    y: Tensor = OPS.qk_norm_rope(x, cos, sin, weight, None, EPS, False, offset, False, False, *flags)
    return y


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("flags", [*itertools.product((False, True), repeat=4)])
def test_gradients_are_the_formula_s(flags: Flags, offset: float) -> None:
    dy, x, cos, sin, weight = inputs(6 if flags[1] else 12)
    for given in (weight, None):
        wanted = [tensor.requires_grad_() for tensor in (x, given) if tensor is not None]
        y = normalised(x, cos, sin, given, offset, flags)
        formula = qk_norm_rope_ref(x, cos, sin, given, None, EPS, False, offset, False, False, *flags)
        assert type(y.grad_fn).__name__ == "_NormRopeBackward"
        for got, expected in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(formula, wanted, dy)):
            torch.testing.assert_close(got, expected)


def test_gradients_can_be_differentiated_again() -> None:
    _, x, cos, sin, weight = inputs()
    args = (x[:1, :1].detach().requires_grad_(), weight.requires_grad_())
    torch.autograd.gradgradcheck(lambda x, weight: normalised(x, cos, sin, weight, 0.0, PLAIN), args)


def test_other_forms_keep_the_formula_s_gradient() -> None:
    _, x, cos, sin, weight = inputs()
    x.requires_grad_()
    for centered, minimum in ((True, False), (False, True)):
        y = OPS.qk_norm_rope(x, cos, sin, weight, None, EPS, centered, 0.0, False, minimum, *PLAIN)
        assert type(y.grad_fn).__name__ == "_CompositeBackward"
    assert type(normalised(x, cos.requires_grad_(), sin, weight, 0.0, PLAIN).grad_fn).__name__ == "_CompositeBackward"


def test_only_inputs_are_saved() -> None:
    _, x, cos, sin, weight = inputs()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        normalised(x.requires_grad_(), cos, sin, weight, 0.0, PLAIN)
    assert set(saved) == {tensor.data_ptr() for tensor in (x, cos, sin, weight)}


@pytest.mark.parametrize("weighted", [True, False])
def test_operators_are_registered_as_torch_asks(weighted: bool) -> None:
    dy, x, cos, sin, weight = inputs(dtype=torch.float32)
    given = weight if weighted else None
    numbers = (EPS, 0.0, True, *PLAIN)
    torch.library.opcheck(OPS.qk_norm_rope_bwd.default, (dy, x, cos, sin, given, *numbers))
    pair = (dy, x, dy[:, :1].contiguous(), x[:, :1], cos, sin, given, given, *numbers)
    torch.library.opcheck(OPS.qk_norm_rope_pair_bwd.default, pair)
    dx, dweight, other_dx, other_dweight = OPS.qk_norm_rope_pair_bwd(*pair)
    assert dx.stride() == x.stride() and dweight.shape == ((16,) if weighted else (0,))
    for got, expected in zip(
        (dx, dweight, other_dx, other_dweight),
        (
            *op.qk_norm_rope_bwd_ref(dy, x, cos, sin, given, *numbers),
            *op.qk_norm_rope_bwd_ref(dy[:, :1], x[:, :1], cos, sin, given, *numbers),
        ),
    ):
        assert torch.equal(got, expected)


def test_what_the_kernel_does_not_take() -> None:
    dy, x, cos, sin, weight = inputs(dtype=torch.bfloat16)
    assert op.can_run(x, cos, sin, weight, False, dy) == ""
    assert "24 factors of 48" in op.can_run(x.repeat(1, 1, 1, 3), cos[:, :8].repeat(1, 3), sin, None, False)
    assert op.can_run(x.repeat(1, 1, 1, 3), cos[:, :8].repeat(1, 3), sin, None, True) == ""
    assert "1040 elements" in op.can_run(x.repeat(1, 1, 1, 65), cos, sin, None, False)
    assert "factors in torch.float16" in op.can_run(x, cos.half(), sin.half(), weight, False)
    assert "gradient in torch.float32" in op.can_run(x, cos, sin, weight, False, dy.float())
    assert "strides" in op.can_run(x, cos, sin, weight, False, dy.mT.contiguous().mT)
