"""RMSNorm, with or without a residual add before it, and the linears that read its result.

    sum = x + residual                       without residual: x
    y_i = rms_norm(sum) @ weights[i]^T + biases[i]

Shapes: x, residual, sum [..., D]; weights [F_i, D]; biases [F_i] or None; norm_weight [D] or None; y_i [..., F_i].
The norm rounds as infuse.ops.rms_norm does; its result and the linears share one dtype.
Results: [y_0, y_1, ...], with a residual followed by the sum. in_float32: each y_i of half precision is
widened, after it was rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.add_rms_norm import add_rms_norm_ref
from infuse.ops.composites import register_composite
from infuse.ops.rms_norm import FLAGS, rms_norm_ref

ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] biases, Tensor? norm_weight, float eps, "
    f"{FLAGS}, bool in_float32=False"
)


def check_linears(
    op: str, size: int | torch.SymInt, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """Raises ValueError unless there are weights [F_i, size], each with a bias [F_i] or None."""
    if not weights or len(weights) != len(biases):
        raise ValueError(f"infuse::{op}: got {len(weights)} weights and {len(biases)} biases, expected as many, not 0")
    for weight, bias in zip(weights, biases):
        checks.rank(op, "weight", weight, 2, "[F, D]")
        checks.equal(op, "weight: size of dimension 1", weight.shape[1], size)
        if bias is not None:
            checks.rank(op, "bias", bias, 1, "[F]")
            checks.equal(op, "bias: size", bias.shape[0], weight.shape[0])


def _formula(
    norm: Callable[..., Tensor], add_norm: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., list[Tensor]]:
    """The formula out of a norm and an add + norm."""

    def norm_linear(
        x: Tensor,
        residual: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm_weight: Tensor | None,
        eps: float,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
        eps_as_minimum: bool = False,
        in_float32: bool = False,
    ) -> list[Tensor]:
        flags = (weight_offset, cast_before_weight, eps_as_minimum)
        check_linears("norm_linear", x.shape[-1], weights, biases)
        sums: list[Tensor] = []
        if residual is None:
            y = norm(x, norm_weight, eps, *flags)
        else:
            y, total = add_norm(x, residual, norm_weight, eps, *flags)
            sums = [total]
        products = [F.linear(y, weight, bias) for weight, bias in zip(weights, biases)]
        if in_float32:
            products = [product.to(torch.promote_types(product.dtype, torch.float32)) for product in products]
        return [*products, *sums]

    return norm_linear


norm_linear_ref = _formula(rms_norm_ref, add_rms_norm_ref)
register_composite(
    "norm_linear",
    ARGUMENTS,
    "Tensor[]",
    formula=norm_linear_ref,
    inline=norm_linear_ref,
    parts=_formula(torch.ops.infuse.rms_norm, torch.ops.infuse.add_rms_norm),
)
