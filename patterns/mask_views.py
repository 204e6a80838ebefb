"""Where an element of a view, a slice or a gather comes from: the indices into the input, as expressions.

Each function takes the indices of an element of the result and gives those of the input; None if they are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.index_algebra import Formula, Linear, Symbol, all_of, at_most, is_zero, lowest, of
from infuse.patterns.readings import Call
from infuse.patterns.sizes import Size, same_size

Indices = tuple[Linear, ...]
Pull = Callable[[Node, Indices], object]
"""(integer tensor, indices) -> the element there, as a value."""


def linear(value: object) -> Linear | None:
    """A plain or symbolic integer as an expression."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Linear(constant=value)
    if not isinstance(value, torch.SymInt):
        return None
    known = value.node.maybe_as_int()
    return Linear(constant=known) if known is not None else _symbolic(value)


def _symbolic(value: torch.SymInt) -> Linear:
    node = value.node
    result = Linear()
    coefficients = node.expr.expand().as_coefficients_dict()
    if not all(factor.is_Integer for factor in coefficients.values()):
        return of(_symbol(node.expr, node.shape_env))
    for expression, factor in coefficients.items():
        if expression.is_Integer:
            result += int(expression * factor)
        else:
            result += of(_symbol(expression, node.shape_env)) * int(factor)
    return result


def _symbol(expression: Any, shape_env: Any) -> Symbol:
    bounds = shape_env.bound_sympy(expression)
    low, high = (int(end) if end.is_Integer else None for end in (bounds.lower, bounds.upper))
    return Symbol(expression, low, high)


def integer(view: CanonicalGraph, value: object) -> Linear | None:
    """An integer argument: a number, or a node of one."""
    return linear(view.value(value) if isinstance(value, Node) else value)


def not_negative(view: CanonicalGraph, value: object) -> bool:
    """Whether an integer argument is proven to be 0 or more."""
    example = view.value(value) if isinstance(value, Node) else value
    if isinstance(example, torch.SymInt):
        return bool(statically_known_true(example >= 0))
    return isinstance(example, int) and example >= 0


def aligned(shape: Sequence[Size], target: Sequence[Size], indices: Indices) -> Indices | None:
    """The indices into a tensor that is broadcast to `target`."""
    if len(shape) > len(target):
        return None
    lead = len(target) - len(shape)
    result = []
    for size, whole, index in zip(shape, target[lead:], indices[lead:]):
        if same_size(size, 1):
            index = Linear()
        elif not same_size(size, whole):
            return None
        result.append(index)
    return tuple(result)


def permuted(dims: Sequence[int], indices: Indices) -> Indices:
    """The indices behind a permute."""
    result = list(indices)
    for place, dim in enumerate(dims):
        result[dim] = indices[place]
    return tuple(result)


def reshaped(before: Sequence[Size], after: Sequence[Size], indices: Indices) -> Indices | None:
    """The indices behind a reshape that adds and removes dimensions of size 1 only."""
    kept = [(size, index) for size, index in zip(after, indices) if not same_size(size, 1)]
    result = []
    for size in before:
        if same_size(size, 1):
            result.append(Linear())
        elif kept and same_size(kept[0][0], size):
            result.append(kept.pop(0)[1])
        else:
            return None
    return None if kept else tuple(result)


def sliced(view: CanonicalGraph, call: Call, indices: Indices) -> Indices | None:
    """The indices behind narrow and ATen's slice."""
    shape, dim = view.shape(call["input"]), call["dim"] or 0
    if type(dim) is not int or not -len(shape) <= dim < len(shape):
        return None
    start = _start(view, call["start"], shape[dim % len(shape)])
    step = 1 if call["step"] is None else call["step"]
    if start is None or type(step) is not int or step < 1:
        return None
    result = list(indices)
    result[dim % len(shape)] = indices[dim % len(shape)] * step + start
    return tuple(result)


def _start(view: CanonicalGraph, start: object, size: Size) -> Linear | None:
    """Where a slice begins, counted from the front."""
    if start is None:
        return Linear()
    first, whole = integer(view, start), linear(size)
    if first is None or whole is None or not_negative(view, start):
        return first
    if type(start) is not int:
        return None
    if not whole.terms:
        return Linear(constant=max(whole.constant + start, 0))
    low = lowest(whole + start)
    return whole + start if low is not None and low >= 0 else None


def selected(view: CanonicalGraph, call: Call, indices: Indices) -> Indices | None:
    """The indices behind select."""
    (dim,) = call["dim"]
    place = _start(view, call["index"], view.shape(call["input"])[dim])
    return None if place is None else (*indices[:dim], place, *indices[dim:])


def items_of(view: CanonicalGraph, node: object, index: object) -> list[Any] | None:
    """An index as one item for each dimension of the tensor, and None for each new one."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(item, (bool, list, tuple)) for item in items):
        return None
    missing = len(view.shape(node)) - sum(item is not None and item is not Ellipsis for item in items)
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    if missing < 0 or len(places) > 1:
        return None
    place = places[0] if places else len(items)
    return [*items[:place], *[slice(None)] * missing, *items[place + len(places) :]]


def indexed(view: CanonicalGraph, node: Node, call: Call, indices: Indices, pull: Pull) -> Indices | None:
    """The indices behind x[...] with slices, integers, None and integer tensors."""
    source, shape = call["input"], view.shape(call["input"])
    items = items_of(view, source, call["index"])
    if items is None:
        return None
    tensors = [view.tensor(item) for item in items]
    if any(tensor is not None and (tensor.dim() == 0 or tensor.dtype not in _INDEX) for tensor in tensors):
        return None
    gathered = [tensor for tensor in tensors if tensor is not None]
    rank = max((tensor.dim() for tensor in gathered), default=0)
    place = _gathered_at(view, items)
    picked, rest = indices[place : place + rank], [*indices[:place], *indices[place + rank :]]
    target = view.shape(node)[place : place + rank]
    result: list[Linear] = []
    for item, tensor in zip(items, tensors):
        if item is None:
            rest.pop(0)
            continue
        size = shape[len(result)]
        if tensor is not None:
            found = _looked_up(item, tensor, target, picked, pull)
        elif isinstance(item, slice):
            found = _stepped(view, item, size, rest.pop(0))
        else:
            found = _start(view, item, size)
        if found is None:
            return None
        result.append(found)
    return tuple(result)


_INDEX = (torch.int64, torch.int32)


def _gathered_at(view: CanonicalGraph, items: list[Any]) -> int:
    """Which dimension of the result those of the index tensors start at: where they stand if together, else 0.

    torch takes integers out first, so that they do not count.
    """
    kept = [item for item in items if not _is_integer(view, item)]
    places = [place for place, item in enumerate(kept) if view.tensor(item) is not None]
    if not places or places[-1] - places[0] + 1 != len(places):
        return 0
    return places[0]


def _is_integer(view: CanonicalGraph, item: object) -> bool:
    return integer(view, item) is not None


def _looked_up(item: Node, tensor: Tensor, target: Sequence[Size], picked: Indices, pull: Pull) -> Linear | None:
    """The element of an index tensor; a negative one would count from the end."""
    own = aligned(tuple(tensor.shape), target, picked)
    found = None if own is None else pull(item, own)
    low = lowest(found) if isinstance(found, Linear) else None
    return found if isinstance(found, Linear) and low is not None and low >= 0 else None


def _stepped(view: CanonicalGraph, item: slice, size: Size, index: Linear) -> Linear | None:
    start, step = _start(view, item.start, size), 1 if item.step is None else item.step
    if start is None or type(step) is not int or step < 1:
        return None
    return index * step + start


def covered(view: CanonicalGraph, node: object, index: object, indices: Indices) -> Formula | None:
    """Whether x[index] = ... writes to the element at `indices`; index: slices of step 1 and integers."""
    items, shape = items_of(view, node, index), view.shape(node)
    if items is None or any(item is None or view.tensor(item) is not None for item in items):
        return None
    conditions: list[Formula] = []
    for item, size, own in zip(items, shape, indices):
        if not isinstance(item, slice):
            place = _start(view, item, size)
            if place is None:
                return None
            conditions.append(is_zero(own - place))
        elif item != slice(None):
            ends = [_start(view, item.start, size), _start(view, size if item.stop is None else item.stop, size)]
            if None in ends or item.step not in (None, 1):
                return None
            first, last = (end for end in ends if end is not None)
            conditions += [at_most(first - own), at_most(own - last + 1)]
    return all_of(conditions)
