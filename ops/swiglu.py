"""The activation of a gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    out = silu(gate) * up

Shapes: gate, up, out [..., F], one dtype, any float; out is contiguous. The backward recomputes silu from gate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.registration import Placements, differentiate, register, register_differentiable, register_sharding


def _check(op: str, gate: Tensor, up: Tensor) -> None:
    checks.floating(op, "gate", gate)
    checks.same_dtype(op, gate=gate, up=up)
    checks.same_shape(op, gate=gate, up=up)


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The formula in plain torch."""
    _check("swiglu", gate, up)
    return F.silu(gate) * up


def swiglu_bwd_ref(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, both [..., F], computed in float32 (float64 for float64)."""
    checks.same_shape("swiglu_bwd", gate=gate, up=up, dout=dout)
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, u, d = gate.to(dtype), up.to(dtype), dout.to(dtype)
    sigmoid = torch.sigmoid(g)
    dgate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(gate.dtype).contiguous(), (d * g * sigmoid).to(up.dtype).contiguous()


def swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    _check("swiglu", gate, up)
    return gate.new_empty(gate.shape)


def swiglu_bwd_fake(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    checks.same_shape("swiglu_bwd", gate=gate, up=up, dout=dout)
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.infuse.swiglu(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return differentiate(swiglu_ref, ctx.saved_tensors, (dout,))
        return torch.ops.infuse.swiglu_bwd(dout, *ctx.saved_tensors)  # type: ignore[no-any-return]


def _implementation(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_ref(gate, up).contiguous()


def _elementwise(num_dims: int, num_outputs: int, num_inputs: int) -> Placements:
    from torch.distributed.tensor import Replicate, Shard

    placements = [Replicate(), *(Shard(dim) for dim in range(num_dims))]
    return [([place] * num_outputs, [place] * num_inputs) for place in placements]


def _sharding(gate: Any, up: Any) -> Placements:
    """Any dimension."""
    return _elementwise(len(gate.shape), 1, 2)


def _bwd_sharding(dout: Any, gate: Any, up: Any) -> Placements:
    return _elementwise(len(gate.shape), 2, 3)


register_differentiable(
    "swiglu",
    "Tensor gate, Tensor up",
    "Tensor",
    implementation=_implementation,
    inline=swiglu_ref,
    fake=swiglu_fake,
    autograd=_SwiGLU.apply,
)
register(
    "swiglu_bwd",
    "Tensor dout, Tensor gate, Tensor up",
    "(Tensor, Tensor)",
    implementation=swiglu_bwd_ref,
    fake=swiglu_bwd_fake,
)
register_sharding("swiglu", _sharding)
register_sharding("swiglu_bwd", _bwd_sharding)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate and up [..., F].

    Raises TypeError for dtypes that are no floats or differ, ValueError for shapes that differ.
    """
    _check("swiglu", gate, up)
    return torch.ops.infuse.swiglu(gate, up)  # type: ignore[no-any-return]
