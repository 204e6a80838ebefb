"""Rotary position embedding, in halves or interleaved, real or complex.

A site is found from what is rare: the node that joins a rotated copy of x (x * cos + cat(-x2, x1) * sin), or the
result (cat(x1 * cos - x2 * sin, ...), view_as_real of a complex product). Which element then meets which is read off
(`rotary_terms`), so that it does not matter how the parts were cut out. Of cos and sin nothing has to be known but
shapes and dtypes, and that both elements of a pair meet the same ones where the operator has one for the two. A sum of
products with matrices is found by its shapes (`rotary_matrices`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Node

from infuse.ops.rope import compute_dtype
from infuse.patterns import rotary_matrices
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.lanes import Lanes, same_tensor
from infuse.patterns.rotary_terms import Part, Rotation, Sum, resembles, rotation_of, sum_of_terms
from infuse.patterns.sites import Finding, Make, Refusal, Site

KIND = "rope"
ANCHORS = ("cat", "stack", "view_as_real", "add")
# How far a value is followed to what it becomes.
_MAX_STEPS = 6
_STRUCTURAL = ("reshape", "alias", "cast", "cat", "stack")
_REMEDY = "rotate pairs (x1, x2) to (x1 * cos - x2 * sin, x2 * cos + x1 * sin), of sizes that are plain numbers"


def may_be_rotation(view: CanonicalGraph, anchor: Node) -> bool:
    """Whether a sum is one of two products, by the words alone; True for other anchors."""
    return view.word(anchor) != "add" or [view.word(node) for node in anchor.all_input_nodes] == ["mul", "mul"]


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The rotary embedding around an anchor; None if there is none."""
    start = _start(view, anchor)
    if start is None:
        return None
    root, nodes = start
    if root is not anchor and not isinstance(view.shape(root)[-1], int):
        return Refusal(KIND, anchor, "the size of the last dimension is symbolic", "keep the head dimension static")
    trailing = 2 if view.word(anchor) == "add" else 1
    lanes = Lanes(view, len(view.shape(nodes[0])) - trailing)
    sums = [item for node in nodes if (item := sum_of_terms(view, lanes, node)) is not None]
    if len(sums) != len(nodes) or not resembles(sums):
        return None
    best: Site | None = None
    reason = "the elements of x that meet cos and sin are not those of the pairs of a rotation"
    for level in _levels(view, root):
        found = _at(view, lanes, level, sums)
        if isinstance(found, Site):
            best = found if best is None or not found.after else best
        elif found:
            reason = found
    return best or Refusal(KIND, anchor, reason, _REMEDY)


def _start(view: CanonicalGraph, anchor: Node) -> tuple[Node, list[Node]] | None:
    """(the first node behind the rotation, the sums or the complex product that it consists of)."""
    call = view.call(anchor, *ANCHORS)
    if call is None:
        return None
    if call.name == "view_as_real":
        return _complex_start(view, anchor, call["input"])
    if call.name == "add":
        return (anchor, [anchor]) if rotary_matrices.is_candidate(view, anchor) else None
    tensors = call["tensors"]
    if not isinstance(tensors, (tuple, list)) or not 2 <= len(tensors) <= 3:
        return None
    behind = [_behind(view, tensor) for tensor in tensors]
    if any(_is_negative(view, node) for node in behind):
        total = _sum_with(view, anchor)
        return None if total is None else (total, [total])
    parts = [part for node in behind if (part := view.call(node, "real", "imag")) is not None]
    if len(parts) == 2 and parts[0]["input"] is parts[1]["input"]:
        return _complex_start(view, anchor, parts[0]["input"])
    sums = [node for node in behind if isinstance(node, Node) and _is_sum(view, node)]
    return (anchor, sums) if len(sums) == 2 else None


def _complex_start(view: CanonicalGraph, anchor: Node, value: object) -> tuple[Node, list[Node]] | None:
    product = view.strip(value)
    return (anchor, [product]) if view.call(product, "mul") is not None else None


def _behind(view: CanonicalGraph, node: object) -> object:
    """The value behind what only reshapes or casts it."""
    for _ in range(_MAX_STEPS):
        call = view.call(node, "reshape", "alias", "cast")
        if call is None:
            break
        node = call["input"]
    return node


def _is_negative(view: CanonicalGraph, node: object) -> bool:
    call = view.call(node, "neg", "mul")
    return call is not None and (call.name == "neg" or call["other"] == -1)


def _is_sum(view: CanonicalGraph, node: object) -> bool:
    return view.operands(node, "add") is not None or view.operands(node, "sub") is not None


def _sum_with(view: CanonicalGraph, rotated: Node) -> Node | None:
    """The sum that a product with the rotated copy of x goes into."""
    pending: list[tuple[Node, bool]] = [(rotated, False)]
    for _ in range(_MAX_STEPS):
        if not pending:
            break
        node, multiplied = pending.pop(0)
        for reader in view.readers(node):
            if multiplied and _is_sum(view, reader):
                return reader
            call = view.call(reader, "mul", "reshape", "alias", "cast", "neg")
            if call is not None and (call.name == "mul" or call["input"] is node):
                pending.append((reader, multiplied or call.name == "mul"))
    return None


def _levels(view: CanonicalGraph, root: Node) -> Iterator[Node]:
    """The root, and what it becomes while nobody else reads it: reshaped, cast, joined with what was passed through."""
    node = root
    for _ in range(_MAX_STEPS):
        yield node
        readers = view.readers(node)
        if len(readers) != 1 or view.call(readers[0], *_STRUCTURAL) is None:
            return
        node = readers[0]


def _at(view: CanonicalGraph, lanes: Lanes, level: Node, sums: Sequence[Sum]) -> Site | str:
    """The site whose result is `level`, or what is wrong with it; "" if it is no result of a rotation."""
    if len(view.shape(level)) - lanes.lead not in (1, 2):
        return ""
    codes = lanes.read(level, narrowing=view.dtype(level))
    # Pairs whose elements are not joined, [..., R / 2, 2] or [..., 2, R / 2], are taken apart behind the operator.
    after = () if codes is None or codes.ndim == 1 else ((torch.unflatten, (-1, codes.shape)),)
    rotation = None if codes is None else rotation_of(lanes, codes.ravel(), sums)
    if rotation is None:
        return ""
    tables = _tables(view, rotation)
    if isinstance(tables, str):
        return tables
    if [_function(view, table) for table in tables.nodes] == ["sin", "cos"]:
        return "cos and sin have changed places"
    computed = view.dtype(rotation.sums[0].node)
    if computed is not None and computed.is_complex:
        computed = computed.to_real()
    flags = _rounding(view.dtype(rotation.leaf), computed, view.dtype(level), tables.dtypes)
    if flags is None:
        return "its result has neither the dtype of x nor that of the products, or the products are rounded otherwise"
    x_dtype, upcast = flags
    x = _x(view, lanes, rotation, x_dtype)
    if x is None:
        return "the elements of x are not next to each other in one tensor"
    args = (x, tables.cos, tables.sin, rotation.interleaved, tables.per_pair, rotation.inverse, upcast)
    factors = [part.table for part in (*rotation.cos, *rotation.sin)]
    ends = {rotation.leaf, *(node for node in (x, *tables.nodes, *factors) if isinstance(node, Node))}
    interior = _between(lanes, level, tables.compared, ends)
    return Site(KIND, (level,), level, args, interior, _words(rotation, upcast), after=after)


@dataclass(frozen=True, slots=True)
class _Tables:
    """The operator's cos and sin. nodes: what they are made of. compared: nodes that were found to be equal."""

    cos: Node | Make
    sin: Node | Make
    per_pair: bool
    dtypes: tuple[torch.dtype, torch.dtype]
    nodes: tuple[Node, Node]
    compared: tuple[Node, ...] = ()


def _tables(view: CanonicalGraph, rotation: Rotation) -> _Tables | str:
    """cos and sin as the operator's arguments, or what is wrong with them."""
    cos, sin = rotation.cos[0].table, rotation.sin[0].table
    if rotation.sums[0].is_complex:
        dtype = view.dtype(cos)
        assert dtype is not None
        pair = Make(torch.view_as_real, (cos,))
        parts = [Make(torch.select, (pair, -1, part)) for part in range(2)]
        return _Tables(parts[0], parts[1], True, (dtype.to_real(), dtype.to_real()), (cos, cos))
    if rotation.sums[0].is_matrix:
        return _columns(view, cos, sin)
    per_pair, compared = len(rotation.sums) == 2, list[Node]()
    if per_pair and not all(
        same_tensor(view, parts[0].table, parts[1].table, compared) for parts in (rotation.cos, rotation.sin)
    ):
        whole_cos, whole_sin = (_whole(view, rotation, parts) for parts in (rotation.cos, rotation.sin))
        if whole_cos is None or whole_sin is None:
            return "the two elements of a pair meet different cos or sin"
        cos, sin, per_pair, compared = whole_cos, whole_sin, False, []
    dtypes = view.dtype(cos), view.dtype(sin)
    if dtypes[0] is None or dtypes[1] is None or not all(dtype.is_floating_point for dtype in dtypes if dtype):
        return "cos and sin are not of floating point"
    return _Tables(cos, sin, per_pair, (dtypes[0], dtypes[1]), (cos, sin), tuple(compared))


def _columns(view: CanonicalGraph, first: Node, second: Node) -> _Tables | str:
    """cos and sin out of the first column of matrices that turn."""
    proof = rotary_matrices.turns(view, first, second)
    dtype = view.dtype(first)
    if proof is None or dtype is None or view.dtype(second) != dtype:
        return "the matrices are not proven to be (cos, -sin; sin, cos)"
    cos, sin = (Make(torch.select, (first, -1, row)) for row in range(2))
    return _Tables(cos, sin, True, (dtype, dtype), (first, second), tuple(proof))


def _whole(view: CanonicalGraph, rotation: Rotation, parts: Sequence[Part]) -> Node | None:
    """The table [..., R] of which the two sums' tables are the parts that belong to their elements."""
    leads = {len(view.shape(part.table)) - 1 for part in parts}
    lanes = Lanes(view, leads.pop())
    if leads:
        return None
    wanted = np.empty_like(rotation.owner)
    for number, part in enumerate(parts):
        codes = lanes.read(part.table)
        if codes is None:
            return None
        wanted[rotation.owner == number] = codes
    dtype = view.dtype(parts[0].table)
    return None if dtype is None else lanes.node_with(wanted, dtype)


def _function(view: CanonicalGraph, table: object) -> str:
    """ "cos" or "sin" if a table is made by it in the graph, "" if that is not known."""
    for _ in range(_MAX_STEPS * 2):
        call = view.call(table)
        if call is None or call.name in ("cos", "sin"):
            return "" if call is None else call.name
        table = call["input"]
    return ""


def _rounding(
    x: torch.dtype | None,
    computed: torch.dtype | None,
    out: torch.dtype | None,
    tables: tuple[torch.dtype, torch.dtype],
) -> tuple[torch.dtype, bool] | None:
    """(dtype of the operator's x, upcast) under which the operator rounds just as the source does."""
    for candidate in (x, computed):
        for upcast in (False, True):
            if candidate is not None and candidate == out and compute_dtype(candidate, *tables, upcast) == computed:
                return candidate, upcast
    return None


def _x(view: CanonicalGraph, lanes: Lanes, rotation: Rotation, dtype: torch.dtype) -> Node | Make | None:
    """The tensor that holds the elements of x in their order."""
    codes, leaf = rotation.x, rotation.leaf
    node = lanes.node_with(codes, dtype)
    if node is not None:
        return node
    first, (start, end) = int(codes.min()), lanes.span(leaf)
    trailing = len(view.shape(leaf)) - lanes.lead
    if trailing < 1 or lanes.is_complex(leaf):
        return None
    x: Node | Make = leaf if trailing == 1 else Make(torch.flatten, (leaf, -trailing, -1))
    if (first, codes.size) != (start, end - start):
        x = Make(torch.narrow, (x, -1, first - start, codes.size))
    if view.dtype(leaf) != dtype:
        x = Make(torch.ops.aten.to.dtype, (x, dtype))
    order = codes - first
    if np.array_equal(order, np.arange(order.size)):
        return x
    for sizes in ((order.size // 2, 2), (2, order.size // 2)):
        # Pairs side by side in x and apart in the result, or the other way round.
        if np.array_equal(order, np.arange(order.size).reshape(sizes).T.ravel()):
            turned = Make(torch.transpose, (Make(torch.unflatten, (x, -1, sizes)), -1, -2))
            return Make(torch.flatten, (turned, -2, -1))
    return None


def _between(lanes: Lanes, level: Node, compared: Sequence[Node], ends: set[Node]) -> tuple[Node, ...]:
    """The nodes from the site's inputs to its result, among those that were looked at, and what was compared."""
    found: dict[Node, None] = {}
    pending = [level]
    known = {node for node, _ in lanes.visited}
    while pending:
        node = pending.pop()
        if node not in ends and node not in found:
            found[node] = None
            pending += [source for source in node.all_input_nodes if source in known or _is_arithmetic(lanes, source)]
    return tuple(dict.fromkeys([*found, *compared]))


def _is_arithmetic(lanes: Lanes, node: Node) -> bool:
    return lanes.view.call(node, "mul", "neg", "add", "sub", "split") is not None


def _words(rotation: Rotation, upcast: bool) -> str:
    """How the author wrote it."""
    sums = rotation.sums
    formula = "x1 * cos - x2 * sin" if len(sums) == 2 else "x * cos + rotated * sin"
    if sums[0].is_paired:
        formula = "complex" if sums[0].is_complex else "matrices"
    parts = ["interleaved" if rotation.interleaved else "halves", formula]
    rotary, size = rotation.owner.size, rotation.x.size
    if rotary < size:
        parts.append(f"{rotary} of {size} elements")
    if rotation.inverse:
        parts.append("inverse")
    if upcast:
        parts.append("in float32")
    return ", ".join(parts)
