"""Norms between two linears of few rows, split between both linears' kernels; see infuse.ops.split_norm.

    norm_linear(linear_add(x, ..), None, ..)  ->  sum, scaled, squares = linear_add_scale(x, ..)
                                                  scaled_linear(scaled, squares, ..)

and norm_linear_swiglu likewise. A norm of so few rows takes longer to begin and to end than to compute: on an H200 the
two of a layer of Qwen2.5 0.5B took 3.9 us of 30, at 16 rows. Only where both linears take their kernels in any case,
without a measurement.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from infuse.lowering import inductor, linears
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import library, linear_kernels, split_norm
from infuse.ops.norm_linear_swiglu import NUM_NORM_FLAGS

_OPS = torch.ops.infuse
_BEFORE = _OPS.linear_add.default
_BEHIND: dict[object, str] = {
    _OPS.norm_linear.default: "norm_linear",
    _OPS.norm_linear_swiglu.default: "norm_linear_swiglu",
}
_FAMILY = "skinny"


def split_norms(graph: Graph) -> None:
    """Rewrites the graph, which Inductor is about to lower."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=_BEFORE):
        behind = [user for user in node.users if user.target in _BEHIND and user.args[:2] == (node, None)]
        if len(behind) != 1 or not all("val" in read.meta for half in (node, *behind) for read in half.all_input_nodes):
            continue
        # The first half needs the norm's weight, where so far only the linear stands.
        weight = _norm_weight(behind[0])
        if (weight is None or places[weight] < places[node]) and _splits_well(node, behind[0]):
            _split(node, behind[0])


def _kind_and_args(node: Node) -> tuple[str, tuple[Any, ...]]:
    kind = _BEHIND.get(node.target, "linear_add")
    return kind, linear_kernels.with_defaults(kind, node.args)


def _norm_weight(behind: Node) -> Node | None:
    kind, args = _kind_and_args(behind)
    weight: Node | None = args[4 if kind == "norm_linear" else 5]
    return weight


def _splits_well(node: Node, behind: Node) -> bool:
    value = node.meta["val"]
    if inductor.settings_in_effect().kernels == "never" or library.missing(value.device):
        return False
    read = []
    for half in (node, behind):
        kind, args = _kind_and_args(half)
        given = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
        found, _ = linear_kernels.families(kind, given)
        if linears.known_family(kind, found, value.device)[0] != _FAMILY:
            return False
        read.append(linear_kernels.KINDS[kind].read(*given))
    norm_weight, features = read[1].norm_weight, value.shape[-1]
    if any(split_norm.can_split(half.x, norm_weight, features) for half in read):
        return False
    if inductor.settings_in_effect().kernels == "always":
        return True
    return heuristics.splits_norm_well(value.numel() // features, features, library.capability(value.device))


def _split(node: Node, behind: Node) -> None:
    """Puts the two halves in the places of a linear and of the norm with linears that reads it."""
    graph, (kind, args) = node.graph, _kind_and_args(behind)
    _, _, weights, biases, *rest = args
    if kind == "norm_linear":
        norm_weight, eps, weight_offset, _, eps_as_minimum, *numbers = rest
        target, arguments = _OPS.scaled_linear.default, (eps, eps_as_minimum, *numbers)
    else:
        order, norm_weight, eps, *flags = rest
        (weight_offset, _, eps_as_minimum), activation = flags[:NUM_NORM_FLAGS], flags[NUM_NORM_FLAGS]
        target, arguments = _OPS.scaled_linear_swiglu.default, (order, activation, eps, eps_as_minimum)
    with graph.inserting_before(node):
        first = graph.call_function(_OPS.linear_add_scale.default, (*node.args, norm_weight, weight_offset))
        results = [graph.call_function(operator.getitem, (first, index)) for index in range(3)]
    values = _values(node.meta["val"])
    first.meta = {**node.meta, "val": values}
    for result, value in zip(results, values):
        result.meta = {**node.meta, "val": value}
    total, scaled, squares = results
    node.replace_all_uses_with(total)
    behind.target, behind.args = target, (scaled, squares, weights, biases, *arguments)
    graph.erase_node(node)


def _values(total: Any) -> tuple[Any, Any, Any]:
    """What the first half returns."""
    squares = (*total.shape[:-1], total.shape[-1] // split_norm.SQUARES_WIDTH)
    return total, torch.empty_like(total), total.new_empty(squares, dtype=torch.float32)


def _lower(kind: str, target: torch._ops.OpOverload) -> Callable[..., Any]:
    def lower(*args: Any) -> Sequence[Any]:
        """The IR nodes of the results."""
        described = f"{'x'.join(map(str, inductor.hints(args[0])))} {args[0].get_dtype()}"
        why = "the norm is split between the kernels on both its sides"
        record(Decision(kind, described, f"{_FAMILY}_-1", why, site=inductor.current_site()))
        weights = [item for arg in args if isinstance(arg, (list, tuple)) for item in arg if inductor.is_tensor(item)]
        return inductor.call_operator(target, *args, as_they_lie=weights)

    return lower


for _kind, _target in (
    ("linear_add", _OPS.linear_add_scale.default),
    ("norm_linear", _OPS.scaled_linear.default),
    ("norm_linear_swiglu", _OPS.scaled_linear_swiglu.default),
):
    inductor.register(_target, _lower(_kind, _target))
