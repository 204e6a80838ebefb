"""LayerNorm over the last dimension (Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450).

    n = (x - mean(x)) / sqrt(var(x) + eps)    biased variance; statistics in float32 (float64 for a float64 x)
    y = (n * (weight_offset + weight) + bias).to(x.dtype)
    y = weight * n.to(x.dtype) + bias         with cast_before_weight: rounded before the affine part

Shapes: x [..., D]; weight, bias [D] or None; y [..., D], contiguous; mean, rstd [...], in the dtype of the statistics.
Dtypes: x, weight, bias any float. y has x's dtype, or with cast_before_weight the promoted one of all three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks, library, norm_kernels, norm_sharding
from infuse.ops.norm_backward import norm_backward
from infuse.ops.registration import (
    define,
    differentiate,
    implement,
    register,
    register_differentiable,
)
from infuse.ops.rms_norm import statistics_dtype

FLAGS = "float weight_offset=0.0, bool cast_before_weight=False"
ARGUMENTS = f"Tensor x, Tensor? weight, Tensor? bias, float eps, {FLAGS}"


def output_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None, cast_before_weight: bool) -> torch.dtype:
    """The dtype of y."""
    dtype = x.dtype
    for vector in (weight, bias) if cast_before_weight else ():
        dtype = dtype if vector is None else torch.promote_types(dtype, vector.dtype)
    return dtype


def check_arguments(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float, cast_before_weight: bool
) -> None:
    """Raises TypeError or ValueError when the arguments are not those of a LayerNorm."""
    checks.floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"infuse::{op}: x: got a scalar, expected at least one dimension [..., D]")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            checks.floating(op, name, vector)
            checks.rank(op, name, vector, 1, "[D]")
            checks.equal(op, f"{name}: size", vector.shape[0], x.shape[-1])
    if cast_before_weight and weight_offset != 0:
        raise ValueError(f"infuse::{op}: weight_offset: got {weight_offset}, expected 0 with cast_before_weight")


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float, cast_before_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift that apply before the rounding, in the dtype of the statistics."""
    if cast_before_weight:
        return None, None
    stats = statistics_dtype(x)
    scale = None if weight is None else weight.to(stats)
    if scale is not None and weight_offset != 0:
        scale = scale + weight_offset
    return scale, None if bias is None else bias.to(stats)


def _after_cast(y: Tensor, weight: Tensor | None, bias: Tensor | None, cast_before_weight: bool) -> Tensor:
    """The affine part where it follows the rounding."""
    if cast_before_weight and weight is not None:
        y = weight * y
    return y + bias if cast_before_weight and bias is not None else y


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """The formula in plain torch: test oracle, decomposition and fallback. Returns y.

    Half-precision x is widened first: torch's own layer_norm of a half keeps mean and rstd in that dtype on a CPU, so
    that its backward would be less precise than that of a LayerNorm written out in float32. The forward is the same.
    """
    check_arguments("layer_norm", x, weight, bias, weight_offset, cast_before_weight)
    scale, shift = _affine(x, weight, bias, weight_offset, cast_before_weight)
    y = F.layer_norm(x.to(statistics_dtype(x)), (x.shape[-1],), scale, shift, eps).to(x.dtype)
    return _after_cast(y, weight, bias, cast_before_weight)


def layer_norm_fwd_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd that the backward needs."""
    check_arguments("layer_norm_fwd", x, weight, bias, weight_offset, cast_before_weight)
    scale, shift = _affine(x, weight, bias, weight_offset, cast_before_weight)
    h = x.to(statistics_dtype(x))
    y, mean, rstd = torch.native_layer_norm(h, (x.shape[-1],), scale, shift, eps)
    y = _after_cast(y.to(x.dtype), weight, bias, cast_before_weight)
    return y.contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def _over_rows(values: Tensor) -> Tensor:
    """[..., D] -> [D]"""
    return values.flatten(0, -2).sum(0) if values.dim() > 1 else values


def layer_norm_bwd_ref(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., D], dweight [D] and dbias [D] in the dtypes of what they belong to (empty [0] for what is None)."""
    checks.same_shape("layer_norm_bwd", x=x, dy=dy)
    stats = statistics_dtype(x)
    g, rstd = dy.to(stats), rstd.unsqueeze(-1)
    n = (x.to(stats) - mean.unsqueeze(-1)) * rstd
    dbias = x.new_empty(0) if bias is None else _over_rows(g).to(bias.dtype)
    dweight = x.new_empty(0)
    if weight is not None:
        # What the weight was multiplied with: the rounded n when the cast came first.
        factor = n.to(x.dtype).to(stats) if cast_before_weight else n
        dweight = _over_rows(g * factor).to(weight.dtype)
        g = g * (weight.to(stats) + weight_offset)
    if cast_before_weight:
        g = g.to(x.dtype).to(stats)
    dx = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), dweight.contiguous(), dbias.contiguous()


def layer_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    check_arguments("layer_norm", x, weight, bias, weight_offset, cast_before_weight)
    return x.new_empty(x.shape, dtype=output_dtype(x, weight, bias, cast_before_weight))


def layer_norm_fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = layer_norm_fake(x, weight, bias, eps, weight_offset, cast_before_weight)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics_dtype(x)) for _ in range(2))
    return y, mean, rstd


def layer_norm_bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.same_shape("layer_norm_bwd", x=x, dy=dy)
    dweight, dbias = (x.new_empty(0) if vector is None else vector.new_empty(vector.shape) for vector in (weight, bias))
    return x.new_empty(x.shape), dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        cast_before_weight: bool,
    ) -> Tensor:
        flags = (weight_offset, cast_before_weight)
        y, mean, rstd = torch.ops.infuse.layer_norm_fwd(x, weight, bias, eps, *flags)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.flags = eps, flags
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(layer_norm_ref, (x, weight, bias, ctx.eps, *ctx.flags), (dy,))
        dx, dweight, dbias = torch.ops.infuse.layer_norm_bwd(dy, x, weight, bias, mean, rstd, *ctx.flags)
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None, None


def can_run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can."""
    return norm_kernels.can_run(x, weight, bias)


def _implementation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    return layer_norm_ref(x, weight, bias, eps, weight_offset, cast_before_weight).contiguous()


def _cuda(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    check_arguments("layer_norm", x, weight, bias, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight)
    if library.missing(x.device) or can_run(x, weight, bias):
        return _implementation(x, weight, bias, eps, *flags)
    y = layer_norm_fake(x, weight, bias, eps, *flags)
    torch.ops.infuse.layer_norm_out(x, weight, bias, eps, *flags, -1, y)
    return y


def _fwd_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments("layer_norm_fwd", x, weight, bias, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight)
    if library.missing(x.device) or can_run(x, weight, bias):
        return layer_norm_fwd_ref(x, weight, bias, eps, *flags)
    y, mean, rstd = layer_norm_fwd_fake(x, weight, bias, eps, *flags)
    torch.ops.infuse.layer_norm_out(x, weight, bias, eps, *flags, -1, y, mean, rstd)
    return y, mean, rstd


def _bwd_cuda(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.same_shape("layer_norm_bwd", x=x, dy=dy)
    arguments = (x, weight, bias, mean, rstd, weight_offset)
    return norm_backward(dy, None, *arguments) or layer_norm_bwd_ref(dy, *arguments, cast_before_weight)


register_differentiable(
    "layer_norm",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=layer_norm_ref,
    fake=layer_norm_fake,
    autograd=_LayerNorm.apply,
)
register(
    "layer_norm_fwd",
    "Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool cast_before_weight",
    "(Tensor, Tensor, Tensor)",
    implementation=layer_norm_fwd_ref,
    fake=layer_norm_fwd_fake,
)
register(
    "layer_norm_bwd",
    "Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float weight_offset,"
    " bool cast_before_weight",
    "(Tensor, Tensor, Tensor)",
    implementation=layer_norm_bwd_ref,
    fake=layer_norm_bwd_fake,
)
# Implemented by csrc/norm for CUDA alone. config: -1 lets the launcher choose, otherwise an index into its table.
define(
    "layer_norm_out(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool cast_before_weight,"
    " int config, Tensor(a!) out, Tensor(b!)? mean=None, Tensor(c!)? rstd=None) -> ()"
)
implement("layer_norm", _cuda, "CUDA")
implement("layer_norm_fwd", _fwd_cuda, "CUDA")
implement("layer_norm_bwd", _bwd_cuda, "CUDA")
norm_sharding.register("layer_norm")


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """LayerNorm of x [..., D] over its last dimension; see the module's text for formula, dtypes and rounding.

    Raises TypeError for a dtype that is not a float, ValueError for a weight or a bias that is not [D].
    """
    check_arguments("layer_norm", x, weight, bias, weight_offset, cast_before_weight)
    return torch.ops.infuse.layer_norm(x, weight, bias, eps, weight_offset, cast_before_weight)  # type: ignore[no-any-return]
