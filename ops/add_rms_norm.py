"""Residual add and RMSNorm of the sum; both results are needed, the sum by the next residual.

    sum = x + residual               in their dtype
    y   = rms_norm(sum)              rounding and dtypes as in infuse.ops.rms_norm

Shapes: x, residual, sum, y [..., D]; weight [D] or None. x and residual share shape and dtype; results are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks, library, norm_kernels, norm_sharding
from infuse.ops.norm_backward import norm_backward
from infuse.ops.registration import (
    define,
    differentiate,
    implement,
    register,
    register_differentiable,
    register_fake,
)
from infuse.ops.rms_norm import (
    FLAGS,
    check_arguments,
    output_dtype,
    rms_norm_bwd_ref,
    rms_norm_fwd_ref,
    rms_norm_ref,
    statistics_dtype,
)

ARGUMENTS = f"Tensor x, Tensor residual, Tensor? weight, float eps, {FLAGS}"


def _check(
    op: str, x: Tensor, residual: Tensor, weight: Tensor | None, weight_offset: float, cast_before_weight: bool
) -> None:
    check_arguments(op, x, weight, weight_offset, cast_before_weight)
    checks.same_dtype(op, x=x, residual=residual)
    checks.same_shape(op, x=x, residual=residual)


def add_rms_norm_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch. Returns y and the sum."""
    _check("add_rms_norm", x, residual, weight, weight_offset, cast_before_weight)
    total = x + residual
    return rms_norm_ref(total, weight, eps, weight_offset, cast_before_weight, eps_as_minimum), total


def add_rms_norm_fwd_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and rstd [...]."""
    _check("add_rms_norm_fwd", x, residual, weight, weight_offset, cast_before_weight)
    total = (x + residual).contiguous()
    y, rstd = rms_norm_fwd_ref(total, weight, eps, weight_offset, cast_before_weight, eps_as_minimum)
    return y, total, rstd


def add_rms_norm_bwd_ref(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is that of residual too, and dweight; dsum is what reaches the sum directly."""
    checks.same_shape("add_rms_norm_bwd", total=total, dsum=dsum)
    dx, dweight = rms_norm_bwd_ref(dy, total, weight, rstd, weight_offset, cast_before_weight, minimum)
    return (dx + dsum).contiguous(), dweight


def add_rms_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, residual, weight, weight_offset, cast_before_weight)
    return x.new_empty(x.shape, dtype=output_dtype(x, weight, cast_before_weight)), x.new_empty(x.shape)


def add_rms_norm_fwd_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total = add_rms_norm_fake(x, residual, weight, eps, weight_offset, cast_before_weight)
    return y, total, x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


def add_rms_norm_bwd_fake(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor]:
    checks.same_shape("add_rms_norm_bwd", total=total, dsum=dsum)
    return total.new_empty(total.shape), total.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _norm_and_sum(total: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # view_as: an input cannot be differentiated as an output of itself
    return rms_norm_ref(total, *arguments), total.view_as(total)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        weight_offset: float,
        cast_before_weight: bool,
        eps_as_minimum: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.eps, ctx.flags = eps, (weight_offset, cast_before_weight, eps_as_minimum)
        y, total, rstd = torch.ops.infuse.add_rms_norm_fwd(x, residual, weight, eps, *ctx.flags)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, *(None,) * 5
        total, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            dsum = torch.zeros_like(total) if dsum is None else dsum
            dx, dweight, *_ = differentiate(_norm_and_sum, (total, weight, ctx.eps, *ctx.flags), (dy, dsum))
            return dx, dx, dweight, None, None, None, None
        *flags, eps_as_minimum = ctx.flags
        minimum = ctx.eps if eps_as_minimum else None
        arguments = (total, weight, rstd, *flags, minimum)
        if dsum is None:
            dx, dweight = torch.ops.infuse.rms_norm_bwd(dy, *arguments)
        else:
            dx, dweight = torch.ops.infuse.add_rms_norm_bwd(dy, dsum, *arguments)
        return dx, dx, None if weight is None else dweight, None, None, None, None


def _implementation(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    y, total = add_rms_norm_ref(x, residual, weight, eps, weight_offset, cast_before_weight, eps_as_minimum)
    return y.contiguous(), total.contiguous()


def can_run(x: Tensor, residual: Tensor, weight: Tensor | None = None) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can."""
    return norm_kernels.can_run(x, weight, operand=residual)


def _cuda(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, residual, weight, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    if library.missing(x.device) or can_run(x, residual, weight):
        return _implementation(x, residual, weight, eps, *flags)
    y, total = torch.ops.infuse.add_rms_norm_kernel(x, residual, weight, eps, *flags, -1)
    return y, total


def _fwd_cuda(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rms_norm_fwd", x, residual, weight, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    if library.missing(x.device) or can_run(x, residual, weight):
        return add_rms_norm_fwd_ref(x, residual, weight, eps, *flags)
    y, total, rstd = add_rms_norm_fwd_fake(x, residual, weight, eps, *flags)
    torch.ops.infuse.add_rms_norm_out(x, residual, weight, eps, *flags, -1, y, total, rstd)
    return y, total, rstd


def _bwd_cuda(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor]:
    checks.same_shape("add_rms_norm_bwd", total=total, dsum=dsum, dy=dy)
    found = norm_backward(dy, dsum, total, weight, None, None, rstd, weight_offset, minimum)
    if found is None:
        return add_rms_norm_bwd_ref(dy, dsum, total, weight, rstd, weight_offset, cast_before_weight, minimum)
    return found[:2]


register_differentiable(
    "add_rms_norm",
    ARGUMENTS,
    "(Tensor, Tensor)",
    implementation=_implementation,
    inline=add_rms_norm_ref,
    fake=add_rms_norm_fake,
    autograd=_AddRMSNorm.apply,
)
register(
    "add_rms_norm_fwd",
    "Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset, bool cast_before_weight,"
    " bool eps_as_minimum=False",
    "(Tensor, Tensor, Tensor)",
    implementation=add_rms_norm_fwd_ref,
    fake=add_rms_norm_fwd_fake,
)
register(
    "add_rms_norm_bwd",
    "Tensor dy, Tensor dsum, Tensor total, Tensor? weight, Tensor rstd, float weight_offset, bool cast_before_weight,"
    " float? minimum=None",
    "(Tensor, Tensor)",
    implementation=add_rms_norm_bwd_ref,
    fake=add_rms_norm_bwd_fake,
)
# Implemented by csrc/norm for CUDA alone. config: -1 lets the launcher choose, otherwise an index into its table.
define(
    "add_rms_norm_out(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset,"
    " bool cast_before_weight, bool eps_as_minimum, int config, Tensor(a!) out, Tensor(b!) sum,"
    " Tensor(c!)? rstd=None) -> ()"
)
# Likewise, with the results in memory of their own; what the lowering puts into a graph.
define(
    "add_rms_norm_kernel(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset,"
    " bool cast_before_weight, bool eps_as_minimum, int config) -> (Tensor, Tensor)"
)
register_fake("add_rms_norm_kernel", lambda *arguments: add_rms_norm_fake(*arguments[:-1]))
implement("add_rms_norm", _cuda, "CUDA")
implement("add_rms_norm_fwd", _fwd_cuda, "CUDA")
implement("add_rms_norm_bwd", _bwd_cuda, "CUDA")
norm_sharding.register("add_rms_norm")


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) for x and residual [..., D].

    Raises TypeError for dtypes that are no floats or differ, ValueError for shapes that do not fit.
    """
    _check("add_rms_norm", x, residual, weight, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    y, total = torch.ops.infuse.add_rms_norm(x, residual, weight, eps, *flags)
    return y, total
