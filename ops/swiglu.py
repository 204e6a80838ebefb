"""The activation of a gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    out = act(g) * u        g = min(gate, limit), u = clamp(up, -limit, limit) + up_offset, without a limit as they are

`activation` names act:

    silu          g * sigmoid(g)                            SwiGLU
    quick_gelu    g * sigmoid(alpha * g)                    alpha, limit and up_offset as in gpt-oss
    gelu_tanh     g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3)))
    gelu_erf      g/2 * (1 + erf(g / sqrt(2)))              GEGLU
    sigmoid       sigmoid(g)                                GLU, as torch.nn.functional.glu
    relu          max(g, 0)                                 ReGLU
    relu_squared  max(g, 0)^2
    tanh          tanh(g)
    mish          g * tanh(log(1 + exp(g)))

act is evaluated in float32 at least and rounded once to gate's dtype, then multiplied; for `sigmoid` only the product
is rounded, as in torch's own glu. Shapes: gate, up, out [..., F], one dtype, any float; out is contiguous. The backward
recomputes everything from gate and up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.registration import Placements, differentiate, register, register_differentiable, register_sharding

QUICK_GELU_ALPHA = 1.702
FLAGS = f'str activation="silu", float? limit=None, float alpha={QUICK_GELU_ALPHA}, float up_offset=0.0'
NUM_FLAGS = FLAGS.count(",") + 1
ARGUMENTS = f"Tensor gate, Tensor up, {FLAGS}"
_BWD_ARGUMENTS = "Tensor dout, Tensor gate, Tensor up, str activation, float? limit, float alpha, float up_offset"
_HALF = (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _quick_gelu(g: Tensor, alpha: float) -> Tensor:
    wide = _wide(g)
    return (wide * torch.sigmoid(alpha * wide)).to(g.dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda g, alpha: F.silu(g),
    "quick_gelu": _quick_gelu,
    "gelu_tanh": lambda g, alpha: F.gelu(g, approximate="tanh"),
    "gelu_erf": lambda g, alpha: F.gelu(g),
    "sigmoid": lambda g, alpha: torch.sigmoid(g),
    "relu": lambda g, alpha: F.relu(g),
    "relu_squared": lambda g, alpha: F.relu(g).square(),
    "tanh": lambda g, alpha: torch.tanh(g),
    "mish": lambda g, alpha: F.mish(g),
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def _check(op: str, gate: Tensor, up: Tensor, activation: str) -> None:
    checks.floating(op, "gate", gate)
    checks.same_dtype(op, gate=gate, up=up)
    checks.same_shape(op, gate=gate, up=up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"infuse::{op}: activation: got {activation!r}, expected one of {list(ACTIVATIONS)}")


def _limited(gate: Tensor, up: Tensor, limit: float | None, up_offset: float) -> tuple[Tensor, Tensor]:
    """g and u of the module's text."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if not (isinstance(up_offset, (int, float)) and up_offset == 0):
        up = up + up_offset
    return gate, up


def swiglu_ref(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = QUICK_GELU_ALPHA,
    up_offset: float = 0.0,
) -> Tensor:
    """The formula in plain torch."""
    _check("swiglu", gate, up, activation)
    gate, up = _limited(gate, up, limit, up_offset)
    if activation == "sigmoid":
        return (torch.sigmoid(_wide(gate)) * _wide(up)).to(up.dtype)
    return _ACTIVATIONS[activation](gate, alpha) * up


def _slope(g: Tensor, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """act(g) and its derivative, in g's dtype."""
    if activation in ("silu", "quick_gelu"):
        slope = 1.0 if activation == "silu" else alpha
        sigmoid = torch.sigmoid(slope * g)
        return g * sigmoid, sigmoid * (1 + slope * g * (1 - sigmoid))
    if activation == "sigmoid":
        sigmoid = torch.sigmoid(g)
        return sigmoid, sigmoid * (1 - sigmoid)
    if activation == "gelu_erf":
        cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        beta, kappa = math.sqrt(2 / math.pi), 0.044715
        tanh = torch.tanh(beta * (g + kappa * g * g * g))
        inner = beta * (1 + 3 * kappa * g * g)
        return 0.5 * g * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * inner
    if activation in ("tanh", "mish"):
        tanh = torch.tanh(g if activation == "tanh" else F.softplus(g))
        bend = 1 - tanh * tanh
        return (tanh, bend) if activation == "tanh" else (g * tanh, tanh + g * bend * torch.sigmoid(g))
    relu = F.relu(g)
    return (relu, (g > 0).to(g.dtype)) if activation == "relu" else (relu * relu, 2 * relu)


def swiglu_bwd_ref(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, limit: float | None, alpha: float, up_offset: float
) -> tuple[Tensor, Tensor]:
    """dgate and dup, both [..., F], computed in float32 (float64 for float64); 0 where the limit cuts."""
    checks.same_shape("swiglu_bwd", gate=gate, up=up, dout=dout)
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, u = (x.to(dtype) for x in _limited(gate, up, limit, up_offset))
    act, slope = _slope(g, activation, alpha)
    d = dout.to(dtype)
    dgate, dup = d * u * slope, d * act
    if limit is not None:
        dgate, dup = torch.where(gate <= limit, dgate, 0.0), torch.where(up.abs() <= limit, dup, 0.0)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def swiglu_fake(gate: Tensor, up: Tensor, activation: str = "silu", *flags: Any) -> Tensor:
    _check("swiglu", gate, up, activation)
    return gate.new_empty(gate.shape)


def swiglu_bwd_fake(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, *flags: float | None
) -> tuple[Tensor, Tensor]:
    checks.same_shape("swiglu_bwd", gate=gate, up=up, dout=dout)
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *flags: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.flags = flags
        return torch.ops.infuse.swiglu(gate, up, *flags)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return differentiate(swiglu_ref, (*ctx.saved_tensors, *ctx.flags), (dout,))
        dgate, dup = torch.ops.infuse.swiglu_bwd(dout, *ctx.saved_tensors, *ctx.flags)
        return dgate, dup, *(None for _ in ctx.flags)


def _implementation(gate: Tensor, up: Tensor, *flags: Any) -> Tensor:
    return swiglu_ref(gate, up, *flags).contiguous()


def _elementwise(num_dims: int, num_outputs: int, num_inputs: int, num_flags: int) -> Placements:
    from torch.distributed.tensor import Replicate, Shard

    placements = [Replicate(), *(Shard(dim) for dim in range(num_dims))]
    return [([place] * num_outputs, [*([place] * num_inputs), *([None] * num_flags)]) for place in placements]


def _sharding(gate: Any, up: Any, *flags: Any) -> Placements:
    """Any dimension."""
    return _elementwise(len(gate.shape), 1, 2, len(flags))


def _bwd_sharding(dout: Any, gate: Any, up: Any, *flags: Any) -> Placements:
    return _elementwise(len(gate.shape), 2, 3, len(flags))


register_differentiable(
    "swiglu",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=swiglu_ref,
    fake=swiglu_fake,
    autograd=_SwiGLU.apply,
)
register(
    "swiglu_bwd",
    _BWD_ARGUMENTS,
    "(Tensor, Tensor)",
    implementation=swiglu_bwd_ref,
    fake=swiglu_bwd_fake,
)
register_sharding("swiglu", _sharding)
register_sharding("swiglu_bwd", _bwd_sharding)


def swiglu(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float = QUICK_GELU_ALPHA,
    up_offset: float = 0.0,
) -> Tensor:
    """act(gate) * up for gate and up [..., F]; see the module's text for the activations and the other arguments.

    Raises TypeError for dtypes that are no floats or differ, ValueError for shapes that differ and an activation that
    is not known.
    """
    _check("swiglu", gate, up, activation)
    return torch.ops.infuse.swiglu(gate, up, activation, limit, alpha, up_offset)  # type: ignore[no-any-return]
