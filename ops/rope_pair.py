"""The rotations of q and k in one launch: what a graph's two rotations by the same angles become when it is lowered.

    y = rope(rms_norm(x)), other_y = rope(rms_norm(other))         eps None: without the norms

Shapes: x, other, their results, cos, sin, weights as in infuse.ops.qk_norm_rope. is_backward: the transpose of the
rotation, which is its gradient; without norms. No model is written in it: infuse.lowering.rotary_pairs puts it there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops import library, rope_kernels
from infuse.ops.qk_norm_rope import qk_norm_rope_ref
from infuse.ops.registration import implement, register
from infuse.ops.rope import FLAGS, rope_bwd_ref, rope_ref

ARGUMENTS = (
    "Tensor x, Tensor other, Tensor cos, Tensor sin, Tensor? weight, Tensor? other_weight, float? eps, "
    f"float weight_offset, bool cast_before_weight, {FLAGS.replace('=False', '')}, bool is_backward, int config"
)


def rope_pair_ref(
    x: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    other_weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    cast_before_weight: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch. rest: the flags of rope, is_backward, config."""
    *flags, is_backward, _ = rest

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        if eps is not None:
            return qk_norm_rope_ref(
                x, cos, sin, weight, None, eps, False, weight_offset, cast_before_weight, False, *flags
            )
        return (rope_bwd_ref if is_backward else rope_ref)(x, cos, sin, *flags)

    return one(x, weight), one(other, other_weight)


def can_run(
    x: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    other_weight: Tensor | None,
    eps: object,
    weight_offset: object,
    cast_before_weight: bool,
    *rest: Any,
) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can. Reads shapes, strides and dtypes only."""
    if not isinstance(eps, (float, type(None))) or not isinstance(weight_offset, (int, float)):
        return "eps is symbolic"
    if x.shape[-1] != other.shape[-1]:
        return f"no kernel for rows of {x.shape[-1]} and {other.shape[-1]} elements"
    if (weight is None) != (other_weight is None):
        return "no kernel for a weight of q or k alone"
    if weight is not None and other_weight is not None and weight.dtype != other_weight.dtype:
        return "no kernel for q's and k's weights in different dtypes"
    for one, its_weight in ((x, weight), (other, other_weight)):
        reason = rope_kernels.can_rotate(one, cos, sin) or rope_kernels.can_normalise(
            one, its_weight, cast_before_weight
        )
        if reason:
            return reason
    return ""


def rope_pair_fake(x: Tensor, other: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(other)


def _implementation(x: Tensor, other: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    first, second = rope_pair_ref(x, other, *rest)
    return torch.empty_like(x).copy_(first), torch.empty_like(other).copy_(second)


def _cuda(x: Tensor, other: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if library.missing(x.device) or can_run(x, other, *rest):
        return _implementation(x, other, *rest)
    y, other_y = rope_pair_fake(x, other)
    torch.ops.infuse.rope_out(x, other, *rest, y, other_y)
    return y, other_y


register("rope_pair", ARGUMENTS, "(Tensor, Tensor)", implementation=_implementation, fake=rope_pair_fake)
implement("rope_pair", _cuda, "CUDA")
