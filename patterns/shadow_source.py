"""A site's source as a program of its own: the nodes that compute its outputs, from the values where they start.

The operator claims that the outputs depend on its arguments alone. So the program starts at these, and goes further up
only where a node reads something else, or, `widened`, where values that one might make up for the arguments could be
ones that the model never has (a cosine and a sine, a mask of two equal halves).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Make, Site, arguments_of

# Their results are as good as any other numbers, and computing them is what costs.
_HEAVY = frozenset({"linear", "matmul", "bmm", "baddbmm", "einsum", "sdpa", "embedding", "conv"})
_CONSTANTS = frozenset({"arange", "ones", "zeros", "full", "eye", "linspace", "scalar_tensor"})
_MAX_NODES = 512
_TO_FLOAT64 = {"float": "double", "half": "double", "bfloat16": "double"}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class CannotRun(Exception):
    """Why a site's source cannot be run by itself."""


@dataclass(frozen=True, slots=True)
class Source:
    """nodes: in the order in which they run. leaves: where it starts; unknown: leaves that the operator does not read.

    args: the operator's arguments, in terms of leaves and nodes; after: what is done to its result.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    unknown: tuple[Node, ...]
    outputs: tuple[Node, ...]
    args: tuple[object, ...]
    after: tuple[Any, ...] = ()

    def run(self, values: Mapping[Node, Any], exact: bool = False) -> tuple[Any, ...]:
        """The outputs. exact: the values are float64, and so is everything computed from them."""
        results = dict(values)
        for node in self.nodes:
            results[node] = _evaluate(node, results, exact)
        return tuple(results[output] for output in self.outputs)

    def run_operator(self, operator: Any, values: Mapping[Node, Any]) -> tuple[Any, ...]:
        """The operator's results on the arguments that the leaves' values make."""
        wanted = {*arguments_of(self.args), *arguments_of(self.after)}
        results = dict(values)
        for node in self.nodes:
            if wanted <= results.keys():
                break
            results[node] = _evaluate(node, results, exact=False)
        result = operator(*(_argument(arg, results) for arg in self.args))
        for step, rest in self.after:
            result = metadata.evaluate(step, [result, *(_argument(arg, results) for arg in rest)], {})
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def describe(self) -> str:
        """A text that is the same for sources that compute the same from leaves of the same sizes and dtypes."""
        names = {node: f"%{index}" for index, node in enumerate((*self.leaves, *self.nodes))}
        lines = [f"{names[leaf]} = {_layout(metadata.value(leaf))}" for leaf in self.leaves]
        for node in self.nodes:
            lines.append(f"{names[node]} = {_name(node.target)} {_text(node.args, names)} {_text(node.kwargs, names)}")
        return "\n".join([*lines, _text(self.outputs, names), _text(self.args, names), *self._steps(names)])

    def _steps(self, names: Mapping[Node, str]) -> list[str]:
        return [f"{_name(step)} {_text(rest, names)}" for step, rest in self.after]


def source_of(view: CanonicalGraph, site: Site, replaced: Mapping[Node, Node], widened: bool) -> Source:
    """The program of a site. replaced: what earlier rewrites put in the place of nodes. Raises CannotRun."""
    args = tuple(_current(arg, replaced) for arg in site.args)
    after = tuple((step, _current(rest, replaced)) for step, rest in site.after)
    operands = dict.fromkeys(node for node in (*arguments_of(args), *arguments_of(after)) if _is_tensor(node))
    order: dict[Node, None] = {}
    leaves: dict[Node, None] = {}
    roots = [*operands, *site.outputs] if widened else list(site.outputs)

    def starts(node: Node) -> bool:
        if node in site.interior:
            return not widened and node in operands
        return (not widened and node in operands) or view.word(node) in _HEAVY or not _is_known(view, node)

    for root in roots:
        for node, is_leaf in _upwards(root, starts, {**order, **leaves}):
            (leaves if is_leaf else order)[node] = None
            if len(order) > _MAX_NODES:
                raise CannotRun(f"its source reaches back over more than {_MAX_NODES} operations")
    if any(_draws(view, node) for node in order):
        raise CannotRun("its source draws random numbers")
    leaves = {**operands, **leaves} if not widened else leaves
    read = _ancestors(operands, order)
    unknown = tuple(leaf for leaf in leaves if leaf not in read)
    return Source(tuple(order), tuple(leaves), unknown, site.outputs, args, after)


def _draws(view: CanonicalGraph, node: Node) -> bool:
    """Whether a node drops out at random."""
    call = view.call(node, "dropout", "sdpa", "multi_head_attention")
    if call is None or call.name == "dropout":
        return call is not None
    return call["dropout_p"] is not None and not view.is_zero(call["dropout_p"]) and call["training"] is not False


def _upwards(root: Node, starts: Callable[[Node], bool], known: Mapping[Node, None]) -> Iterator[tuple[Node, bool]]:
    """Nodes that `root` needs, inputs first, with whether the program starts there. Recursion would go too deep."""
    done: set[Node] = set()
    pending = [(root, False)]
    while pending:
        node, inputs_done = pending.pop()
        if node in done or node in known:
            continue
        is_leaf = starts(node)
        if is_leaf or inputs_done:
            done.add(node)
            yield node, is_leaf
            continue
        pending.append((node, True))
        pending.extend((item, False) for item in reversed(node.all_input_nodes) if _is_tensor(item))


def _is_known(view: CanonicalGraph, node: Node) -> bool:
    """Whether a node is pure and makes the same of the same: it is in the table of spellings, or makes constants."""
    packet = getattr(node.target, "overloadpacket", node.target)
    makes_constants = node.op == "call_function" and getattr(packet, "__name__", "") in _CONSTANTS
    return bool(view.word(node)) or (makes_constants and not any(map(_is_tensor, node.all_input_nodes)))


def _ancestors(roots: Mapping[Node, None], order: dict[Node, None]) -> set[Node]:
    """The roots and the nodes they are computed from."""
    found = set(roots)
    for node in reversed(order):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _is_tensor(node: Node) -> bool:
    """Whether a node holds tensors; numbers and sizes are taken from the example values."""
    value = metadata.value(node)
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value)
    )


def _current(arg: object, replaced: Mapping[Node, Node]) -> Any:
    if isinstance(arg, Node):
        return replaced.get(arg, arg)
    if isinstance(arg, Make):
        return Make(arg.target, tuple(_current(item, replaced) for item in arg.args))
    if isinstance(arg, (tuple, list)):
        return type(arg)(_current(item, replaced) for item in arg)
    return arg


def _argument(arg: object, results: Mapping[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return results[arg] if arg in results else concrete(metadata.value(arg))
    if isinstance(arg, Make):
        return metadata.evaluate(arg.target, [_argument(item, results) for item in arg.args], {})
    if isinstance(arg, (tuple, list)):
        return type(arg)(_argument(item, results) for item in arg)
    return arg


def _evaluate(node: Node, results: Mapping[Node, Any], exact: bool) -> Any:
    def look_up(item: Node) -> Any:
        return results[item] if item in results else concrete(metadata.value(item))

    args: Any = torch.fx.map_arg(node.args, look_up)
    kwargs: Any = torch.fx.map_arg(node.kwargs, look_up)
    target: Any = node.target
    if exact:
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), _widened)
        target = _TO_FLOAT64.get(target, target) if node.op == "call_method" else target
    return metadata.evaluate(target, args, kwargs)


def _widened(value: Any) -> Any:
    if value is torch.complex64:
        return torch.complex128
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def concrete(value: Any) -> Any:
    """A number or a size without symbols: dynamic ones as they were when the graph was traced."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        if not value.node.has_hint():
            raise CannotRun("a size is known at run time only")
        return value.node.hint if isinstance(value, torch.SymBool) else type(value.node.hint)(value.node.hint)
    if isinstance(value, (tuple, list)):
        items = [concrete(item) for item in value]
        return torch.Size(items) if isinstance(value, torch.Size) else type(value)(items)
    return value


def sizes_and_strides(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A tensor's layout without symbols."""
    return tuple(map(_integer, tensor.shape)), tuple(map(_integer, tensor.stride()))


def _integer(value: Any) -> int:
    return int(concrete(value))


def _layout(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.device} {sizes_and_strides(value)} {value.requires_grad}"
    return repr(concrete(value))


def _name(target: Any) -> str:
    return target if isinstance(target, str) else f"{getattr(target, '__module__', '')}.{target}"


def _text(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value] if value in names else repr(concrete(metadata.value(value)))
    if isinstance(value, Make):
        return f"{_name(value.target)}({_text(value.args, names)})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(item, names) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item, names)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), names)}"
    return repr(value)


def differentiable(leaves: Sequence[Node]) -> tuple[Node, ...]:
    """The leaves that autograd follows."""
    values = {leaf: metadata.value(leaf) for leaf in leaves}
    return tuple(leaf for leaf, value in values.items() if isinstance(value, Tensor) and value.requires_grad)
