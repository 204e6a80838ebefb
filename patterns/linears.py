"""Linears as the second stage sees them: products with a weight that the graph is given, in one dtype throughout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import arguments_of

_GIVEN = ("placeholder", "get_attr")
SUBCLASS = "a weight is a tensor subclass (sharded or quantised), which keeps operators of its own: give local tensors"


@dataclass(frozen=True, slots=True)
class Linear:
    """node = input @ weight^T + bias: input [..., D], weight [F, D], bias [F] or None. trail: aliases of the input."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    trail: tuple[Node, ...]

    @property
    def is_constant(self) -> bool:
        """Whether weight and bias are constants of the graph (frozen) rather than its inputs."""
        return self.weight.op == "get_attr" and (self.bias is None or self.bias.op == "get_attr")


def read_linear(view: CanonicalGraph, node: Node) -> Linear | None:
    """The linear that a node is.

    None for a product with a weight that is computed in the graph (merged adapters, dequantised) or stands for other
    tensors (sharded, quantised), and where autocast or a mixture of dtypes puts casts between input and product.
    """
    call = view.call(node, "linear")
    if call is None or stands_for_others(view, node, call["input"], call["weight"], call["bias"]):
        return None
    trail: list[Node] = []
    source = view.strip(call["input"], trail=trail)
    weight, bias = call["weight"], call["bias"]
    given = [item for item in (weight, bias) if item is not None]
    if not all(isinstance(item, Node) and item.op in _GIVEN for item in given):
        return None
    if len(view.shape(weight)) != 2 or (bias is not None and len(view.shape(bias)) != 1):
        return None
    if any(view.dtype(item) != view.dtype(node) for item in (source, *given)):
        return None
    return Linear(node, source, weight, bias, tuple(trail))


def why_no_linear(view: CanonicalGraph, node: Node) -> str:
    """What `read_linear` has against a linear, and what would help."""
    call = view.call(node, "linear")
    given = [] if call is None else [call["weight"], *([call["bias"]] if call["bias"] is not None else [])]
    if any(stands_for_others(view, item) for item in (node, *given)):
        return SUBCLASS
    if not all(isinstance(item, Node) and item.op in _GIVEN for item in given):
        return "a weight is computed in the graph: merge adapters and dequantise before compiling"
    return "its input, its weight and its result differ in dtype: cast the input before, leave autocast off"


def stands_for_others(view: CanonicalGraph, *items: object) -> bool:
    """Whether one is a tensor subclass that stands for other tensors, such as a DTensor."""
    return any(is_traceable_wrapper_subclass(view.value(item)) for item in items)


def linear_readers(view: CanonicalGraph, value: Node) -> tuple[Linear, ...]:
    """The linears that read a value, in the graph's order; () if anything else reads it too, or nobody does."""
    found: list[Linear] = []
    pending = [value]
    while pending:
        node = pending.pop()
        for reader in view.readers(node):
            if view.call(reader, "alias") is not None:
                pending.append(reader)
                continue
            linear = read_linear(view, reader)
            if linear is None or linear.input is not view.strip(value) or value in (linear.weight, linear.bias):
                return ()
            found.append(linear)
    return tuple(sorted(found, key=lambda linear: view.index[linear.node]))


def earliest_place(
    view: CanonicalGraph, candidates: Iterable[Node], args: object, outputs: Iterable[Node], interior: Iterable[Node]
) -> Node | None:
    """The first candidate that has all arguments before it and all other readers of the outputs behind it."""
    own = set(interior)
    defined = max((view.index[node] for node in arguments_of(args)), default=-1)
    read = [view.index[user] for output in outputs for user in view.readers(output) if user not in own]
    limit = min(read, default=len(view.nodes))
    return next((node for node in candidates if defined < view.index[node] <= limit), None)
