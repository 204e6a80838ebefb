"""The bookkeeping of static KV caches, done for all layers at once.

    assert cache_pos[0] + seq_len <= cache_len       torchtune, in each layer
    cache_pos.add_(seq_len)

Each is a launch that computes next to nothing, and in a decode step it stands between kernels that would otherwise
begin while the one before them ends. So the assertions become one where the first of them stood, and the counters
advance together where the last of them did. Nothing is moved across anything that touches the same memory.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from infuse.patterns import metadata
from infuse.patterns.safety import OTHER_SWITCHES, storages

_ADD = ("add_", torch.Tensor.add_, operator.iadd)
_OPERATORS = (operator.add, operator.sub, operator.le, operator.lt, operator.ge, operator.gt)
# Under torch.set_default_device they are traced as methods.
_OF_ONE_TENSOR = frozenset((operator.getitem, *_OPERATORS, *(found.__name__ for found in _OPERATORS)))
_SOURCES = ("placeholder", "get_attr")


@dataclass(frozen=True, slots=True)
class _Touches:
    """Which nodes touch a storage first and last, and how many inputs of the graph have it."""

    first: dict[int, Node]
    last: dict[int, Node]
    sources: dict[int, int]


def gather(graph: Graph, device: str = "cuda") -> int:
    """Does the bookkeeping of caches on such a device together; returns how many nodes that saves."""
    touches = _touches(graph)
    if touches is None:
        return 0
    return _assert_together(graph, touches, device) + _advance_together(graph, touches, device)


def _touches(graph: Graph) -> _Touches | None:
    """None where something in the graph is not known well enough."""
    touches = _Touches({}, {}, defaultdict(int))
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") in OTHER_SWITCHES:
            return None
        if node.op in _SOURCES:
            for storage in storages(_value(node)):
                touches.sources[storage] += 1
        elif node.op != "output" and node.users and _value(node) is None:
            return None
        for value in [_value(found) for found in node.all_input_nodes]:
            for storage in storages(value):
                touches.first.setdefault(storage, node)
                touches.last[storage] = node
    return touches


def _value(node: Node) -> Any:
    try:
        return metadata.value(node)
    except metadata.MissingMetadata:
        return None


def _own_storage(node: object, touches: _Touches, device: str) -> int | None:
    """The storage of an input of the graph on a device that no other input shares."""
    value = _value(node) if isinstance(node, Node) and node.op in _SOURCES else None
    if not isinstance(value, Tensor) or value.device.type != device:
        return None
    (storage,) = storages(value)
    return storage if storage >= 0 and touches.sources[storage] == 1 else None


def _advance_together(graph: Graph, touches: _Touches, device: str) -> int:
    groups: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target not in _ADD or len(node.args) != 2 or node.kwargs or node.users:
            continue
        counter, amount = node.args
        storage = _own_storage(counter, touches, device)
        if storage is None or type(amount) is not int or touches.last[storage] is not node:
            continue
        value = _value(counter)
        if not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
            groups[amount, value.dtype, value.device].append(node)
    return sum(_advance(graph, nodes) for nodes in groups.values() if len(nodes) > 1)


def _advance(graph: Graph, nodes: list[Node]) -> int:
    counters, amount = [node.args[0] for node in nodes], nodes[-1].args[1]
    with graph.inserting_after(nodes[-1]):
        together = graph.call_function(torch._foreach_add_, (counters, amount))
    together.meta = {**nodes[-1].meta, "example_value": None}
    for node in nodes:
        graph.erase_node(node)
    return len(nodes) - 1


def _assert_together(graph: Graph, touches: _Touches, device: str) -> int:
    """Each condition depends on one input alone, which nothing has touched before."""
    groups: dict[str, list[tuple[Node, list[Node]]]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is torch._assert_async and not node.kwargs:
            chain = _chain(node)
            storage = _own_storage(chain[0].args[0], touches, device) if chain else None
            if storage is not None and touches.first[storage] is chain[0]:
                groups[str(node.args[1:])].append((node, chain))
    return sum(_assert(graph, found) for found in groups.values() if len(found) > 1)


def _chain(node: Node) -> list[Node]:
    """The nodes that make an assertion's condition out of an input of the graph, in order; [] for another condition."""
    chain: list[Node] = []
    found = node.args[0]
    while isinstance(found, Node) and found.op not in _SOURCES:
        if found.target not in _OF_ONE_TENSOR or len(found.all_input_nodes) != 1 or len(found.users) != 1:
            return []
        chain.insert(0, found)
        found = found.args[0]
    value = _value(chain[-1]) if chain else None
    if not isinstance(found, Node) or not isinstance(value, Tensor):
        return []
    return chain if value.dtype == torch.bool and value.dim() == 0 else []


def _assert(graph: Graph, found: list[tuple[Node, list[Node]]]) -> int:
    first, chain = found[0]
    condition = chain[-1]
    for node, others in found[1:]:
        graph.erase_node(node)
        for other in others:
            first.prepend(other)
        with graph.inserting_before(first):
            both = graph.call_function(operator.and_, (condition, others[-1]))
        both.meta = dict(condition.meta)
        condition = both
    first.args = (condition, *first.args[1:])
    return len(found) - 1
