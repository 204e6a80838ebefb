"""Readings that need shapes: what a word of the vocabulary is, given the example values around it.

A conversion between floats is a `cast`, one to or from integers, truth values or complex numbers a `convert`, one that
changes nothing an `alias`; every transposition is a `permute`; every reshaping is a `reshape`, whose shape is that of
the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from infuse.patterns.sizes import same_shape

if TYPE_CHECKING:
    from infuse.patterns.canonical import CanonicalGraph

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A canonical operation: its name and its arguments by name; absent ones are left out."""

    name: str
    args: Arguments

    def __getitem__(self, key: str) -> Any:
        return self.args.get(key)


def _read_cast(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    before, after = view.tensor(arguments.get("input")), view.tensor(node)
    if before is None or after is None or before.device != after.device or not same_shape(before.shape, after.shape):
        return None
    if before.dtype == after.dtype:
        return Call("alias", {"input": arguments["input"]})
    rounds = (before.is_floating_point() and after.is_floating_point()) or (before.is_complex() and after.is_complex())
    return Call("cast" if rounds else "convert", {"input": arguments["input"]})


def _read_detach(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    source = view.tensor(arguments["input"])
    return Call("alias" if source is not None and not source.requires_grad else "detach", {"input": arguments["input"]})


def _read_dropout(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    idle = arguments.get("training") is False or view.is_zero(arguments.get("p"))
    return Call("alias" if idle else "dropout", arguments)


def _read_reshape(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    # view(dtype) reinterprets the bits.
    if view.dtype(node) is None or view.dtype(node) != view.dtype(arguments.get("input")):
        return None
    return Call("reshape", {"input": arguments["input"]})


def _permute(node: object, order: Sequence[int]) -> Call:
    return Call("permute", {"input": node, "dims": tuple(order)})


def _read_transpose(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    order = list(range(len(view.shape(node))))
    (first,), (second,) = arguments["dim0"], arguments["dim1"]
    order[first], order[second] = order[second], order[first]
    return _permute(arguments["input"], order)


def _read_mt(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    tensor = view.tensor(node)
    if tensor is None or tensor.dim() < 2 or tensor.is_complex():
        return None
    rank = tensor.dim()
    return _permute(arguments["input"], (*range(rank - 2), rank - 1, rank - 2))


def _read_t(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    tensor = view.tensor(node)
    if tensor is None or tensor.is_complex():
        return None
    return _permute(arguments["input"], tuple(reversed(range(tensor.dim()))))


def _read_movedim(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    sources, places = arguments["source"], arguments["destination"]
    rest = [dim for dim in range(len(view.shape(node))) if dim not in sources]
    order = [sources[places.index(dim)] if dim in places else rest.pop(0) for dim in range(len(view.shape(node)))]
    return _permute(arguments["input"], order)


def _read_getitem(view: CanonicalGraph, node: Node, arguments: Arguments) -> Call | None:
    """x[:, None] is a reshape; x[..., :4] a slice; the i-th of a tuple stays getitem."""
    if view.tensor(arguments["input"]) is None:
        return Call("getitem", arguments)
    index = arguments["index"]
    items = index if isinstance(index, tuple) else (index,)
    whole = (slice(None), None, Ellipsis)
    if not any(isinstance(item, Node) for item in items) and all(item in whole for item in items):
        return Call("reshape", {"input": arguments["input"]})
    plain = all(isinstance(item, slice) or item is None or item is Ellipsis for item in items)
    return Call("slice" if plain else "index", arguments)


FINISH: dict[str, Callable[[CanonicalGraph, Node, Arguments], Call | None]] = {
    "to": _read_cast,
    "detach": _read_detach,
    "dropout": _read_dropout,
    "reshape": _read_reshape,
    "transpose": _read_transpose,
    "mT": _read_mt,
    "T": _read_t,
    "movedim": _read_movedim,
    "getitem": _read_getitem,
}
