"""The gate and up projections of a mixture's experts, over rows that are sorted by expert, and their activation.

    out[r] = swiglu(x[r] @ gate_weight[e], x[r] @ up_weight[e])        offsets[e - 1] <= r < offsets[e]

Shapes: x [R, D]; offsets int32 [E], the ends of the groups of rows, not descending; weights as torch._grouped_mm takes
them, one packed [E, D, 2F] whose columns `order` tells apart as infuse.ops.linear_swiglu does rows, or gate and up
[E, D, F] each, views that are transposed included; out [R, F]. One dtype: bfloat16, float16 or float32. Without offsets
every group has C rows: x [E, C, D], out [E, C, F], as torch.bmm has them.
Rows from offsets[E - 1] on are left as they are, as torch._grouped_mm leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks
from infuse.ops.composites import register_composite
from infuse.ops.linear_swiglu import check_halves, check_order, halves
from infuse.ops.swiglu import FLAGS, swiglu_ref

ARGUMENTS = f"Tensor x, Tensor[] weights, Tensor? offsets, str order, {FLAGS}"


def check(x: Tensor, weights: Sequence[Tensor], offsets: Tensor | None, order: str) -> None:
    """Raises ValueError for shapes and orders, TypeError for dtypes that do not fit."""
    op = "grouped_linear_swiglu"
    check_order(op, len(weights), order)
    if offsets is None:
        checks.rank(op, "x", x, 3, "[E, C, D]")
    else:
        checks.rank(op, "x", x, 2, "[R, D]")
        checks.rank(op, "offsets", offsets, 1, "[E]")
        if offsets.dtype != torch.int32:
            raise TypeError(f"infuse::{op}: offsets: got dtype {offsets.dtype}, expected torch.int32")
    groups = x.shape[0] if offsets is None else offsets.shape[0]
    for weight in weights:
        checks.rank(op, "weight", weight, 3, "[E, D, F]")
        checks.equal(op, "weight: size of dimension 0", weight.shape[0], groups)
        checks.equal(op, "weight: size of dimension 1", weight.shape[1], x.shape[-1])
        checks.same_dtype(op, x=x, weight=weight)
    check_halves(op, "weights", weights, 2)


def _formula(swiglu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def grouped_linear_swiglu(
        x: Tensor, weights: Sequence[Tensor], offsets: Tensor | None, order: str, *flags: Any
    ) -> Tensor:
        check(x, weights, offsets, order)
        if offsets is None:
            products = [torch.bmm(x, weight) for weight in weights]
        else:
            products = [torch._grouped_mm(x, weight, offs=offsets) for weight in weights]
        gate, up = products if len(products) == 2 else halves(products[0], order)
        return swiglu(gate, up, *flags)

    return grouped_linear_swiglu


grouped_linear_swiglu_ref = _formula(swiglu_ref)
register_composite(
    "grouped_linear_swiglu",
    ARGUMENTS,
    "Tensor",
    formula=grouped_linear_swiglu_ref,
    inline=grouped_linear_swiglu_ref,
    parts=_formula(torch.ops.infuse.swiglu),
)
