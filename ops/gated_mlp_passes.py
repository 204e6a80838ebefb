"""The pieces of a gated MLP that trains, as operators that stay whole through autograd.

    linear_swiglu_fwd    h, gate_up        of x and the weights of gate and up, as infuse.ops.linear_swiglu takes them
    linear_gated_bwd     dgate_up, h       dh = dy @ down_weight; dgate_up: swiglu's gradients for dh; h: computed again
    recomputed_gated_bwd dgate_up, h       the same out of x, gate_up being computed again too
    linear_pair          dx = dgate @ gate_weight + dup @ up_weight
    rms_norm_again       y = rms_norm(x) as in the forward

Shapes: x, dx [..., D]; h [..., F]; gate_up, dgate_up [..., 2F], gate (dgate) first whatever the order of the weights;
dy [..., E]; down_weight [E, F]; gate_weight, up_weight [F, D], views of a packed weight included. One dtype, results
contiguous. wants_h: without it the second result is empty, [0]. Products and activations are rounded as autograd
rounds them; h is what the forward had, to the bit.

recomputed_gated_bwd and rms_norm_again take dy, on which gate_up and y do not depend, so that no partitioner of a graph
moves their work into the forward, to keep what was to be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks, rms_norm
from infuse.ops.linear_swiglu import check, gate_and_up, halves
from infuse.ops.registration import register
from infuse.ops.swiglu import FLAGS, swiglu_bwd_ref, swiglu_ref

_WEIGHTS = "Tensor x, Tensor[] weights, Tensor?[] biases, str order"
_FLAGS = ", ".join(flag.partition("=")[0] for flag in FLAGS.split(", "))


def linear_swiglu_fwd_ref(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, *flags: Any
) -> tuple[Tensor, Tensor]:
    check("linear_swiglu_fwd", x, weights, biases, order)
    gate, up = gate_and_up(x, weights, biases, order)
    gate_up = torch.cat((gate, up), -1)
    return swiglu_ref(gate, up, *flags).contiguous(), gate_up


def linear_swiglu_fwd_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, *flags: Any
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of h and gate_up."""
    check("linear_swiglu_fwd", x, weights, biases, order)
    size = weights[0].shape[0] if len(weights) == 2 else weights[0].shape[0] // 2
    return x.new_empty((*x.shape[:-1], size)), x.new_empty((*x.shape[:-1], 2 * size))


def _check_backward(op: str, dy: Tensor, down_weight: Tensor, gate_up_size: int | torch.SymInt) -> None:
    checks.rank(op, "down_weight", down_weight, 2, "[E, F]")
    checks.same_dtype(op, dy=dy, down_weight=down_weight)
    checks.equal(op, "dy: size of the last dimension", dy.shape[-1], down_weight.shape[0])
    checks.equal(op, "gate_up: size of the last dimension", gate_up_size, 2 * down_weight.shape[1])


def linear_gated_bwd_ref(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *flags, wants_h = rest
    _check_backward("linear_gated_bwd", dy, down_weight, gate_up.shape[-1])
    gate, up = halves(gate_up, "gate_up")
    dgate, dup = swiglu_bwd_ref(dy @ down_weight, gate, up, *flags)
    h = swiglu_ref(gate, up, *flags).contiguous() if wants_h else gate_up.new_empty(0)
    return torch.cat((dgate, dup), -1), h


def _backward_results(dy: Tensor, down_weight: Tensor, wants_h: bool) -> tuple[Tensor, Tensor]:
    size = down_weight.shape[1]
    h = dy.new_empty((*dy.shape[:-1], size)) if wants_h else dy.new_empty(0)
    return dy.new_empty((*dy.shape[:-1], 2 * size)), h


def _backward_fake(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_backward("linear_gated_bwd", dy, down_weight, gate_up.shape[-1])
    return _backward_results(dy, down_weight, rest[-1])


def recomputed_gated_bwd_ref(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    order: str,
    down_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Out of the two operators that it stands for."""
    *flags, wants_h = rest
    h, gate_up = torch.ops.infuse.linear_swiglu_fwd(x, weights, biases, order, *flags)
    dgate_up, empty = torch.ops.infuse.linear_gated_bwd(dy, down_weight, gate_up, *flags, False)
    return dgate_up, h if wants_h else empty


def _recomputed_fake(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    order: str,
    down_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    _, gate_up = linear_swiglu_fwd_fake(x, weights, biases, order)
    _check_backward("recomputed_gated_bwd", dy, down_weight, gate_up.shape[-1])
    return _backward_results(dy, down_weight, rest[-1])


def _check_pair(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    checks.rank("linear_pair", "gate_weight", gate_weight, 2, "[F, D]")
    checks.same_shape("linear_pair", gate_weight=gate_weight, up_weight=up_weight)
    checks.same_dtype("linear_pair", dgate_up=dgate_up, gate_weight=gate_weight, up_weight=up_weight)
    size = 2 * gate_weight.shape[0]
    checks.equal("linear_pair", "dgate_up: size of the last dimension", dgate_up.shape[-1], size)


def linear_pair_ref(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    _check_pair(dgate_up, gate_weight, up_weight)
    dgate, dup = halves(dgate_up, "gate_up")
    return dgate @ gate_weight + dup @ up_weight


def _pair_fake(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    _check_pair(dgate_up, gate_weight, up_weight)
    return dgate_up.new_empty((*dgate_up.shape[:-1], gate_weight.shape[1]))


register(
    "linear_swiglu_fwd",
    f"{_WEIGHTS}, {_FLAGS}",
    "(Tensor, Tensor)",
    implementation=linear_swiglu_fwd_ref,
    fake=linear_swiglu_fwd_fake,
)
register(
    "linear_gated_bwd",
    f"Tensor dy, Tensor down_weight, Tensor gate_up, {_FLAGS}, bool wants_h",
    "(Tensor, Tensor)",
    implementation=linear_gated_bwd_ref,
    fake=_backward_fake,
)
register(
    "recomputed_gated_bwd",
    f"Tensor dy, {_WEIGHTS}, Tensor down_weight, {_FLAGS}, bool wants_h",
    "(Tensor, Tensor)",
    implementation=recomputed_gated_bwd_ref,
    fake=_recomputed_fake,
)


def rms_norm_again_ref(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, *flags: Any) -> Tensor:
    """dy is not read."""
    return rms_norm.rms_norm_ref(x, weight, eps, *flags)


register(
    "rms_norm_again",
    f"Tensor dy, Tensor x, Tensor? weight, float eps, {rms_norm.FLAGS}",
    "Tensor",
    implementation=lambda *args: rms_norm_again_ref(*args).contiguous(),
    fake=lambda dy, x, *_: x.new_empty(x.shape),
)
register(
    "linear_pair",
    "Tensor dgate_up, Tensor gate_weight, Tensor up_weight",
    "Tensor",
    implementation=linear_pair_ref,
    fake=_pair_fake,
)
