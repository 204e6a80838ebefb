"""The gate and up projections of a gated MLP and its activation.

    out = swiglu(x @ gate_weight^T + gate_bias, x @ up_weight^T + up_bias)

The two projections come as two weights [F, D], gate and up (order "gate_up"), or as one packed weight [2F, D], whose
rows `order` tells apart:

    gate_up                rows 0 to F are the gate's, the rest the up projection's
    up_gate                the other way round
    interleaved            even rows are the gate's
    interleaved_up_first   odd rows are the gate's

Shapes: x [..., D]; biases as the weights, [F] each or [2F], or None; out [..., F]; one dtype. Products are rounded to
it before the activation, which rounds as in infuse.ops.swiglu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.composites import register_composite
from infuse.ops.norm_linear import check_linears
from infuse.ops.swiglu import FLAGS, swiglu_ref

ORDERS = ("gate_up", "up_gate", "interleaved", "interleaved_up_first")
ARGUMENTS = f"Tensor x, Tensor[] weights, Tensor?[] biases, str order, {FLAGS}"


def check_order(op: str, num_weights: int, order: str) -> None:
    """Raises ValueError unless there are two weights in order gate, up, or a packed one in an order that is known."""
    if num_weights not in (1, 2):
        raise ValueError(f"infuse::{op}: weights: got {num_weights}, expected gate and up, or one packed")
    if order not in ORDERS:
        raise ValueError(f"infuse::{op}: order: got {order!r}, expected one of {list(ORDERS)}")
    if num_weights == 2 and order != "gate_up":
        raise ValueError(f"infuse::{op}: order: got {order!r}, expected 'gate_up' for two weights")


def check_halves(op: str, what: str, weights: Sequence[Tensor], dim: int) -> None:
    """Raises ValueError unless gate and up have one shape, or the packed tensor an even size along `dim`."""
    if len(weights) == 2:
        checks.same_shape(op, gate=weights[0], up=weights[1])
        return
    size = weights[0].shape[dim]
    if isinstance(size, int) and size % 2:
        raise ValueError(f"infuse::{op}: {what}: got {size} packed rows, expected an even number")


def check(
    op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, *others: Tensor
) -> None:
    """Raises ValueError for shapes and orders, TypeError for dtypes that do not fit. others: tensors of x's dtype."""
    check_order(op, len(weights), order)
    check_linears(op, x.shape[-1], weights, biases)
    check_halves(op, "weights", weights, 0)
    checks.floating(op, "x", x)
    for tensor in (*weights, *(bias for bias in biases if bias is not None), *others):
        checks.same_dtype(op, x=x, weight=tensor)


def halves(packed: Tensor, order: str, dim: int = -1) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of a tensor that holds both along a dimension."""
    if order.startswith("interleaved"):
        steps = packed.unflatten(dim, (packed.shape[dim] // 2, 2))
        first, second = steps.unbind(dim if dim < 0 else dim + 1)
    else:
        first, second = packed.chunk(2, dim)
    return (first, second) if order in ("gate_up", "interleaved") else (second, first)


def joined(gate: Tensor, up: Tensor, order: str, dim: int) -> Tensor:
    """The packed tensor of which `halves` makes gate and up."""
    first, second = (gate, up) if order in ("gate_up", "interleaved") else (up, gate)
    if order.startswith("interleaved"):
        dim %= gate.dim()
        return torch.stack((first, second), dim + 1).flatten(dim, dim + 1)
    return torch.cat((first, second), dim)


def split_gate_up(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(gate's weight, up's weight, gate's bias, up's bias), each [F, D] or [F]: views of what is packed."""
    if len(weights) == 2:
        return weights[0], weights[1], biases[0], biases[1]
    gate_bias, up_bias = (None, None) if biases[0] is None else halves(biases[0], order, 0)
    return *halves(weights[0], order, 0), gate_bias, up_bias


def gate_and_up(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str
) -> tuple[Tensor, Tensor]:
    """The two projections [..., F] as the author has them: two products, or views of a packed one."""
    products = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    return (products[0], products[1]) if len(products) == 2 else halves(products[0], order)


def formula_with(swiglu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula out of an activation."""

    def linear_swiglu(
        x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, *flags: Any
    ) -> Tensor:
        check("linear_swiglu", x, weights, biases, order)
        return swiglu(*gate_and_up(x, weights, biases, order), *flags)

    return linear_swiglu


linear_swiglu_ref = formula_with(swiglu_ref)
register_composite(
    "linear_swiglu",
    ARGUMENTS,
    "Tensor",
    formula=linear_swiglu_ref,
    inline=linear_swiglu_ref,
    parts=formula_with(torch.ops.infuse.swiglu),
)
