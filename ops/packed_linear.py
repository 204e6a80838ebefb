"""Linears that read one input as a single product.

    y_i = x @ weights[i]^T + biases[i]

Shapes: x [..., D]; weights [F_i, D]; biases [F_i] or None; y_i [..., F_i]; all of one dtype.
`inline` is the separate products; `parts` and `default` concatenate the weights to [sum F_i, D], which torch folds
away where they are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops.composites import register_composite
from infuse.ops.norm_linear import check_linears


def separate(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """One product a weight."""
    check_linears("packed_linear", x.shape[-1], weights, biases)
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]


def packed_linear_ref(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """One product, taken apart."""
    check_linears("packed_linear", x.shape[-1], weights, biases)
    bias = None
    if any(item is not None for item in biases):
        whole = [w.new_zeros(w.shape[0]) if item is None else item for w, item in zip(weights, biases)]
        bias = torch.cat(whole)
    packed = F.linear(x, torch.cat(list(weights)), bias)
    return list(packed.split([weight.shape[0] for weight in weights], dim=-1))


register_composite(
    "packed_linear",
    "Tensor x, Tensor[] weights, Tensor?[] biases",
    "Tensor[]",
    formula=packed_linear_ref,
    inline=separate,
    parts=packed_linear_ref,
)
