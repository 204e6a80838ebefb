"""What an element of a mask is that is still to be made of nodes: a `Make` of sums, choices and views of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.index_algebra import Element, all_of, negated
from infuse.patterns.mask_reader import MaskReader
from infuse.patterns.mask_values import (
    Leaf,
    Value,
    as_formula,
    cast,
    choose,
    combine,
    constant,
    literal,
    spread,
    unknown,
)
from infuse.patterns.mask_views import Indices, aligned, linear, permuted
from infuse.patterns.sites import Make
from infuse.patterns.sizes import Size

Typed = tuple[Value, torch.dtype | None]
"""A value and its dtype; None for a number."""


def made_value(reader: MaskReader, mask: object, shape: Sequence[Size], indices: Indices, time: int) -> Typed | None:
    """The element at `indices` of a mask that is broadcast to `shape`; None if it is not known how it is made."""
    if isinstance(mask, Node):
        return _of_node(reader, mask, shape, indices, time)
    if isinstance(mask, (bool, int, float)):
        return literal(mask), None
    if not isinstance(mask, Make):
        return None
    moved = _behind_view(mask, shape, indices)
    if moved is not None:
        return made_value(reader, mask.args[0], *moved, time)
    if mask.target is torch.ops.aten.to.dtype:
        found, dtype = made_value(reader, mask.args[0], shape, indices, time), mask.args[1]
        assert isinstance(dtype, torch.dtype)
        return None if found is None else (cast(found[0], dtype, Element(mask, indices)), dtype)
    if mask.target not in _POINTWISE:
        return None
    operands = [made_value(reader, operand, shape, indices, time) for operand in mask.args]
    known = [operand for operand in operands if operand is not None]
    return _POINTWISE[mask.target](mask, known, indices) if len(known) == len(operands) else None


def _of_node(reader: MaskReader, node: Node, shape: Sequence[Size], indices: Indices, time: int) -> Typed | None:
    tensor = reader.view.tensor(node)
    if tensor is None:
        number = linear(reader.view.value(node))
        return None if number is None else (number, None)
    own = aligned(tuple(tensor.shape), shape, indices)
    return None if own is None else (reader.value(node, own, time), tensor.dtype)


def _behind_view(mask: Make, shape: Sequence[Size], indices: Indices) -> tuple[Sequence[Size], Indices] | None:
    """The shape and the indices behind an added, removed or moved dimension."""
    if mask.target is torch.unsqueeze and type(mask.args[1]) is int and mask.args[1] >= 0:
        dim = mask.args[1]
        return [*shape[:dim], *shape[dim + 1 :]], (*indices[:dim], *indices[dim + 1 :])
    if mask.target is torch.permute and isinstance(mask.args[1], tuple):
        order: Any = mask.args[1]
        sizes = list(shape)
        for place, dim in enumerate(order):
            sizes[dim] = shape[place]
        return sizes, permuted(order, indices)
    if mask.target is torch.reshape and mask.args[1] == (1, -1):
        return shape[-1:], indices[-1:]
    return None


def _dtype(operands: Sequence[Typed]) -> torch.dtype:
    """What tensors promote to; numbers beside them do not count, and alone are of the default dtype."""
    dtypes = [dtype for _, dtype in operands if dtype is not None]
    total = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        total = torch.promote_types(total, dtype)
    return total


def _where(mask: Make, operands: Sequence[Typed], indices: Indices) -> Typed:
    dtype, element = _dtype(operands[1:]), Element(mask, indices)
    condition, then, otherwise = (value for value, _ in operands)
    return choose(as_formula(condition), cast(then, dtype, element), cast(otherwise, dtype, element)), dtype


def _arithmetic(mask: Make, operands: Sequence[Typed], indices: Indices) -> Typed:
    dtype = _dtype(operands)

    def result(*leaves: Leaf) -> Value:
        numbers = [constant(leaf) for leaf in leaves]
        if None in numbers or not dtype.is_floating_point:
            return unknown(Element(mask, indices), dtype)
        with metadata.real():
            exact = mask.target(*(torch.tensor(number, dtype=torch.float64, device="cpu") for number in numbers))
            return literal(exact.to(dtype).item())

    return combine(result, *(spread(value) for value, _ in operands)), dtype


def _logical_and(mask: Make, operands: Sequence[Typed], indices: Indices) -> Typed:
    return all_of(as_formula(value) for value, _ in operands), torch.bool


def _logical_not(mask: Make, operands: Sequence[Typed], indices: Indices) -> Typed:
    return negated(as_formula(operands[0][0])), torch.bool


_POINTWISE: dict[Callable[..., Any], Callable[[Make, Sequence[Typed], Indices], Typed]] = {
    torch.add: _arithmetic,
    torch.mul: _arithmetic,
    torch.where: _where,
    torch.logical_and: _logical_and,
    torch.logical_not: _logical_not,
}
