"""What the elements are of tensors that are made of positions and numbers, or put together of others.

Each maker gives the element of a node at `indices`, or None if it is not known; `element` stands for the unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from infuse.patterns import mask_views
from infuse.patterns.index_algebra import Coordinate, Element, Linear, all_of, at_most, is_zero, of
from infuse.patterns.mask_values import (
    INDEX_DTYPES,
    Leaf,
    Value,
    as_formula,
    calculate,
    cast,
    choose,
    combine,
    constant,
    literal,
    parts_of,
    spread,
    unknown,
)
from infuse.patterns.mask_views import Indices, linear
from infuse.patterns.readings import Call

if TYPE_CHECKING:
    from infuse.patterns.mask_reader import MaskReader


def triangle(name: str, value: Value, indices: Indices, diagonal: Linear, dtype: torch.dtype) -> Value | None:
    """tril keeps column - row <= diagonal, triu column - row >= diagonal; zeros elsewhere."""
    if len(indices) < 2:
        return None
    beyond = indices[-1] - indices[-2] - diagonal
    kept = at_most(beyond) if name == "tril" else at_most(-beyond)
    return choose(kept, value, _zero(dtype))


def _zero(dtype: torch.dtype) -> Leaf:
    return literal(False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0)


def _make_full(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    names = {"zeros": 0, "ones": 1}
    value = reader.operand(node, names.get(call.name, call["fill_value"]), indices)
    dtype = reader.view.dtype(node)
    return None if value is None or dtype is None else cast(value, dtype, element)


def _make_arange(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    numbers = [call[name] for name in ("first", "second", "third") if name in call.args]
    start, step = (numbers[0] if len(numbers) > 1 else call["start"]), (numbers[2:] or [call["step"]])[0]
    first = mask_views.integer(reader.view, 0 if start is None else start)
    pace = 1 if step is None else step
    if first is None or type(pace) is not int or reader.view.dtype(node) not in INDEX_DTYPES:
        return None
    return first + indices[0] * pace


def _make_eye(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    dtype = reader.view.dtype(node)
    return None if dtype is None else cast(is_zero(indices[0] - indices[1]), dtype, element)


def _cut_triangle(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    value, dtype = reader.operand(node, call["input"], indices), reader.view.dtype(node)
    diagonal = mask_views.integer(reader.view, call["diagonal"] or 0)
    if value is None or diagonal is None or dtype is None:
        return None
    return triangle(call.name, value, indices, diagonal, dtype)


def _select_where(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    condition = reader.operand(node, call["condition"], indices)
    values = [reader.operand(node, call[name], indices) for name in ("input", "other")]
    dtype = reader.view.dtype(node)
    if condition is None or None in values or dtype is None:
        return None
    then, otherwise = (cast(value, dtype, element) for value in values if value is not None)
    return choose(as_formula(condition), then, otherwise)


def _fill_masked(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    names = ("mask", "value", "input")
    mask, value, before = (reader.operand(node, call[name], indices) for name in names)
    dtype = reader.view.dtype(node)
    if mask is None or value is None or before is None or dtype is None:
        return None
    return choose(as_formula(mask), cast(value, dtype, element), before)


def _convert(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    value, dtype = reader.operand(node, call["input"], indices), reader.view.dtype(node)
    return None if value is None or dtype is None else cast(value, dtype, element)


def _accumulate(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    """The running sum of what is the same everywhere along the dimension."""
    dims, source = call["dim"], call["input"]
    tensor, dtype = reader.view.tensor(source), reader.view.dtype(node)
    if tensor is None or dtype not in INDEX_DTYPES or len(dims) != 1 or not indices:
        return None
    size = linear(tensor.shape[dims[0]])
    assert size is not None
    along = Coordinate(f"along {node.name}", size)
    value = reader.value(source, (*indices[: dims[0]], of(along), *indices[dims[0] + 1 :]), reader.view.index[node])
    if along in parts_of(value):
        return None

    def times(leaf: Leaf) -> Value:
        number = constant(leaf)
        whole = isinstance(number, int)
        return (indices[dims[0]] + 1) * int(number) if whole else unknown(element, dtype)  # type: ignore[arg-type]

    return combine(times, spread(value))


def _differ(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    """x[i] - x[i - 1], the first with what was prepended."""
    view, source, first, dtype = reader.view, call["input"], call["prepend"], reader.view.dtype(node)
    dim = -1 if call["dim"] is None else call["dim"]
    if call["n"] not in (None, 1) or call["append"] is not None or type(dim) is not int or dtype not in INDEX_DTYPES:
        return None
    if view.dtype(source) != dtype or (first is not None and view.dtype(first) != dtype):
        return None
    dim %= len(indices)

    def at(tensor: Node, place: Linear) -> Value:
        return reader.value(tensor, (*indices[:dim], place, *indices[dim + 1 :]), view.index[node])

    place = indices[dim]
    if first is None:
        now, previous = at(source, place + 1), at(source, place)
    elif linear(view.shape(first)[dim]) == Linear(constant=1):
        now, previous = at(source, place), choose(at_most(place), at(first, Linear()), at(source, place - 1))
    else:
        return None
    return combine(lambda a, b: calculate("sub", a, b, dtype) or unknown(element, dtype), now, previous)


def _pad(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    view, source, dtype = reader.view, call["input"], reader.view.dtype(node)
    fill = reader.operand(node, 0 if call["value"] is None else call["value"], indices)
    widths, shape = call["pad"], view.shape(source)
    if call["mode"] not in (None, "constant") or fill is None or dtype is None or not isinstance(widths, (tuple, list)):
        return None
    own, inside = list(indices), []
    for place in range(len(widths) // 2):
        left, size = mask_views.integer(view, widths[2 * place]), linear(shape[-1 - place])
        if left is None or size is None:
            return None
        own[-1 - place] = indices[-1 - place] - left
        inside += [at_most(-own[-1 - place]), at_most(own[-1 - place] - size + 1)]
    return choose(all_of(inside), reader.value(source, tuple(own), view.index[node]), cast(fill, dtype, element))


def _join(reader: MaskReader, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
    """cat: each piece reads at its own place, which is right wherever that piece is chosen."""
    view, pieces, dtype = reader.view, call["tensors"], reader.view.dtype(node)
    dim = call["dim"] or 0
    if not isinstance(pieces, (tuple, list)) or len(pieces) > 8 or type(dim) is not int or dtype is None:
        return None
    dim %= len(indices)
    place, choices = indices[dim], []
    for piece in pieces:
        shape = view.shape(piece)
        size = linear(shape[dim]) if len(shape) == len(indices) else None
        if size is None or view.dtype(piece) != dtype:
            return None
        own = (*indices[:dim], Linear() if size == Linear(constant=1) else place, *indices[dim + 1 :])
        choices.append((at_most(place - size + 1), reader.value(piece, own, view.index[node])))
        place = place - size
    result = choices.pop()[1]
    for condition, value in reversed(choices):
        result = choose(condition, value, result)
    return result


_Maker = Callable[["MaskReader", Node, Call, Indices, Element], Value | None]
MAKERS: dict[str, _Maker] = {
    "full": _make_full,
    "tensor": _make_full,
    "zeros": _make_full,
    "ones": _make_full,
    "arange": _make_arange,
    "eye": _make_eye,
    "tril": _cut_triangle,
    "triu": _cut_triangle,
    "where": _select_where,
    "masked_fill": _fill_masked,
    "cast": _convert,
    "convert": _convert,
    "cumsum": _accumulate,
    "diff": _differ,
    "pad": _pad,
    "cat": _join,
}
