"""Residual add and LayerNorm of the sum; both results are needed, the sum by the next residual.

    sum = x + residual               in their dtype
    y   = layer_norm(sum)            rounding and dtypes as in infuse.ops.layer_norm

Shapes: x, residual, sum, y [..., D]; weight, bias [D] or None. x and residual share shape and dtype; results are
contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks, library, norm_kernels, norm_sharding
from infuse.ops.layer_norm import (
    FLAGS,
    check_arguments,
    layer_norm_bwd_ref,
    layer_norm_fwd_ref,
    layer_norm_ref,
    output_dtype,
)
from infuse.ops.norm_backward import norm_backward
from infuse.ops.registration import (
    define,
    differentiate,
    implement,
    register,
    register_differentiable,
    register_fake,
)
from infuse.ops.rms_norm import statistics_dtype

ARGUMENTS = f"Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, {FLAGS}"


def _check(
    op: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    cast_before_weight: bool,
) -> None:
    check_arguments(op, x, weight, bias, weight_offset, cast_before_weight)
    checks.same_dtype(op, x=x, residual=residual)
    checks.same_shape(op, x=x, residual=residual)


def add_layer_norm_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch. Returns y and the sum."""
    _check("add_layer_norm", x, residual, weight, bias, weight_offset, cast_before_weight)
    total = x + residual
    return layer_norm_ref(total, weight, bias, eps, weight_offset, cast_before_weight), total


def add_layer_norm_fwd_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, mean [...] and rstd [...]."""
    _check("add_layer_norm_fwd", x, residual, weight, bias, weight_offset, cast_before_weight)
    total = (x + residual).contiguous()
    y, mean, rstd = layer_norm_fwd_ref(total, weight, bias, eps, weight_offset, cast_before_weight)
    return y, total, mean, rstd


def add_layer_norm_bwd_ref(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, which is that of residual too, dweight and dbias; dsum is what reaches the sum directly."""
    checks.same_shape("add_layer_norm_bwd", total=total, dsum=dsum)
    dx, dweight, dbias = layer_norm_bwd_ref(dy, total, weight, bias, mean, rstd, weight_offset, cast_before_weight)
    return (dx + dsum).contiguous(), dweight, dbias


def add_layer_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    _check("add_layer_norm", x, residual, weight, bias, weight_offset, cast_before_weight)
    y = x.new_empty(x.shape, dtype=output_dtype(x, weight, bias, cast_before_weight))
    return y, x.new_empty(x.shape)


def add_layer_norm_fwd_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total = add_layer_norm_fake(x, residual, weight, bias, eps, weight_offset, cast_before_weight)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics_dtype(x)) for _ in range(2))
    return y, total, mean, rstd


def add_layer_norm_bwd_fake(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.same_shape("add_layer_norm_bwd", total=total, dsum=dsum)
    dweight, dbias = (
        total.new_empty(0) if vector is None else vector.new_empty(vector.shape) for vector in (weight, bias)
    )
    return total.new_empty(total.shape), dweight, dbias


def _norm_and_sum(total: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # view_as: an input cannot be differentiated as an output of itself
    return layer_norm_ref(total, *arguments), total.view_as(total)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        cast_before_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        flags = (weight_offset, cast_before_weight)
        y, total, mean, rstd = torch.ops.infuse.add_layer_norm_fwd(x, residual, weight, bias, eps, *flags)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.eps, ctx.flags = eps, flags
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, *(None,) * 5
        total, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (total, weight, bias, ctx.eps, *ctx.flags)
            dsum = torch.zeros_like(total) if dsum is None else dsum
            dx, dweight, dbias, *_ = differentiate(_norm_and_sum, inputs, (dy, dsum))
            return dx, dx, dweight, dbias, None, None, None
        arguments = (total, weight, bias, mean, rstd, *ctx.flags)
        if dsum is None:
            dx, dweight, dbias = torch.ops.infuse.layer_norm_bwd(dy, *arguments)
        else:
            dx, dweight, dbias = torch.ops.infuse.add_layer_norm_bwd(dy, dsum, *arguments)
        vectors = (None if weight is None else dweight, None if bias is None else dbias)
        return dx, dx, *vectors, None, None, None


def _implementation(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    y, total = add_layer_norm_ref(x, residual, weight, bias, eps, weight_offset, cast_before_weight)
    return y.contiguous(), total.contiguous()


def can_run(x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can."""
    return norm_kernels.can_run(x, weight, bias, residual)


def _cuda(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    _check("add_layer_norm", x, residual, weight, bias, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight)
    if library.missing(x.device) or can_run(x, residual, weight, bias):
        return _implementation(x, residual, weight, bias, eps, *flags)
    y, total = torch.ops.infuse.add_layer_norm_kernel(x, residual, weight, bias, eps, *flags, -1)
    return y, total


def _fwd_cuda(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("add_layer_norm_fwd", x, residual, weight, bias, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight)
    if library.missing(x.device) or can_run(x, residual, weight, bias):
        return add_layer_norm_fwd_ref(x, residual, weight, bias, eps, *flags)
    y, total, mean, rstd = add_layer_norm_fwd_fake(x, residual, weight, bias, eps, *flags)
    torch.ops.infuse.add_layer_norm_out(x, residual, weight, bias, eps, *flags, -1, y, total, mean, rstd)
    return y, total, mean, rstd


def _bwd_cuda(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.same_shape("add_layer_norm_bwd", total=total, dsum=dsum, dy=dy)
    arguments = (dsum, total, weight, bias, mean, rstd, weight_offset)
    return norm_backward(dy, *arguments) or add_layer_norm_bwd_ref(dy, *arguments, cast_before_weight)


register_differentiable(
    "add_layer_norm",
    ARGUMENTS,
    "(Tensor, Tensor)",
    implementation=_implementation,
    inline=add_layer_norm_ref,
    fake=add_layer_norm_fake,
    autograd=_AddLayerNorm.apply,
)
register(
    "add_layer_norm_fwd",
    "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool cast_before_weight",
    "(Tensor, Tensor, Tensor, Tensor)",
    implementation=add_layer_norm_fwd_ref,
    fake=add_layer_norm_fwd_fake,
)
register(
    "add_layer_norm_bwd",
    "Tensor dy, Tensor dsum, Tensor total, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " float weight_offset, bool cast_before_weight",
    "(Tensor, Tensor, Tensor)",
    implementation=add_layer_norm_bwd_ref,
    fake=add_layer_norm_bwd_fake,
)
# Implemented by csrc/norm for CUDA alone. config: -1 lets the launcher choose, otherwise an index into its table.
define(
    "add_layer_norm_out(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " bool cast_before_weight, int config, Tensor(a!) out, Tensor(b!) sum, Tensor(c!)? mean=None,"
    " Tensor(d!)? rstd=None) -> ()"
)
# Likewise, with the results in memory of their own; what the lowering puts into a graph.
define(
    "add_layer_norm_kernel(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " bool cast_before_weight, int config) -> (Tensor, Tensor)"
)
register_fake("add_layer_norm_kernel", lambda *arguments: add_layer_norm_fake(*arguments[:-1]))
implement("add_layer_norm", _cuda, "CUDA")
implement("add_layer_norm_fwd", _fwd_cuda, "CUDA")
implement("add_layer_norm_bwd", _bwd_cuda, "CUDA")
norm_sharding.register("add_layer_norm")


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) for x and residual [..., D].

    Raises TypeError for dtypes that are no floats or differ, ValueError for shapes that do not fit.
    """
    _check("add_layer_norm", x, residual, weight, bias, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight)
    y, total = torch.ops.infuse.add_layer_norm(x, residual, weight, bias, eps, *flags)
    return y, total
