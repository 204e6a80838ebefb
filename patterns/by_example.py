"""Patterns given by an example: a plain torch function, written as authors write the thing that is to be recognised.

The example is traced once for each dtype and compared, node by node from the last one upwards, with the canonical view
of a graph: so every spelling of each single operation is recognised, the two factors of a product in either order, and
a dtype that differs anywhere is no match. What changes shapes other than by broadcasting or by reducing dimensions
cannot be given by an example; that takes a matcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node, symbolic_trace

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.readings import Call
from infuse.patterns.sites import Site
from infuse.patterns.sizes import Size, same_shape, same_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Reading these takes more than comparing arguments: shapes are no part of a canonical call, and a random or a detached
# value is no function of its input. Products of matrices have kernels that a pattern should not swallow.
_NOT_IN_EXAMPLES = frozenset(
    {
        *("reshape", "permute", "expand", "repeat", "repeat_interleave", "getitem", "slice", "split", "select", "cat"),
        *("stack", "pad", "index_select", "item", "tensor", "dropout", "detach", "linear", "matmul", "bmm", "baddbmm"),
        *("einsum", "sdpa", "complex", "view_as_complex"),
    }
)
_REDUCTIONS = frozenset({"mean", "sum", "softmax", "var", "std", "vector_norm"})
_COMMUTATIVE = frozenset({"add", "mul", "maximum"})
_OPAQUE_MODULES = ("torch", "torch.nn.functional", "torch._C._nn", "torch.special")

Function = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """The example traced in one dtype. parameters: its placeholders by name; root: what it returns."""

    view: CanonicalGraph
    parameters: Mapping[str, Node]
    root: Node


@dataclass(frozen=True, slots=True)
class Example:
    """A pattern by example.

    kind: the operator. arguments: its parameters; those that the example does not have take the value given here.
    shapes: of the example's tensors; sizes that are equal there must be equal in a site, dimensions counted from the
    last. any_rank: whether a site may have more leading dimensions. rounding: as in `Site`.
    """

    kind: str
    arguments: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    variants: Mapping[torch.dtype, Variant]
    spelling: str
    any_rank: bool = False
    rounding: str = ""

    @property
    def anchor(self) -> str:
        """The word of the example's last operation."""
        (word,) = {variant.view.word(variant.root) for variant in self.variants.values()}
        return word

    def concerns(self, view: CanonicalGraph, node: Node) -> bool:
        """Whether a node could be the last one, by the names of what it reads: cheap, as anchors are common words."""
        wanted = [_title(self._any.view, item) for item in self._any.root.all_input_nodes if item.op != "placeholder"]
        # Casts come and go with the dtype.
        have = [_title(view, item) for item in node.all_input_nodes]
        return "to" in wanted or "to" in have or all(title in have for title in wanted)

    @property
    def _any(self) -> Variant:
        return next(iter(self.variants.values()))

    def match(self, view: CanonicalGraph, root: Node) -> Site | None:
        """The site that ends in a node."""
        dtype = view.dtype(root)
        variant = self.variants.get(dtype) if dtype is not None else None
        if variant is None or root in view.in_place:
            return None
        comparison = _Comparison(variant.view, view)
        if not comparison.same(variant.root, root):
            return None
        bound = {name: comparison.bound.get(node) for name, node in variant.parameters.items()}
        if not _alike(view, bound, self.shapes, self.any_rank):
            return None
        args = tuple(bound.get(name, default) for name, default in self.arguments.items())
        interior = tuple(dict.fromkeys(comparison.interior))
        return Site(self.kind, (root,), root, args, interior, self.spelling, self.rounding)


class _Comparison:
    """Compares nodes of an example with nodes of a graph. bound: what the example's parameters stand for."""

    def __init__(self, example: CanonicalGraph, graph: CanonicalGraph) -> None:
        self.example = example
        self.graph = graph
        self.bound: dict[Node, Node] = {}
        self.interior: list[Node] = []

    def same(self, wanted: Any, got: Any) -> bool:
        """Whether a value of the graph is the example's; forgets what it learnt if not."""
        bound, length = dict(self.bound), len(self.interior)
        if self._same(wanted, got):
            return True
        self.bound, self.interior = bound, self.interior[:length]
        return False

    def _same(self, wanted: Any, got: Any) -> bool:
        if isinstance(wanted, Node):
            return isinstance(got, Node) and self._same_node(wanted, got)
        if isinstance(wanted, (tuple, list)):
            is_list = isinstance(got, (tuple, list)) and len(got) == len(wanted)
            return is_list and all(self._same(a, b) for a, b in zip(wanted, got))
        return type(wanted) is type(got) and bool(wanted == got)

    def _same_node(self, wanted: Node, got: Node) -> bool:
        wanted = self.example.strip(wanted)
        if wanted.op == "placeholder":
            if self.graph.dtype(got) != self.example.dtype(wanted):
                return False
            return self.bound.setdefault(wanted, got) is got
        skipped: list[Node] = []
        got = self.graph.strip(got, trail=skipped)
        if self.graph.dtype(got) != self.example.dtype(wanted) or got in self.graph.in_place:
            return False
        self.interior += [*skipped, got]
        call = self.example.call(wanted)
        if call is None:
            return self._same_function(wanted, got)
        found = self.graph.call(got, call.name)
        return found is not None and self._same_call(call, found, wanted, got)

    def _same_call(self, call: Call, found: Call, wanted: Node, got: Node) -> bool:
        names = {name for name, value in (*call.args.items(), *found.args.items()) if value is not None}
        operands = names & {"input", "other"} if call.name in _COMMUTATIVE else set[str]()
        for name in names - operands:
            if name == "dim":
                ranks = len(self.example.shape(call["input"])), len(self.graph.shape(found["input"]))
                if _from_the_end(call[name], ranks[0]) != _from_the_end(found[name], ranks[1]):
                    return False
            elif not self.same(call[name], found[name]):
                return False
        if not operands:
            return True
        left, right = call["input"], call["other"]
        orders = ((found["input"], found["other"]), (found["other"], found["input"]))
        return any(self.same((left, right), order) for order in orders)

    def _same_function(self, wanted: Node, got: Node) -> bool:
        if wanted.op != got.op or wanted.target != got.target or not callable(wanted.target):
            return False
        mine, theirs = (_bound_arguments(node) for node in (wanted, got))
        return mine.keys() == theirs.keys() and all(self.same(mine[name], theirs[name]) for name in mine)


def trace(
    kind: str, function: Function, arguments: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> Example:
    """The example as a pattern of the operator `kind`. Raises ValueError for what an example cannot say."""
    names = list(inspect.signature(function).parameters)
    unknown = [name for name in names if name not in arguments]
    if unknown:
        raise ValueError(f"infuse: {kind}: the example has the parameters {unknown}, expected {list(arguments)}")
    shapes = {name: shapes[name] for name in names}
    variants = {dtype: _trace(kind, function, shapes, dtype) for dtype in DTYPES}
    any_rank = _counts_from_the_end(kind, function, shapes, variants[DTYPES[0]])
    return Example(kind, arguments, shapes, variants, f"as {function.__name__}", any_rank)


def _trace(kind: str, function: Function, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Variant:
    graph = symbolic_trace(function).graph
    with metadata.undisturbed(FakeTensorMode()):
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = torch.empty(shapes[str(node.target)], dtype=dtype)
            elif node.op in ("call_function", "call_method"):
                args: Any = torch.fx.map_arg(node.args, metadata.value)
                kwargs: Any = torch.fx.map_arg(node.kwargs, metadata.value)
                node.meta["example_value"] = metadata.evaluate(node.target, args, kwargs)
    view = CanonicalGraph(graph)
    for node in view.nodes:
        _check(kind, view, node)
    (root,) = graph.output_node().args
    if not isinstance(root, Node) or not view.word(root):
        raise ValueError(f"infuse: {kind}: the example ends in {root}, expected a common operation, such as a product")
    return Variant(view, {str(node.target): node for node in view.nodes if node.op == "placeholder"}, root)


def _check(kind: str, view: CanonicalGraph, node: Node) -> None:
    """Raises ValueError unless a node is a pure function whose arguments say all about it."""
    if node.op in ("placeholder", "output"):
        return
    call = view.call(node)
    inputs = [view.shape(item) for item in node.all_input_nodes]
    keeps_shape = bool(inputs) and same_shape(torch.broadcast_shapes(*inputs), view.shape(node))
    if call is not None:
        fits = call.name not in _NOT_IN_EXAMPLES and (keeps_shape or call.name in _REDUCTIONS)
    else:
        of_torch = node.op == "call_function" and getattr(node.target, "__module__", "") in _OPAQUE_MODULES
        in_place = getattr(node.target, "__name__", "_").endswith("_")
        fits = not view.word(node) and of_torch and keeps_shape and not in_place
    if not fits:
        raise ValueError(
            f"infuse: {kind}: got {node.target} in the example, expected pointwise operations and reductions; "
            "recognise it with a matcher: register_pattern(..., match=, anchors=)"
        )


def with_leading(shapes: Mapping[str, tuple[int, ...]], leading: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes with more dimensions in front of those of the highest rank."""
    highest = max(map(len, shapes.values()))
    return {name: (*leading, *shape) if len(shape) == highest else shape for name, shape in shapes.items()}


def _counts_from_the_end(
    kind: str, function: Function, shapes: Mapping[str, tuple[int, ...]], variant: Variant
) -> bool:
    """Whether the example means the same dimensions, counted from the last, in tensors of a higher rank."""
    try:
        higher = _trace(kind, function, with_leading(shapes, (3,)), DTYPES[0])
    except (RuntimeError, ValueError, IndexError):
        return False
    pairs = zip(variant.view.nodes, higher.view.nodes)
    return all(_dims_from_the_end(variant.view, one) == _dims_from_the_end(higher.view, other) for one, other in pairs)


def _dims_from_the_end(view: CanonicalGraph, node: Node) -> Any:
    call = view.call(node)
    return None if call is None else _from_the_end(call["dim"], len(view.shape(call["input"])))


def _alike(
    view: CanonicalGraph, bound: Mapping[str, Node | None], shapes: Mapping[str, tuple[int, ...]], any_rank: bool
) -> bool:
    """Whether sizes are equal where the example's are, counted from the last dimension.

    Tensors of the example's highest rank may have more leading dimensions, all of them the same; others may not.
    """
    if any(node is None for node in bound.values()):
        return False
    found = {name: view.shape(node) for name, node in bound.items()}
    highest = max(len(shapes[name]) for name in found)
    full = [name for name in found if len(shapes[name]) == highest]
    extra = len(found[full[0]]) - highest
    if (
        extra < 0
        or (extra and not any_rank)
        or any(len(found[name]) != len(shapes[name]) + extra * (name in full) for name in found)
    ):
        return False
    if not all(same_shape(found[name][:extra], found[full[0]][:extra]) for name in full):
        return False
    first: dict[tuple[int, int], Size] = {}  # (position from the last, the example's size) -> size
    for name, sizes in found.items():
        for position, (size, wanted) in enumerate(zip(sizes[::-1], shapes[name][::-1])):
            if not same_size(first.setdefault((position, wanted), size), size):
                return False
    return True


def _title(view: CanonicalGraph, node: Node) -> str:
    return view.word(node) or getattr(node.target, "__name__", str(node.target))


def _from_the_end(dims: Any, rank: int) -> Any:
    if isinstance(dims, (tuple, list)):
        return tuple(sorted(dim - rank for dim in dims))
    return dims - rank if isinstance(dims, int) else dims


def _bound_arguments(node: Node) -> dict[str, Any]:
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {**{str(index): arg for index, arg in enumerate(node.args)}, **node.kwargs}
    given.apply_defaults()
    return given.arguments
