"""RMSNorm over the last dimension (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    n = x / sqrt(mean(x^2) + eps)        statistics in float32 (float64 for a float64 x)
    n = x / sqrt(max(mean(x^2), eps))    with eps_as_minimum
    y = (n * (weight_offset + weight)).to(x.dtype)
    y = weight * n.to(x.dtype)           with cast_before_weight, as Hugging Face's Llama rounds

Shapes: x [..., D]; weight [D] or None; y [..., D], contiguous; rstd [...], float32 (float64 for a float64 x).
Dtypes: x any float; weight any float. y has x's dtype, or with cast_before_weight the promoted one of x and weight.
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
)

FLAGS = "float weight_offset=0.0, bool cast_before_weight=False, bool eps_as_minimum=False"
ARGUMENTS = f"Tensor x, Tensor? weight, float eps, {FLAGS}"


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the mean of squares is taken."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def output_dtype(x: Tensor, weight: Tensor | None, cast_before_weight: bool) -> torch.dtype:
    """The dtype of y."""
    return torch.promote_types(x.dtype, weight.dtype) if cast_before_weight and weight is not None else x.dtype


def check_arguments(op: str, x: Tensor, weight: Tensor | None, weight_offset: float, cast_before_weight: bool) -> None:
    """Raises TypeError or ValueError when the arguments are not those of an RMSNorm."""
    checks.floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"infuse::{op}: x: got a scalar, expected at least one dimension [..., D]")
    if weight is None:
        return
    checks.floating(op, "weight", weight)
    checks.rank(op, "weight", weight, 1, "[D]")
    checks.equal(op, "weight: size", weight.shape[0], x.shape[-1])
    if cast_before_weight and weight_offset != 0:
        raise ValueError(f"infuse::{op}: weight_offset: got {weight_offset}, expected 0 with cast_before_weight")


def normalise(x: Tensor, eps: float, eps_as_minimum: bool = False) -> tuple[Tensor, Tensor]:
    """n [..., D] and rstd [..., 1], both in the dtype of the statistics."""
    h = x.to(statistics_dtype(x))
    mean = h.pow(2).mean(-1, keepdim=True)
    rstd = torch.rsqrt(mean.clamp(min=eps) if eps_as_minimum else mean + eps)
    return h * rstd, rstd


def apply_weight(
    n: Tensor, dtype: torch.dtype, weight: Tensor | None, weight_offset: float, cast_before_weight: bool
) -> Tensor:
    """y from the normalised n and the dtype of x."""
    if weight is None:
        return n.to(dtype)
    if cast_before_weight:
        return weight * n.to(dtype)
    scale = weight.to(n.dtype)
    return (n * (scale + weight_offset if weight_offset != 0 else scale)).to(dtype)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> Tensor:
    """The formula in plain torch: test oracle, decomposition and fallback. Returns y."""
    check_arguments("rms_norm", x, weight, weight_offset, cast_before_weight)
    return apply_weight(normalise(x, eps, eps_as_minimum)[0], x.dtype, weight, weight_offset, cast_before_weight)


def rms_norm_fwd_ref(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and the rstd that the backward needs."""
    check_arguments("rms_norm_fwd", x, weight, weight_offset, cast_before_weight)
    n, rstd = normalise(x, eps, eps_as_minimum)
    return apply_weight(n, x.dtype, weight, weight_offset, cast_before_weight).contiguous(), rstd.squeeze(-1)


def rms_norm_bwd_ref(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor]:
    """dx [..., D] in x's dtype and dweight [D] in weight's (empty [0] without a weight).

    minimum: what bounded the mean of squares, if anything did; where it was in force rstd depends on nothing.
    """
    checks.same_shape("rms_norm_bwd", x=x, dy=dy)
    stats = statistics_dtype(x)
    g, rstd = dy.to(stats), rstd.unsqueeze(-1)
    n = x.to(stats) * rstd
    dweight = x.new_empty(0)
    if weight is not None:
        # What the weight was multiplied with: the rounded n when the cast came first.
        factor = n.to(x.dtype).to(stats) if cast_before_weight else n
        dweight = (g * factor).flatten(0, -2).sum(0).to(weight.dtype) if x.dim() > 1 else (g * factor).to(weight.dtype)
        g = g * (weight.to(stats) + weight_offset)
        if cast_before_weight:
            g = g.to(x.dtype).to(stats)
    along = n * (g * n).mean(-1, keepdim=True)
    if minimum is not None:
        along = torch.where(x.to(stats).pow(2).mean(-1, keepdim=True) >= minimum, along, 0.0)
    dx = rstd * (g - along)
    return dx.to(x.dtype).contiguous(), dweight.contiguous()


def rms_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> Tensor:
    check_arguments("rms_norm", x, weight, weight_offset, cast_before_weight)
    return x.new_empty(x.shape, dtype=output_dtype(x, weight, cast_before_weight))


def rms_norm_fwd_fake(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    y = rms_norm_fake(x, weight, eps, weight_offset, cast_before_weight)
    return y, x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


def rms_norm_bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor]:
    checks.same_shape("rms_norm_bwd", x=x, dy=dy)
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        weight_offset: float,
        cast_before_weight: bool,
        eps_as_minimum: bool,
    ) -> Tensor:
        ctx.eps, ctx.flags = eps, (weight_offset, cast_before_weight, eps_as_minimum)
        y, rstd = torch.ops.infuse.rms_norm_fwd(x, weight, eps, *ctx.flags)
        ctx.save_for_backward(x, weight, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(rms_norm_ref, (x, weight, ctx.eps, *ctx.flags), (dy,))
        *flags, eps_as_minimum = ctx.flags
        minimum = ctx.eps if eps_as_minimum else None
        dx, dweight = torch.ops.infuse.rms_norm_bwd(dy, x, weight, rstd, *flags, minimum)
        return dx, None if weight is None else dweight, None, None, None, None


def can_run(x: Tensor, weight: Tensor | None = None) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can."""
    return norm_kernels.can_run(x, weight)


def _implementation(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> Tensor:
    return rms_norm_ref(x, weight, eps, weight_offset, cast_before_weight, eps_as_minimum).contiguous()


def _cuda(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> Tensor:
    check_arguments("rms_norm", x, weight, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    if library.missing(x.device) or can_run(x, weight):
        return _implementation(x, weight, eps, *flags)
    y = rms_norm_fake(x, weight, eps, *flags)
    torch.ops.infuse.rms_norm_out(x, weight, eps, *flags, -1, y)
    return y


def _fwd_cuda(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    check_arguments("rms_norm_fwd", x, weight, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    if library.missing(x.device) or can_run(x, weight):
        return rms_norm_fwd_ref(x, weight, eps, *flags)
    y, rstd = rms_norm_fwd_fake(x, weight, eps, *flags)
    torch.ops.infuse.rms_norm_out(x, weight, eps, *flags, -1, y, rstd)
    return y, rstd


def _bwd_cuda(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    cast_before_weight: bool,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor]:
    checks.same_shape("rms_norm_bwd", x=x, dy=dy)
    found = norm_backward(dy, None, x, weight, None, None, rstd, weight_offset, minimum)
    if found is None:
        return rms_norm_bwd_ref(dy, x, weight, rstd, weight_offset, cast_before_weight, minimum)
    return found[:2]


register_differentiable(
    "rms_norm",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=rms_norm_ref,
    fake=rms_norm_fake,
    autograd=_RMSNorm.apply,
)
register(
    "rms_norm_fwd",
    "Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_before_weight, bool eps_as_minimum=False",
    "(Tensor, Tensor)",
    implementation=rms_norm_fwd_ref,
    fake=rms_norm_fwd_fake,
)
register(
    "rms_norm_bwd",
    "Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float weight_offset, bool cast_before_weight,"
    " float? minimum=None",
    "(Tensor, Tensor)",
    implementation=rms_norm_bwd_ref,
    fake=rms_norm_bwd_fake,
)
# Implemented by csrc/norm for CUDA alone. config: -1 lets the launcher choose, otherwise an index into its table.
define(
    "rms_norm_out(Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_before_weight,"
    " bool eps_as_minimum, int config, Tensor(a!) out, Tensor(b!)? rstd=None) -> ()"
)
implement("rms_norm", _cuda, "CUDA")
implement("rms_norm_fwd", _fwd_cuda, "CUDA")
implement("rms_norm_bwd", _bwd_cuda, "CUDA")
norm_sharding.register("rms_norm")


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> Tensor:
    """RMSNorm of x [..., D] over its last dimension; see the module's text for formula, dtypes and rounding.

    Raises TypeError for a dtype that is not a float, ValueError for a weight that is not [D].
    """
    check_arguments("rms_norm", x, weight, weight_offset, cast_before_weight)
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    return torch.ops.infuse.rms_norm(x, weight, eps, *flags)  # type: ignore[no-any-return]
