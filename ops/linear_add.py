"""A linear whose result is added to a residual.

    y = residual + (x @ weight^T + bias)

Shapes: x [..., D]; weight [F, D]; bias [F] or None; residual, y [..., F]; one dtype. The product is rounded to it
before it is added.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.composites import register_composite
from infuse.ops.norm_linear import check_linears

ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor residual"


def linear_add_ref(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The formula in plain torch."""
    check_linears("linear_add", x.shape[-1], [weight], [bias])
    checks.same_dtype("linear_add", x=x, weight=weight, residual=residual)
    product = F.linear(x, weight, bias)
    checks.same_shape("linear_add", product=product, residual=residual)
    return residual + product


# A sum is a sum: there are no smaller operators that are kept.
register_composite(
    "linear_add", ARGUMENTS, "Tensor", formula=linear_add_ref, inline=linear_add_ref, parts=linear_add_ref
)
