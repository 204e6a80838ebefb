"""Two rotations by the same angles, q's and k's, joined in the graph that is about to be lowered.

The rewrite before autograd leaves one operator for each tensor, so that each is a site of its own and has its own
gradient. Behind autograd this pass joins them, forward and backward alike: one kernel is launched for both.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from infuse.lowering import graph_neighbours, inductor
from infuse.ops import qk_norm_rope_bwd, rope_pair  # noqa: F401  registers the operators
from infuse.report import SITE_KEY

# Between the rotations of q and k of a layer lie views, the projection and the norm of k.
_MAX_BETWEEN = 64
_OPS = torch.ops.infuse


def pair_rotations(graph: Graph) -> None:
    """Joins each rotation with the next one by the same angles, where neither needs the other's result."""
    waiting: dict[tuple[object, ...], Node] = {}
    for node in tuple(graph.nodes):
        key = _key(node)
        if key is None:
            continue
        first = waiting.pop(key, None)
        if first is None or not _join(first, node):
            waiting[key] = node


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Arguments of a rotation that has a kernel, or of its gradient.

    own: the tensors that two rotations of a pair have each: x, or dy and x. tables: cos and sin. numbers: what stands
    behind the weights in the pair's arguments. pair: the operator for both; results: how many each has.
    """

    own: tuple[Any, ...]
    tables: tuple[Any, Any]
    weight: Any
    numbers: tuple[Any, ...]
    pair: Any
    results: int


def _read(node: Node) -> _Rotation | None:
    """None for any other node."""
    if node.kwargs:
        return None
    if node.target in (_OPS.rope.default, _OPS.rope_bwd.default):
        x, cos, sin, *given = node.args
        filled = (*given, *(False for _ in range(4 - len(given))))
        numbers = (None, 0.0, False, *filled, node.target is _OPS.rope_bwd.default, -1)
        return _Rotation((x,), (cos, sin), None, numbers, _OPS.rope_pair.default, 1)
    if node.target is _OPS.qk_norm_rope.default:
        x, cos, sin, weight, bias, eps, centered, offset, cast, eps_as_minimum, *flags = node.args
        if bias is None and not centered and not eps_as_minimum:
            return _Rotation(
                (x,), (cos, sin), weight, (eps, offset, cast, *flags, False, -1), _OPS.rope_pair.default, 1
            )
    if node.target is _OPS.qk_norm_rope_bwd.default:
        dy, x, cos, sin, weight, *rest = node.args
        return _Rotation((dy, x), (cos, sin), weight, (*rest,), _OPS.qk_norm_rope_pair_bwd.default, 2)
    return None


def _key(node: Node) -> tuple[object, ...] | None:
    """What two rotations must have in common; None for other nodes."""
    found = _read(node)
    value = None if found is None else found.own[0].meta.get("val")
    if found is None or not isinstance(value, torch.Tensor):
        return None
    tables = (_same(table) for table in found.tables)
    row_size = str(value.shape[-1])  # may be symbolic, and is then no key
    return node.target, value.dtype, value.device, value.dim(), row_size, *tables, found.weight is None, *found.numbers


def _same(value: object) -> object:
    """Equal for nodes that are the same view of the same node."""
    if isinstance(value, (list, tuple)):
        return tuple(_same(item) for item in value)
    if isinstance(value, Node) and graph_neighbours.is_view(value.target) and not value.kwargs:
        return value.target, _same(value.args)
    return value


def _join(first: Node, second: Node) -> bool:
    """Puts the pair in second's place; False, and no change, if second needs first, or they are far apart."""
    between = _between(first, second)
    if between is None:
        return False
    behind = {first: None}
    for node in between:
        if any(argument in behind for argument in node.all_input_nodes):
            behind[node] = None
    if any(argument in behind for argument in second.all_input_nodes) or any(node.is_impure() for node in behind):
        return False
    _, *moved = behind
    _replace(first, second, moved)
    return True


def _replace(first: Node, second: Node, moved: Sequence[Node]) -> None:
    """moved: the nodes between the two that need first; they come behind the pair."""
    ours, theirs = _read(first), _read(second)
    assert ours is not None and theirs is not None
    args = (*ours.own, *theirs.own, *ours.tables, ours.weight, theirs.weight, *ours.numbers)
    with second.graph.inserting_before(second):
        pair = second.graph.call_function(ours.pair, args)
    pair.meta = {**second.meta, "val": tuple(value for node in (first, second) for value in _values(node))}
    inductor.set_sites(pair, [site for node in (first, second) if (site := node.meta.get("custom", {}).get(SITE_KEY))])
    anchor = pair
    for index, node in enumerate((first, second)):
        for result in range(ours.results):
            olds = [node] if ours.results == 1 else [user for user in node.users if user.args[1] == result]
            for old in olds:
                with second.graph.inserting_after(anchor):
                    anchor = second.graph.call_function(operator.getitem, (pair, index * ours.results + result))
                anchor.meta = dict(old.meta)
                old.replace_all_uses_with(anchor)
                if old is not node:
                    moved = [other for other in moved if other is not old]
                    second.graph.erase_node(old)
        second.graph.erase_node(node)
    for node in moved:
        anchor.append(node)
        anchor = node


def _values(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _between(first: Node, second: Node) -> list[Node] | None:
    """The nodes that stand between two; None if there are too many."""
    found: list[Node] = []
    node = first.next
    while node is not second:
        if len(found) == _MAX_BETWEEN or node.op == "root":
            return None
        found.append(node)
        node = node.next
    return found
