"""What an element of a tensor is, read from the nodes that make the tensor.

The reading is demand-driven: an element of the mask at symbolic indices asks for the elements it is computed from, each
at indices of its own, down to tensors that are made of their positions (arange, ones, full), or to inputs, parameters
and buffers, whose elements stay unknown. Writes in place that are understood are part of the value; after any other
the tensor is unknown.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from infuse.patterns import mask_views, metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.index_algebra import (
    Coordinate,
    Element,
    Formula,
    Linear,
    all_of,
    any_of,
    at_most,
    is_zero,
    negated,
    of,
)
from infuse.patterns.mask_values import (
    FORMULAS,
    INDEX_DTYPES,
    UNARY,
    Leaf,
    Value,
    as_formula,
    calculate,
    cast,
    choose,
    combine,
    compare,
    compute,
    constant,
    literal,
    parts_of,
    spread,
    unknown,
    weight,
)
from infuse.patterns.mask_views import Indices, linear
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
            if isinstance(target, Node) and _self(target) is _self(node):
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
        making = _MAKERS.get(call.name)
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
            known = compute(node, dict(zip(nodes, leaves)))
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
        node = write.node
        name = _name(node)
        if name not in _WRITES or not isinstance(node.args[0], Node):
            return None
        before = self.value(node.args[0], indices, write.index)
        dtype = self.view.dtype(node.args[0])
        new = _WRITES[name](self, node, before, indices)
        return None if new is None or dtype is None else cast(new, dtype, element)


def _symbolic(call: Call, own: tuple[Leaf, ...], dtype: torch.dtype) -> Value | None:
    if call.name in UNARY and len(own) == 1 and isinstance(own[0], Linear):
        return UNARY[call.name](own[0])
    if len(own) != 2:
        return None
    return compare(call.name, *own) if call.name in _COMPARISONS else calculate(call.name, *own, dtype)


def _name(node: Node) -> str:
    """A target's name without overload; "" for what is not torch's or Python's own."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
        return ""
    own = (getattr(node.target, "__module__", None) or "torch").split(".")[0] in ("torch", "_operator", "operator")
    return str(getattr(node.target, "__name__", "")).partition(".")[0] if own else ""


def _self(node: Node) -> Node:
    """The tensor that a chain of writes in place, each of which returns it, began with."""
    while _name(node) in _WRITES and _name(node) != "setitem" and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


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
    return None if diagonal is None or dtype is None else _triangle(_name(node)[:4], before, indices, diagonal, dtype)


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


def _triangle(name: str, value: Value, indices: Indices, diagonal: Linear, dtype: torch.dtype) -> Value | None:
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
    return _triangle(call.name, value, indices, diagonal, dtype)


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
    dim, time = dim % len(indices), view.index[node]
    at = (lambda place: (*indices[:dim], place, *indices[dim + 1 :]))
    if first is None:
        now, previous = reader.value(source, at(indices[dim] + 1), time), reader.value(source, at(indices[dim]), time)
    elif mask_views.linear(view.shape(first)[dim]) == Linear(constant=1):
        now = reader.value(source, at(indices[dim]), time)
        before = reader.value(source, at(indices[dim] - 1), time)
        previous = choose(at_most(indices[dim]), reader.value(first, at(Linear()), time), before)
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


_Maker = Callable[[MaskReader, Node, Call, Indices, Element], Value | None]
_MAKERS: dict[str, _Maker] = {
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
    "cumsum": _accumulate,
    "diff": _differ,
    "pad": _pad,
    "cat": _join,
}
