"""Writes in place that are understood: what an element is after the write, given what it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from infuse.patterns import mask_views
from infuse.patterns.index_algebra import Formula, all_of, any_of, is_zero
from infuse.patterns.mask_makers import triangle
from infuse.patterns.mask_values import FORMULAS, Value, as_formula, choose
from infuse.patterns.mask_views import Indices

if TYPE_CHECKING:
    from infuse.patterns.mask_reader import MaskReader


def written(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    """The element at `indices` of the tensor that `node` writes to, not yet in the tensor's dtype."""
    write = _WRITES.get(_name(node))
    return None if write is None else write(reader, node, before, indices)


def original(node: Node) -> Node:
    """The tensor that a chain of writes in place, each of which returns it, began with."""
    while _name(node) in _WRITES and _name(node) != "setitem" and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _name(node: Node) -> str:
    """A target's name without overload; "" for what is not torch's or Python's own."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
        return ""
    own = (getattr(node.target, "__module__", None) or "torch").split(".")[0] in ("torch", "_operator", "operator")
    return str(getattr(node.target, "__name__", "")).partition(".")[0] if own else ""


def _argument(node: Node, place: int, name: str, default: object = None) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _fill(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    return reader.operand(node, 0.0 if _name(node) == "zero_" else _argument(node, 1, "value"), indices)


def _masked_fill(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    mask = reader.operand(node, _argument(node, 1, "mask"), indices)
    value = reader.operand(node, _argument(node, 2, "value"), indices)
    return None if mask is None or value is None else choose(as_formula(mask), value, before)


def _keep_triangle(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    dtype = reader.view.dtype(node)
    diagonal = mask_views.integer(reader.view, _argument(node, 1, "diagonal", 0))
    return None if diagonal is None or dtype is None else triangle(_name(node)[:4], before, indices, diagonal, dtype)


def _fill_diagonal(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    value = reader.operand(node, _argument(node, 1, "fill_value"), indices)
    if value is None or len(indices) != 2 or _argument(node, 2, "wrap", False):
        return None
    return choose(is_zero(indices[0] - indices[1]), value, before)


def _set_item(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    target, index, value = node.args
    mask = reader.view.tensor(index)
    if isinstance(value, Node) and (tensor := reader.view.tensor(value)) is not None:
        new: Value | None = reader.value(value, (), reader.view.index[node]) if tensor.dim() == 0 else None
    else:
        new = reader.operand(node, value, indices)
    covered: Formula | None
    if mask is not None and isinstance(index, Node):
        same = mask.dtype == torch.bool and mask.dim() == len(indices)
        covered = as_formula(reader.value(index, indices, reader.view.index[node])) if same else None
    else:
        covered = mask_views.covered(reader.view, target, index, indices)
    return None if covered is None or new is None else choose(covered, new, before)


def _combine_truth(reader: MaskReader, node: Node, before: Value, indices: Indices) -> Value | None:
    other = reader.operand(node, _argument(node, 1, "other"), indices)
    if other is None or reader.view.dtype(node.args[0]) != torch.bool or not isinstance(other, FORMULAS):
        return None
    both = [as_formula(before), other]
    return all_of(both) if "and" in _name(node) else any_of(both)


_WRITES: dict[str, Callable[[MaskReader, Node, Value, Indices], Value | None]] = {
    "fill_": _fill,
    "zero_": _fill,
    "masked_fill_": _masked_fill,
    "tril_": _keep_triangle,
    "triu_": _keep_triangle,
    "fill_diagonal_": _fill_diagonal,
    "setitem": _set_item,
    **dict.fromkeys(("iand", "__iand__", "ior", "__ior__", "logical_and_", "logical_or_"), _combine_truth),
}
