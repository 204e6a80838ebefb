"""RMSNorm with a gate, before or behind it (Mamba-2, Dao and Gu 2024, https://arxiv.org/abs/2405.21060).

    norm_before_gate   y = (rms(x) * weight * act(gate)).to(x.dtype)
    otherwise          y = (rms(x * act(gate)) * weight).to(x.dtype)

    rms(h) = h / sqrt(mean(h^2) + eps) over each of `groups` equal parts of the last dimension

act is "silu" or "sigmoid". All is computed in float32 (float64 for a float64 x) and rounded at the end, but:
cast_before_weight rounds rms(...) to x's dtype and multiplies weight * rms in the promoted dtype; cast_before_gate
(where the norm comes first) rounds what is multiplied by the gate to x's dtype.

Shapes: x, gate, y [..., D]; weight [D] or None; y contiguous; rstd [..., groups].
Dtypes: x, gate, weight any float; y has x's dtype, or with cast_before_weight behind a gate the promoted one of x and
weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks, library, norm_kernels, norm_sharding
from infuse.ops.norm_backward import gated_norm_backward
from infuse.ops.registration import (
    define,
    differentiate,
    implement,
    register,
    register_differentiable,
)
from infuse.ops.rms_norm import statistics_dtype

ACTIVATIONS = ("silu", "sigmoid")
ARGUMENTS = (
    'Tensor x, Tensor gate, Tensor? weight, float eps, bool norm_before_gate, str activation="silu", int groups=1,'
    " bool cast_before_weight=False, bool cast_before_gate=False"
)
_FLAGS = "bool norm_before_gate, str activation, int groups, bool cast_before_weight, bool cast_before_gate"


def output_dtype(x: Tensor, weight: Tensor | None, norm_before_gate: bool, cast_before_weight: bool) -> torch.dtype:
    """The dtype of y."""
    promoted = weight is not None and cast_before_weight and not norm_before_gate
    return torch.promote_types(x.dtype, weight.dtype) if promoted and weight is not None else x.dtype


def check_arguments(op: str, x: Tensor, gate: Tensor, weight: Tensor | None, activation: str, groups: int) -> None:
    """Raises TypeError or ValueError when the arguments are not those of a gated RMSNorm."""
    checks.floating(op, "x", x)
    checks.floating(op, "gate", gate)
    if x.dim() == 0:
        raise ValueError(f"infuse::{op}: x: got a scalar, expected at least one dimension [..., D]")
    checks.same_shape(op, x=x, gate=gate)
    if weight is not None:
        checks.floating(op, "weight", weight)
        checks.rank(op, "weight", weight, 1, "[D]")
        checks.equal(op, "weight: size", weight.shape[0], x.shape[-1])
    if activation not in ACTIVATIONS:
        raise ValueError(f"infuse::{op}: activation: got {activation!r}, expected one of {list(ACTIVATIONS)}")
    if groups < 1:
        raise ValueError(f"infuse::{op}: groups: got {groups}, expected at least 1")
    checks.equal(op, f"x: remainder of the last size by {groups} groups", x.shape[-1] % groups, 0)


def _act(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else torch.sigmoid(gate)


def _slope(gate: Tensor, activation: str) -> Tensor:
    """The derivative of the activation."""
    sigmoid = torch.sigmoid(gate)
    return sigmoid * (1 + gate * (1 - sigmoid)) if activation == "silu" else sigmoid * (1 - sigmoid)


def _grouped(h: Tensor, groups: int) -> Tensor:
    """[..., D] -> [..., groups, D / groups]"""
    return h.unflatten(-1, (groups, h.shape[-1] // groups)) if groups > 1 else h.unsqueeze(-2)


def _normalise(h: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """rms(h) [..., D] and rstd [..., groups, 1]."""
    if groups == 1:
        rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return h * rstd, rstd.unsqueeze(-1)
    parts = _grouped(h, groups)
    rstd = torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    return (parts * rstd).flatten(-2), rstd


def _weighted(n: Tensor, weight: Tensor | None, dtype: torch.dtype, cast_before_weight: bool) -> Tensor:
    if cast_before_weight:
        n = n.to(dtype)
        return n if weight is None else weight * n
    return n if weight is None else n * weight.to(n.dtype)


def _forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    activation: str,
    groups: int,
    cast_before_weight: bool,
    cast_before_gate: bool,
) -> tuple[Tensor, Tensor]:
    """y and rstd [..., groups, 1]."""
    stats = statistics_dtype(x)
    act = _act(gate.to(stats), activation)
    h = x.to(stats)
    n, rstd = _normalise(h if norm_before_gate else h * act, eps, groups)
    y = _weighted(n, weight, x.dtype, cast_before_weight)
    if norm_before_gate:
        y = (y.to(x.dtype) if cast_before_gate else y) * act
    return y.to(output_dtype(x, weight, norm_before_gate, cast_before_weight)), rstd


def gated_rms_norm_ref(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    activation: str = "silu",
    groups: int = 1,
    cast_before_weight: bool = False,
    cast_before_gate: bool = False,
) -> Tensor:
    """The formula in plain torch: test oracle, decomposition and fallback. Returns y."""
    check_arguments("gated_rms_norm", x, gate, weight, activation, groups)
    flags = (norm_before_gate, activation, groups, cast_before_weight, cast_before_gate)
    return _forward(x, gate, weight, eps, *flags)[0]


def gated_rms_norm_fwd_ref(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *flags: Any
) -> tuple[Tensor, Tensor]:
    """y and the rstd that the backward needs."""
    check_arguments("gated_rms_norm_fwd", x, gate, weight, *flags[1:3])
    y, rstd = _forward(x, gate, weight, eps, *flags)
    return y.contiguous(), rstd.squeeze(-1).contiguous()


def _norm_bwd(
    g: Tensor, n: Tensor, weight: Tensor | None, rstd: Tensor, dtype: torch.dtype, cast_before_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of h and of the weight for that of weight * rms(h); all in the dtype of the statistics."""
    factor = n.to(dtype).to(n.dtype) if cast_before_weight else n
    dweight = n.new_empty(0)
    if weight is not None:
        dweight = (g * factor).flatten(0, -2).sum(0) if g.dim() > 1 else g * factor
        g = g * weight.to(g.dtype)
    if cast_before_weight:
        g = g.to(dtype).to(n.dtype)
    groups = rstd.shape[-2]
    parts, along = _grouped(g, groups), _grouped(n, groups)
    return (rstd * (parts - along * (parts * along).mean(-1, keepdim=True))).flatten(-2), dweight


def gated_rms_norm_bwd_ref(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
    activation: str,
    groups: int,
    cast_before_weight: bool,
    cast_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dgate [..., D], dweight [D] (empty [0] without a weight), in the dtypes of what they belong to."""
    checks.same_shape("gated_rms_norm_bwd", x=x, dy=dy)
    stats = statistics_dtype(x)
    g, h, z, rstd = dy.to(stats), x.to(stats), gate.to(stats), rstd.unsqueeze(-1)
    act, slope = _act(z, activation), _slope(z, activation)
    n = (_grouped(h if norm_before_gate else h * act, groups) * rstd).flatten(-2)
    if norm_before_gate:
        gated = _weighted(n, weight, x.dtype, cast_before_weight)
        dgate = g * (gated.to(x.dtype) if cast_before_gate else gated).to(stats) * slope
        g = (g * act).to(x.dtype).to(stats) if cast_before_gate else g * act
    dx, dweight = _norm_bwd(g, n, weight, rstd, x.dtype, cast_before_weight)
    if not norm_before_gate:
        dgate = dx * h * slope
        dx = dx * act
    dweight = x.new_empty(0) if weight is None else dweight.to(weight.dtype)
    return dx.to(x.dtype).contiguous(), dgate.to(gate.dtype).contiguous(), dweight.contiguous()


def gated_rms_norm_fake(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    activation: str = "silu",
    groups: int = 1,
    cast_before_weight: bool = False,
    cast_before_gate: bool = False,
) -> Tensor:
    check_arguments("gated_rms_norm", x, gate, weight, activation, groups)
    return x.new_empty(x.shape, dtype=output_dtype(x, weight, norm_before_gate, cast_before_weight))


def gated_rms_norm_fwd_fake(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *flags: Any
) -> tuple[Tensor, Tensor]:
    y = gated_rms_norm_fake(x, gate, weight, eps, *flags)
    return y, x.new_empty((*x.shape[:-1], flags[2]), dtype=statistics_dtype(x))


def gated_rms_norm_bwd_fake(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, *flags: Any
) -> tuple[Tensor, Tensor, Tensor]:
    checks.same_shape("gated_rms_norm_bwd", x=x, dy=dy)
    dweight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *flags: Any) -> Tensor:
        ctx.eps, ctx.flags = eps, flags
        y, rstd = torch.ops.infuse.gated_rms_norm_fwd(x, gate, weight, eps, *flags)
        ctx.save_for_backward(x, gate, weight, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(gated_rms_norm_ref, (x, gate, weight, ctx.eps, *ctx.flags), (dy,))
        dx, dgate, dweight = torch.ops.infuse.gated_rms_norm_bwd(dy, x, gate, weight, rstd, *ctx.flags)
        return dx, dgate, None if weight is None else dweight, *(None for _ in (ctx.eps, *ctx.flags))


def _implementation(*args: Any) -> Tensor:
    return gated_rms_norm_ref(*args).contiguous()


def can_run(x: Tensor, gate: Tensor, weight: Tensor | None = None, groups: int = 1) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can."""
    return norm_kernels.can_run(x, weight, operand=gate, groups=groups)


def _for_kernel(flags: Sequence[Any]) -> tuple[Any, ...]:
    """(norm_before_gate, activation, ..) with the activation as the kernel is told it."""
    return (flags[0], flags[1] == "silu", *flags[2:])


def _cuda(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    activation: str = "silu",
    groups: int = 1,
    cast_before_weight: bool = False,
    cast_before_gate: bool = False,
) -> Tensor:
    check_arguments("gated_rms_norm", x, gate, weight, activation, groups)
    flags = (norm_before_gate, activation, groups, cast_before_weight, cast_before_gate)
    if library.missing(x.device) or can_run(x, gate, weight, groups):
        return _implementation(x, gate, weight, eps, *flags)
    y = gated_rms_norm_fake(x, gate, weight, eps, *flags)
    torch.ops.infuse.gated_rms_norm_out(x, gate, weight, eps, *_for_kernel(flags), -1, y)
    return y


def _fwd_cuda(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *flags: Any) -> tuple[Tensor, Tensor]:
    check_arguments("gated_rms_norm_fwd", x, gate, weight, *flags[1:3])
    groups: int = flags[2]
    if library.missing(x.device) or can_run(x, gate, weight, groups):
        return gated_rms_norm_fwd_ref(x, gate, weight, eps, *flags)
    y, rstd = gated_rms_norm_fwd_fake(x, gate, weight, eps, *flags)
    torch.ops.infuse.gated_rms_norm_out(x, gate, weight, eps, *_for_kernel(flags), -1, y, rstd)
    return y, rstd


def _bwd_cuda(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, *flags: Any
) -> tuple[Tensor, Tensor, Tensor]:
    checks.same_shape("gated_rms_norm_bwd", x=x, dy=dy)
    norm_before_gate, activation = flags[:2]
    found = gated_norm_backward(dy, x, gate, weight, rstd, not norm_before_gate, activation == "silu")
    return gated_rms_norm_bwd_ref(dy, x, gate, weight, rstd, *flags) if found is None else found


register_differentiable(
    "gated_rms_norm",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=gated_rms_norm_ref,
    fake=gated_rms_norm_fake,
    autograd=_GatedRMSNorm.apply,
)
register(
    "gated_rms_norm_fwd",
    f"Tensor x, Tensor gate, Tensor? weight, float eps, {_FLAGS}",
    "(Tensor, Tensor)",
    implementation=gated_rms_norm_fwd_ref,
    fake=gated_rms_norm_fwd_fake,
)
register(
    "gated_rms_norm_bwd",
    f"Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor rstd, {_FLAGS}",
    "(Tensor, Tensor, Tensor)",
    implementation=gated_rms_norm_bwd_ref,
    fake=gated_rms_norm_bwd_fake,
)
# Implemented by csrc/norm for CUDA alone. config: -1 lets the launcher choose, otherwise an index into its table.
define(
    "gated_rms_norm_out(Tensor x, Tensor gate, Tensor? weight, float eps, bool norm_before_gate, bool gate_is_silu,"
    " int groups, bool cast_before_weight, bool cast_before_gate, int config, Tensor(a!) out,"
    " Tensor(b!)? rstd=None) -> ()"
)
implement("gated_rms_norm", _cuda, "CUDA")
implement("gated_rms_norm_fwd", _fwd_cuda, "CUDA")
implement("gated_rms_norm_bwd", _bwd_cuda, "CUDA")
norm_sharding.register("gated_rms_norm")


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm_before_gate: bool,
    activation: str = "silu",
    groups: int = 1,
    cast_before_weight: bool = False,
    cast_before_gate: bool = False,
) -> Tensor:
    """Gated RMSNorm of x [..., D] with gate [..., D]; see the module's text for formula, dtypes and rounding.

    Raises TypeError for a dtype that is not a float, ValueError for shapes that do not fit, an unknown activation or
    groups that do not divide D.
    """
    check_arguments("gated_rms_norm", x, gate, weight, activation, groups)
    flags = (norm_before_gate, activation, groups, cast_before_weight, cast_before_gate)
    return torch.ops.infuse.gated_rms_norm(x, gate, weight, eps, *flags)  # type: ignore[no-any-return]
