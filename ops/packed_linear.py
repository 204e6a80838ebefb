"""Linears that read one input as a single product.

    y_i = x @ weights[i]^T + biases[i]

Shapes: x [..., D]; weights [F_i, D]; biases [F_i] or None; y_i [..., F_i]; all of one dtype. With `sizes`, the F_i,
there is one weight [sum F_i, D] (and one bias, or None), packed already.
`inline` is the separate products where the weights are; `parts` and `default` concatenate those to [sum F_i, D]. The
results of `parts` are views of one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.composites import register_composite
from infuse.ops.norm_linear import check_linears

ARGUMENTS = "Tensor x, Tensor[] weights, Tensor?[] biases, int[] sizes=[]"


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    check_linears("packed_linear", x.shape[-1], weights, biases)
    if not sizes:
        return
    if len(weights) != 1:
        raise ValueError(f"infuse::packed_linear: got {len(weights)} weights with sizes, expected a packed one")
    checks.equal("packed_linear", "weight: size of dimension 0", weights[0].shape[0], sum(sizes))


def separate(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sequence[int] = ()
) -> list[Tensor]:
    """One product a weight."""
    if sizes:
        return packed_linear_ref(x, weights, biases, sizes)
    _check(x, weights, biases, sizes)
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]


def packed_linear_ref(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sequence[int] = ()
) -> list[Tensor]:
    """One product, taken apart."""
    _check(x, weights, biases, sizes)
    if sizes:
        return list(F.linear(x, weights[0], biases[0]).split(list(sizes), dim=-1))
    bias = None
    if any(item is not None for item in biases):
        whole = [w.new_zeros(w.shape[0]) if item is None else item for w, item in zip(weights, biases)]
        bias = torch.cat(whole)
    packed = F.linear(x, torch.cat(list(weights)), bias)
    return list(packed.split([weight.shape[0] for weight in weights], dim=-1))


register_composite(
    "packed_linear",
    ARGUMENTS,
    "Tensor[]",
    formula=packed_linear_ref,
    inline=separate,
    parts=packed_linear_ref,
)
