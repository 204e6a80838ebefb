"""Which elements of which tensor a value's last dimensions hold.

A chain of slices, reshapes, transpositions, concatenations and signs only moves elements about. Run on arrays of
element numbers instead of tensors it says where each element of its result comes from, whatever the spelling: a chunk
and a slice come out the same. Leading dimensions must pass through unchanged; the trailing ones must have plain sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.readings import Call
from infuse.patterns.sizes import same_shape, same_size

Codes = npt.NDArray[np.int64]
# A head has hundreds of elements; a vocabulary is no head.
_MAX_ELEMENTS = 1 << 14
_MAX_DEPTH = 24


class Lanes:
    """Reads values with `lead` leading dimensions, [*lead, *trailing], as arrays [*trailing] of codes.

    Code c > 0 is element c - span(leaf)[0] of a leaf, a node that is no mere rearrangement; -c is its negative. A
    complex value has one trailing dimension more, of real and imaginary part.
    visited: the nodes that were looked through, deepest first, and the codes they hold.
    """

    def __init__(self, view: CanonicalGraph, lead: int) -> None:
        self.view = view
        self.lead = lead
        self.leaves: list[Node] = []
        self.starts: list[int] = [1]
        self.visited: dict[tuple[Node, torch.dtype | None], Codes] = {}

    def read(self, node: object, *, narrowing: torch.dtype | None = None, depth: int = 0) -> Codes | None:
        """The codes of a value; None if its trailing sizes are symbolic or too large.

        Casts that lose nothing are looked through, and those to the dtype `narrowing`.
        """
        if not isinstance(node, Node) or self.view.tensor(node) is None:
            return None
        key = (node, narrowing)
        if key not in self.visited:
            codes = self._rearranged(node, narrowing, depth) if depth < _MAX_DEPTH else None
            if codes is None:
                codes = self._leaf(node)
            if codes is None:
                return None
            self.visited[key] = codes
        return self.visited[key]

    def _leaf(self, node: Node) -> Codes | None:
        trailing = [size for size in self.view.shape(node)[self.lead :] if isinstance(size, int)]
        if self.lead + len(trailing) != len(self.view.shape(node)):
            return None
        if self.is_complex(node):
            trailing.append(2)
        size = int(np.prod(trailing, dtype=np.int64))
        if size > _MAX_ELEMENTS:
            return None
        if size == 0:
            return np.empty(trailing, dtype=np.int64)
        if node not in self.leaves:
            self.leaves.append(node)
            self.starts.append(self.starts[-1] + size)
        return np.arange(*self.span(node), dtype=np.int64).reshape(trailing)

    def span(self, leaf: Node) -> tuple[int, int]:
        """The first code of a leaf, and the first behind it."""
        number = self.leaves.index(leaf)
        return self.starts[number], self.starts[number + 1]

    def is_complex(self, node: object) -> bool:
        """Whether a tensor is of complex numbers."""
        dtype = self.view.dtype(node)
        return dtype is not None and dtype.is_complex

    def owners(self, codes: Codes) -> Codes:
        """The number of the leaf that each element comes from."""
        return np.searchsorted(np.array(self.starts), np.abs(codes), side="right") - 1

    def _rearranged(self, node: Node, narrowing: torch.dtype | None, depth: int) -> Codes | None:
        """The codes of a node that rearranges its inputs; None for any other."""
        call = self.view.call(node)
        if call is None:
            return None
        if call.name in ("cat", "stack"):
            return self._joined(node, call, narrowing, depth)
        if call.name == "complex":
            parts = [self.read(call[name], narrowing=narrowing, depth=depth + 1) for name in ("real", "imag")]
            return None if parts[0] is None or parts[1] is None else np.stack([parts[0], parts[1]], axis=-1)
        if call.name == "getitem":
            return self._part(call, narrowing, depth)
        step = self._step(node, call, narrowing)
        if step is None:
            return None
        codes = self.read(call["input"], narrowing=narrowing, depth=depth + 1)
        return None if codes is None else step(codes)

    def _step(self, node: Node, call: Call, narrowing: torch.dtype | None) -> Any:
        """What a node with one input does to its input's codes; None if it does something else."""
        view, lead = self.view, self.lead
        source = call["input"]
        trailing = view.shape(node)[lead:]
        if call.name in ("alias", "view_as_real", "view_as_complex"):
            return lambda codes: codes
        if call.name == "cast":
            floats = all(dtype is not None and dtype.is_floating_point for dtype in map(view.dtype, (node, source)))
            return (lambda codes: codes) if floats and (view.dtype(node) == narrowing or view.widens(node)) else None
        if call.name in ("real", "imag"):
            position = 0 if call.name == "real" else 1
            return (lambda codes: codes[..., position]) if self.is_complex(source) else None
        if call.name == "neg" or (call.name == "mul" and call["other"] == -1):
            return lambda codes: -codes
        if call.name == "reshape" and self._keeps_lead(source, node):
            sizes = (*trailing, 2) if self.is_complex(node) else trailing
            return (lambda codes: codes.reshape(sizes)) if all(type(size) is int for size in sizes) else None
        if call.name == "permute" and call["dims"][:lead] == tuple(range(lead)) and not self.is_complex(node):
            order = [dim - lead for dim in call["dims"][lead:]]
            return lambda codes: codes.transpose(order)
        index = self._index(call, len(view.shape(source))) if call.name in ("slice", "index", "select") else None
        return None if index is None else lambda codes: codes[index]

    def _keeps_lead(self, before: object, after: Node) -> bool:
        first, second = self.view.shape(before), self.view.shape(after)
        whole = len(first) >= self.lead and len(second) >= self.lead
        return whole and same_shape(first[: self.lead], second[: self.lead])

    def _index(self, call: Call, rank: int) -> tuple[Any, ...] | None:
        """What a slice or an index takes of the trailing dimensions; None if it takes part of a leading one."""
        if "index" in call.args and call.name != "select":
            index = call["index"]
            items = list(index) if isinstance(index, tuple) else [index]
            if Ellipsis in items:
                place = items.index(Ellipsis)
                given = sum(item is not None and item is not Ellipsis for item in items)
                items[place : place + 1] = [slice(None)] * (rank - given)
        else:
            item = self._item(call, rank)
            if item is None:
                return None
            items = [slice(None)] * rank
            items[item[0]] = item[1]
        lead, trailing = items[: self.lead], items[self.lead :]
        plain = all(_is_plain(item) for item in trailing)
        return tuple(trailing) if plain and all(item == slice(None) for item in lead) else None

    def _item(self, call: Call, rank: int) -> tuple[int, Any] | None:
        """(dimension, what is taken of it) of a slice with a start and an end or a length, or of a select."""
        if call.name == "select":
            return (call["dim"][0], call["index"]) if len(call["dim"]) == 1 else None
        dim = 0 if call["dim"] is None else call["dim"]
        start = call["start"] or 0
        if type(dim) is not int:
            return None
        if "length" in call.args:
            # A start counted from the end would meet an end of 0.
            return (dim % rank, slice(start, start + call["length"])) if type(start) is int and start >= 0 else None
        return dim % rank, slice(start, call["end"], call["step"])

    def _part(self, call: Call, narrowing: torch.dtype | None, depth: int) -> Codes | None:
        """One of the results of a chunk, split or unbind."""
        source, position = call["input"], call["index"]
        split = self.view.call(source, "split")
        if split is None or type(position) is not int:
            return None
        dims, results = split["dim"], self.view.value(source)
        if dims is None or len(dims) != 1 or dims[0] < self.lead or self.is_complex(split["input"]):
            return None
        codes = self.read(split["input"], narrowing=narrowing, depth=depth + 1)
        if codes is None:
            return None
        axis, position = dims[0] - self.lead, position % len(results)
        if results[position].dim() < len(self.view.shape(split["input"])):
            return codes.take([position], axis=axis).squeeze(axis)
        start = sum(result.shape[dims[0]] for result in results[:position])
        return codes.take(range(start, start + results[position].shape[dims[0]]), axis=axis)

    def _joined(self, node: Node, call: Call, narrowing: torch.dtype | None, depth: int) -> Codes | None:
        dim, rank = call["dim"], len(self.view.shape(node))
        axis = (0 if dim is None else dim) % rank - self.lead if dim is None or type(dim) is int else -1
        tensors = call["tensors"]
        if axis < 0 or not isinstance(tensors, (tuple, list)) or self.is_complex(node):
            return None
        parts: list[Codes] = []
        for tensor in tensors:
            codes = self.read(tensor, narrowing=narrowing, depth=depth + 1)
            if codes is None or (call.name == "cat" and not self._keeps_lead(tensor, node)):
                return None
            parts.append(codes)
        return np.concatenate(parts, axis=axis) if call.name == "cat" else np.stack(parts, axis=axis)

    def node_with(self, codes: Codes, dtype: torch.dtype) -> Node | None:
        """A node that was read and holds just these elements in this dtype; of several the one nearest to the leaf."""
        for (node, _), held in self.visited.items():
            if held.shape == codes.shape and self.view.dtype(node) == dtype and np.array_equal(held, codes):
                return node
        return None


def _is_plain(item: object) -> bool:
    if isinstance(item, slice):
        numbers = (item.start, item.stop, item.step)
        return all(number is None or type(number) is int for number in numbers)
    return item is None or type(item) is int


def same_tensor(view: CanonicalGraph, left: Any, right: Any, trail: list[Node], depth: int = 8) -> bool:
    """Whether two values were computed by the same operations from the same tensors.

    The nodes of both computations, where they are two, are appended to `trail`: nothing may be written between them.
    """
    if not isinstance(left, Node) or not isinstance(right, Node):
        return _same_argument(view, left, right, trail, depth)
    left, right = view.strip(left), view.strip(right)
    if left is right:
        return True
    one, other = view.call(left), view.call(right)
    if depth == 0 or one is None or other is None or one.name != other.name or one.name == "dropout":
        return False
    trail += (left, right)
    same = view.dtype(left) == view.dtype(right) and same_shape(view.shape(left), view.shape(right))
    return (
        same
        and one.args.keys() == other.args.keys()
        and all(same_tensor(view, value, other.args[name], trail, depth - 1) for name, value in one.args.items())
    )


def _same_argument(view: CanonicalGraph, left: Any, right: Any, trail: list[Node], depth: int) -> bool:
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        pairs = zip(left, right)
        return len(left) == len(right) and all(same_tensor(view, a, b, trail, depth) for a, b in pairs)
    if isinstance(left, slice) and isinstance(right, slice):
        bounds = ((left.start, right.start), (left.stop, right.stop), (left.step, right.step))
        return all(same_tensor(view, a, b, trail, depth) for a, b in bounds)
    numbers = (int, torch.SymInt)
    if isinstance(left, numbers) and isinstance(right, numbers):
        return same_size(left, right)
    return type(left) is type(right) and bool(left == right)
