"""RMSNorm or LayerNorm of each head of q or k, and its rotary embedding.

    y = rope(norm(x), cos, sin)

Shapes: x, y [..., D], the heads' dimensions in any order; y is dense, in the memory order of x; cos, sin as
in infuse.ops.rope; weight, bias [D] or None.
centered: LayerNorm, which subtracts the mean, instead of RMSNorm. A bias goes with it, eps_as_minimum with RMSNorm.
Both parts round as infuse.ops.rms_norm, layer_norm and rope do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infuse.ops import library, rope_kernels
from infuse.ops import qk_norm_rope_bwd as _bwd  # noqa: F401  registers the operator
from infuse.ops.composites import register_composite
from infuse.ops.layer_norm import layer_norm_ref
from infuse.ops.registration import differentiate, implement
from infuse.ops.rms_norm import rms_norm_ref
from infuse.ops.rope import FLAGS as ROPE_FLAGS
from infuse.ops.rope import rope_ref

ARGUMENTS = (
    "Tensor x, Tensor cos, Tensor sin, Tensor? weight, Tensor? bias, float eps, bool centered, float weight_offset, "
    f"bool cast_before_weight, bool eps_as_minimum, {ROPE_FLAGS.replace('=False', '')}"
)


def _formula(
    rms_norm: Callable[..., Tensor], layer_norm: Callable[..., Tensor], rope: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The formula out of its parts."""

    def qk_norm_rope(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        weight_offset: float,
        cast_before_weight: bool,
        eps_as_minimum: bool,
        *flags: bool,
    ) -> Tensor:
        if centered and eps_as_minimum:
            raise ValueError("infuse::qk_norm_rope: eps_as_minimum: got True, expected False with centered")
        if bias is not None and not centered:
            raise ValueError("infuse::qk_norm_rope: bias: got a tensor, expected None without centered")
        if centered:
            y = layer_norm(x, weight, bias, eps, weight_offset, cast_before_weight)
        else:
            y = rms_norm(x, weight, eps, weight_offset, cast_before_weight, eps_as_minimum)
        return rope(y, cos, sin, *flags)

    return qk_norm_rope


def can_run(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: object,
    centered: bool,
    weight_offset: object,
    cast_before_weight: bool,
    eps_as_minimum: bool,
    *flags: bool,
) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can. Reads shapes, strides and dtypes only."""
    if centered or bias is not None:
        return "no kernel for layer norm and rotation"
    if eps_as_minimum:
        return "no kernel for eps as a minimum"
    if not isinstance(eps, float) or not isinstance(weight_offset, (int, float)):
        return "eps is symbolic"
    return rope_kernels.can_rotate(x, cos, sin) or rope_kernels.can_normalise(x, weight, cast_before_weight)


def _cuda(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    _, eps, _, weight_offset, cast_before_weight, _, *flags = rest
    if library.missing(x.device) or can_run(x, cos, sin, weight, *rest):
        result = qk_norm_rope_ref(x, cos, sin, weight, *rest)
        return torch.empty_like(x, dtype=result.dtype).copy_(result)
    y = torch.empty_like(x)
    norm = (eps, weight_offset, cast_before_weight)
    torch.ops.infuse.rope_out(x, None, cos, sin, weight, None, *norm, *flags, False, -1, y, None)
    return y


class _NormRope(torch.autograd.Function):
    """Of the forms that infuse::qk_norm_rope_bwd knows. x is saved, and nothing that the forward computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, cos, sin, weight)
        ctx.eps, ctx.rest = eps, rest
        return torch.ops.infuse.qk_norm_rope(x, *_arguments(cos, sin, weight, eps, *rest))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, weight = ctx.saved_tensors
        none = [None for _ in ctx.rest]
        if torch.is_grad_enabled():
            inputs = (x, cos, sin, weight, ctx.eps, *ctx.rest)
            return differentiate(lambda x, *args: qk_norm_rope_ref(x, *_arguments(*args)), inputs, (dy,))
        dx, dweight = torch.ops.infuse.qk_norm_rope_bwd(dy, x, cos, sin, weight, ctx.eps, *ctx.rest)
        return dx, None, None, None if weight is None else dweight, None, *none


def _arguments(
    cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast: bool, *flags: bool
) -> tuple[Any, ...]:
    """The operator's arguments behind x."""
    return cos, sin, weight, None, eps, False, weight_offset, cast, False, *flags


def _differentiable(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *rest: Any
) -> Tensor | None:
    """The result, with its gradient an operator; None where there is none of this form."""
    centered, weight_offset, cast_before_weight, eps_as_minimum, *flags = rest
    if bias is not None or centered or eps_as_minimum or cos.requires_grad or sin.requires_grad:
        return None
    apply: Callable[..., Tensor] = _NormRope.apply
    return apply(x, cos, sin, weight, eps, weight_offset, cast_before_weight, *flags)


qk_norm_rope_ref = _formula(rms_norm_ref, layer_norm_ref, rope_ref)
register_composite(
    "qk_norm_rope",
    ARGUMENTS,
    "Tensor",
    formula=qk_norm_rope_ref,
    inline=qk_norm_rope_ref,
    parts=_formula(torch.ops.infuse.rms_norm, torch.ops.infuse.layer_norm, torch.ops.infuse.rope),
    like_x=True,
    differentiable=_differentiable,
)
implement("qk_norm_rope", _cuda, "CUDA")
