"""RMSNorm, with or without a residual add before it, the gate and up projections that read its result, and their
activation.

    sum = x + residual                       without residual: x
    h = linear_swiglu(rms_norm(sum), weights, biases, order)

Shapes: x, residual, sum [..., D]; norm_weight [D] or None; weights, biases and order as of infuse.ops.linear_swiglu;
h [..., F]. The norm rounds as infuse.ops.rms_norm does; its result and the projections share one dtype.
Results: [h], with a residual [h, sum].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse.ops import rms_norm, swiglu
from infuse.ops.add_rms_norm import add_rms_norm_ref
from infuse.ops.composites import register_composite
from infuse.ops.linear_swiglu import check, gate_and_up

NUM_NORM_FLAGS = rms_norm.FLAGS.count(",") + 1
ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] biases, str order, Tensor? norm_weight, float eps, "
    f"{rms_norm.FLAGS}, {swiglu.FLAGS}"
)


def _formula(
    norm: Callable[..., Tensor], add_norm: Callable[..., tuple[Tensor, Tensor]], activate: Callable[..., Tensor]
) -> Callable[..., list[Tensor]]:
    """The formula out of a norm, an add + norm and an activation."""

    def norm_linear_swiglu(
        x: Tensor,
        residual: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        order: str,
        norm_weight: Tensor | None,
        eps: float,
        *flags: Any,
    ) -> list[Tensor]:
        norm_flags, gate_flags = flags[:NUM_NORM_FLAGS], flags[NUM_NORM_FLAGS:]
        sums: list[Tensor] = []
        if residual is None:
            y = norm(x, norm_weight, eps, *norm_flags)
        else:
            y, total = add_norm(x, residual, norm_weight, eps, *norm_flags)
            sums = [total]
        check("norm_linear_swiglu", y, weights, biases, order)
        return [activate(*gate_and_up(y, weights, biases, order), *gate_flags), *sums]

    return norm_linear_swiglu


norm_linear_swiglu_ref = _formula(rms_norm.rms_norm_ref, add_rms_norm_ref, swiglu.swiglu_ref)
register_composite(
    "norm_linear_swiglu",
    ARGUMENTS,
    "Tensor[]",
    formula=norm_linear_swiglu_ref,
    inline=norm_linear_swiglu_ref,
    parts=_formula(torch.ops.infuse.rms_norm, torch.ops.infuse.add_rms_norm, torch.ops.infuse.swiglu),
)
