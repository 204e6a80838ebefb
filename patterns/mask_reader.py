"""What an element of a tensor is, read from the nodes that make the tensor.

The reading is demand-driven: an element of the mask at symbolic indices asks for the elements it is computed from, each
at indices of its own, down to tensors that are made of their positions (arange, ones, full), or to inputs, parameters
and buffers, whose elements stay unknown. Writes in place that are understood are part of the value; after any other
the tensor is unknown.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.fx import Node

from infuse.patterns import mask_views, metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.index_algebra import (
    Element,
    Linear,
    all_of,
    any_of,
    negated,
)
from infuse.patterns.mask_makers import MAKERS
from infuse.patterns.mask_values import (
    FORMULAS,
    INDEX_DTYPES,
    UNARY,
    Leaf,
    Value,
    as_formula,
    calculate,
    cast,
    combine,
    compare,
    compute,
    literal,
    spread,
    unknown,
    weight,
)
from infuse.patterns.mask_views import Indices, linear
from infuse.patterns.mask_writes import original, written
from infuse.patterns.readings import Call
from infuse.patterns.safety import Write, storages, writes

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_LOGICAL = ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor")
_ARITHMETIC = ("add", "sub", "mul", "div", "pow", "floor_divide", "remainder", "maximum", "minimum")
_FUNCTIONS = ("neg", "abs", "log", "exp", "sqrt", "rsqrt", "reciprocal", "square", "clamp", "relu", "sigmoid", "tanh")
# A mask takes some dozens of steps; a value that takes more is taken as unknown.
_MAX_STEPS = 1500
_MAX_DEPTH = 120
_MAX_WEIGHT = 120


class MaskReader:
    """Reads elements of a graph's tensors, and remembers them: masks share what they are made of."""

    def __init__(self, view: CanonicalGraph) -> None:
        self.view = view
        self._values: dict[tuple[Node, Indices, int], Value] = {}
        self._storages: dict[Node, frozenset[int]] = {}
        self._depth = 0
        self._steps = 0

    @functools.cached_property
    def _writes(self) -> dict[int, list[Write]]:
        found: dict[int, list[Write]] = {}
        for write in writes(self.view):
            for storage in write.storages:
                found.setdefault(storage, []).append(write)
        return found

    def begin(self) -> None:
        """To be called before the reading of another mask: each may take so many steps."""
        self._steps = 0

    def writes_before(self, node: Node, time: int) -> list[Write]:
        """The writes to a tensor's storage by nodes in front of position `time`."""
        found = [write for storage in self._stored(node) for write in self._writes.get(storage, ())]
        return [write for write in found if write.index < time]

    def _stored(self, node: Node) -> frozenset[int]:
        if node not in self._storages:
            self._storages[node] = storages(self.view.value(node))
        return self._storages[node]

    def value(self, node: Node, indices: Indices, time: int) -> Value:
        """The element of a tensor at `indices` as the node at position `time` reads it."""
        done = self.writes_before(node, time)
        key = (node, indices, len(done))
        if key not in self._values:
            self._steps += 1
            tensor = self.view.tensor(node)
            assert tensor is not None and tensor.dim() == len(indices)
            element = Element(node, indices, len(done))
            found: Value | None = None
            if self._steps <= _MAX_STEPS and self._depth < _MAX_DEPTH and not tensor.requires_grad:
                self._depth += 1
                with contextlib.suppress(metadata.MissingMetadata):
                    found = self._read(node, indices, time, done[-1] if done else None, element)
                self._depth -= 1
            if found is None or weight(found) > _MAX_WEIGHT:
                found = unknown(element, tensor.dtype)
            self._values[key] = found
        return self._values[key]

    def _read(self, node: Node, indices: Indices, time: int, last: Write | None, element: Element) -> Value | None:
        call = self.view.call(node) or self._moved(node)
        if last is not None:
            target = last.node.args[0]
            if isinstance(target, Node) and original(target) is original(node):
                return self._written(last, indices, element)
            is_view = call is not None and isinstance(call["input"], Node)
            if not is_view or self._stored(call["input"]) != self._stored(node):  # type: ignore[index]
                return None
        if call is None:
            return None
        if call.name in _LOGICAL or call.name in ("logical_not", "bitwise_not"):
            return self._logic(node, call, indices)
        if call.name in (*_COMPARISONS, *_ARITHMETIC, *_FUNCTIONS):
            return self._pointwise(node, call, indices, element)
        making = MAKERS.get(call.name)
        if making is not None:
            return making(self, node, call, indices, element)
        source, own = self._source(node, call, indices)
        return None if own is None else self._pull(node, source, own, time)

    def _moved(self, node: Node) -> Call | None:
        """A conversion that also moves to another device."""
        if self.view.word(node) != "to" or not node.args:
            return None
        before, after = self.view.tensor(node.args[0]), self.view.tensor(node)
        fits = before is not None and after is not None and before.dim() == after.dim()
        return Call("cast", {"input": node.args[0]}) if fits else None

    def _pull(self, node: Node, source: Node, indices: Indices, time: int) -> Value:
        """An element of an input of `node`; a view is read later than it was made."""
        shared = self._stored(source) == self._stored(node)
        return self.value(source, indices, time if shared else self.view.index[node])

    def operand(self, node: Node, value: object, indices: Indices) -> Value | None:
        """The element of an operand that the element of the node at `indices` is computed from, or a number."""
        tensor = self.view.tensor(value)
        if tensor is None:
            example = self.view.value(value) if isinstance(value, Node) else value
            if isinstance(example, (bool, float)):
                return literal(example)
            return linear(example)
        assert isinstance(value, Node)
        own = mask_views.aligned(tuple(tensor.shape), self.view.shape(node), indices)
        return None if own is None else self.value(value, own, self.view.index[node])

    def _logic(self, node: Node, call: Call, indices: Indices) -> Value | None:
        names = [name for name in ("input", "other") if name in call.args]
        if call.name.startswith("bitwise") and self.view.dtype(node) != torch.bool:
            return None
        values = [self.operand(node, call[name], indices) for name in names]
        formulas = [as_formula(value) for value in values if value is not None]
        if len(formulas) != len(values):
            return None
        kind = call.name.partition("_")[2]
        if kind == "not":
            return negated(formulas[0])
        if kind == "xor":
            return compare("ne", *formulas)
        return all_of(formulas) if kind == "and" else any_of(formulas)

    def _pointwise(self, node: Node, call: Call, indices: Indices, element: Element) -> Value | None:
        """Comparisons and arithmetic. Constants are computed by torch itself, integers are kept as expressions."""
        dtype = self.view.dtype(node)
        values = {operand: self.operand(node, operand, indices) for operand in node.all_input_nodes}
        sides = [self.operand(node, call[name], indices) for name in ("input", "other") if name in call.args]
        if dtype is None or None in sides or None in values.values():
            return None
        nodes = list(values)
        both = all(isinstance(value, FORMULAS) for value in sides)
        if both and call.name in _COMPARISONS:
            return compare(call.name, *sides)  # type: ignore[arg-type]
        if both and dtype == torch.bool and call.name in ("mul", "add"):
            formulas = [as_formula(side) for side in sides if side is not None]
            return all_of(formulas) if call.name == "mul" else any_of(formulas)

        def result(*leaves: Leaf) -> Value:
            own = leaves[len(nodes) :]
            known: Value | None = compute(node, dict(zip(nodes, leaves)))
            if known is None and self._is_exact(call, dtype):
                known = _symbolic(call, own, dtype)
            return unknown(element, dtype) if known is None else known

        operands = [spread(value) for value in (*values.values(), *sides) if value is not None]
        return combine(result, *operands)

    def _is_exact(self, call: Call, dtype: torch.dtype) -> bool:
        """Whether integers that are compared or computed with are positions, not narrow ones that wrap around."""
        if call["alpha"] not in (None, 1) or call["rounding_mode"] is not None:
            return False
        return dtype in INDEX_DTYPES or call.name in _COMPARISONS

    def _source(self, node: Node, call: Call, indices: Indices) -> tuple[Node, Indices | None]:
        """The tensor that a view, a slice or a gather takes its element from, and the indices there."""
        view, source = self.view, call["input"]
        before, after = view.shape(source), view.shape(node)
        if not isinstance(source, Node) or view.tensor(source) is None:
            return node, None
        if call.name in ("alias", "detach"):
            return source, indices
        if call.name == "permute":
            return source, mask_views.permuted(call["dims"], indices)
        if call.name == "reshape":
            return source, mask_views.reshaped(before, after, indices)
        if call.name in ("expand", "repeat"):
            return source, mask_views.aligned(before, after, indices)
        if call.name == "select":
            return source, mask_views.selected(view, call, indices)
        if call.name == "slice" and "index" not in call.args:
            return source, mask_views.sliced(view, call, indices)
        if call.name in ("slice", "index"):
            return source, mask_views.indexed(view, node, call, indices, self._position(node))
        if call.name == "index_select":
            whole = (*[slice(None)] * (call["dim"] % len(before)), call["index"])
            looked_up = Call("index", {"input": source, "index": whole})
            return source, mask_views.indexed(view, node, looked_up, indices, self._position(node))
        return source, None

    def _position(self, node: Node) -> mask_views.Pull:
        return lambda index, indices: self.value(index, indices, self.view.index[node])

    def _written(self, write: Write, indices: Indices, element: Element) -> Value | None:
        """The element after a write to the whole tensor."""
        node, target = write.node, write.node.args[0]
        dtype = self.view.dtype(target)
        if not isinstance(target, Node) or dtype is None:
            return None
        new = written(self, node, self.value(target, indices, write.index), indices)
        return None if new is None else cast(new, dtype, element)


def _symbolic(call: Call, own: tuple[Leaf, ...], dtype: torch.dtype) -> Value | None:
    if call.name in UNARY and len(own) == 1 and isinstance(own[0], Linear):
        return UNARY[call.name](own[0])
    if len(own) != 2:
        return None
    return compare(call.name, *own) if call.name in _COMPARISONS else calculate(call.name, *own, dtype)
