"""The rows of the tables of rotary factors: gathered once and first in the graph that is about to be lowered.

    layer i:  rope(q, view(index(table, [positions])), ...)  ->  index at the graph's beginning, one for equal ones

Each layer of a decoder looks its factors up by itself, and torchtune's do so for q and for k: in every layer the same
rows of the same table. Inductor makes them where they are read first, and fuses two lookups only if at most 64 nodes
lie between them: four kernels in the middle of a step of 24 layers, which are not Infuse's and so end its chains of
programmatic dependent launches. On an H200 that took 14 us of the 813 of a step of 16 rows of Qwen2.5 0.5B.

Equal ones become one. Those that differ, as where each layer has a table of its own, are fused from where they now
stand, up to 64 in a kernel, if they share positions of at least 10 bytes (score_fusion_memory_threshold), which
those of one row are not, and as far as Inductor does not move them again for the peak of memory.

Only what comes from inputs of the graph alone, by gathers and views, and is small: it lives until the last layer reads
it. What the graph returns stays, so that no two results share their memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from infuse.lowering import graph_neighbours, inductor
from infuse.ops import rope_cache_write  # noqa: F401  registers the operator

# Inductor's form of index_select, too, is aten.index.
_GATHERS = (torch.ops.aten.index.Tensor, torch.ops.aten.embedding.default)
_TABLES = ("cos", "sin", "q_cos", "q_sin", "k_cos", "k_sin")
_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
# It has no formula in the generated code, which could gather by itself: its tables are in memory in any case.
_CACHE_WRITE = torch.ops.infuse.rope_cache_write_out.default
# Of one gathered tensor: for heads of 128 in bfloat16, cos and sin of each pair together, 256 rows.
_MAX_BYTES = 64 * 1024
_FEWEST = 2


def gather_tables_first(graph: Graph) -> None:
    """Moves the gathers of tables, with their views, behind the graph's inputs, in their order, equal ones as one."""
    sources = _sources(graph)
    tables = [table for node in graph.nodes for table in _tables(node) if _gather_of(table, sources)]
    moved = {node for table in tables for node in _behind_inputs(table)}
    if sum(node.target in _GATHERS for node in moved) < _FEWEST:
        return
    _move(graph, [node for node in graph.nodes if node in moved])
    for node in graph.nodes:
        for table in _tables(node) if _operator(node) is _CACHE_WRITE else ():
            gather = _gather_of(table, sources)
            if gather is not None:
                inductor.realise_where_it_stands(gather)


def _sources(graph: Graph) -> set[Node]:
    """The inputs, and what comes from them alone by gathers of few rows and views, before anything is written."""
    found: set[Node] = set()
    for node in graph.nodes:
        if _writes(node):
            break
        if found.issuperset(node.all_input_nodes) and (node.op in ("placeholder", "get_attr") or _may_move(node)):
            found.add(node)
    return found


def _may_move(node: Node) -> bool:
    """Whether a function of inputs may be computed early and kept."""
    if node.target in _GATHERS:
        return _is_small(node) and all(reader.op != "output" for reader in graph_neighbours.readers(node))
    return graph_neighbours.is_view(node.target)


def _is_small(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
        return False
    return math.prod(value.shape) * value.itemsize <= _MAX_BYTES


def _writes(node: Node) -> bool:
    """Whether a node may write to an input. None does in the graph that AOTAutograd makes, but for copy_ at the end."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target._schema.is_mutable or target._schema.name.endswith("_")  # resize_storage_bytes_ does not declare it


def _operator(node: Node) -> object:
    """What a node calls; that of a functionalised call, which is given its arguments by name."""
    return node.args[0] if node.target is _FUNCTIONALIZED else node.target


def _tables(node: Node) -> Iterator[Node]:
    """The tables of factors that a rotary operator reads, through views."""
    operator = _operator(node)
    if isinstance(operator, torch._ops.OpOverload) and operator.namespace == "infuse":
        names = [argument.name for argument in operator._schema.arguments]
        positional = () if operator is not node.target else node.args
        given = {**dict(zip(names, positional)), **node.kwargs}
        yield from (table for name in _TABLES if isinstance(table := given.get(name), Node))


def _gather_of(node: Node, among: set[Node] | None = None) -> Node | None:
    """The gather that a node is a view of, or itself is; None for others, and for those that are not among those."""
    if among is not None and node not in among:
        return None
    while graph_neighbours.is_view(node.target) and isinstance(source := node.args[0], Node):
        node = source
    return node if node.target in _GATHERS else None


def _behind_inputs(node: Node) -> Iterator[Node]:
    """A node and what it comes from, but for the graph's inputs."""
    if node.op != "placeholder":
        yield node
        for source in node.all_input_nodes:
            yield from _behind_inputs(source)


def _move(graph: Graph, nodes: list[Node]) -> None:
    anchor = [node for node in graph.nodes if node.op == "placeholder"][-1]
    kept: dict[object, Node] = {}
    for node in nodes:
        # The arguments of nodes that come later are those that are kept.
        same = kept.setdefault((node.op, node.target, node.args, node.kwargs), node)
        if same is node:
            anchor.append(node)
            anchor = node
        else:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
