"""The activation of a gated MLP and its down projection.

    y = swiglu(gate, up) @ weight^T + bias

Shapes: gate, up [..., F]; weight [D, F]; bias [D] or None; y [..., D]; all of one dtype. The activation, its limit and
its rounding are those of infuse.ops.swiglu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops.composites import register_composite
from infuse.ops.norm_linear import check_linears
from infuse.ops.swiglu import FLAGS, swiglu_ref

ARGUMENTS = f"Tensor gate, Tensor up, Tensor weight, Tensor? bias, {FLAGS}"


def _formula(swiglu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, *flags: Any) -> Tensor:
        check_linears("swiglu_linear", gate.shape[-1], [weight], [bias])
        return F.linear(swiglu(gate, up, *flags), weight, bias)

    return swiglu_linear


swiglu_linear_ref = _formula(swiglu_ref)
register_composite(
    "swiglu_linear",
    ARGUMENTS,
    "Tensor",
    formula=swiglu_linear_ref,
    inline=swiglu_linear_ref,
    parts=_formula(torch.ops.infuse.swiglu),
)
