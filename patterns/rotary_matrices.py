"""Rotations of pairs by matrices of two by two, y = M[..., 0] * x1 + M[..., 1] * x2, as Flux has them.

    M[..., 0] = (cos, sin), M[..., 1] = (-sin, cos)

The operator takes cos and sin. That the elements of a matrix are no more than these two is read from the nodes that
make the matrices; matrices that come in as an input are anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.lanes import Codes, Lanes, same_tensor
from infuse.patterns.sizes import broadcasts_to, same_shape, same_size

# How often a table's leading dimensions may be viewed anew.
_MAX_VIEWS = 4


@dataclass(frozen=True, slots=True)
class Column:
    """A product of one element of each pair with a column of the matrices.

    x: codes of that element [R / 2]. leaf: the tensor they are of. table: the column, [..., R / 2, 2].
    """

    product: Node
    leaf: Node
    x: Codes
    table: Node


def is_candidate(view: CanonicalGraph, node: Node) -> bool:
    """Whether a node may be the sum of the two columns, by shapes and words alone."""
    operands = view.operands(node, "add")
    shape = view.shape(node) if operands is not None else ()
    if operands is None or len(shape) < 3 or not same_size(shape[-1], 2):
        return False
    return all(_factors(view, operand) is not None for operand in operands)


def columns(view: CanonicalGraph, lanes: Lanes, node: Node) -> tuple[Column, Column] | None:
    """The two products of a sum [*lead, R / 2, 2], the one with x1 first; None if they are none."""
    operands = view.operands(node, "add")
    if operands is None:
        return None
    found = [_column(view, lanes, node, operand) for operand in operands]
    first, second = found
    if first is None or second is None or first.leaf is not second.leaf:
        return None
    return (first, second) if first.x[0] < second.x[0] else (second, first)


def _factors(view: CanonicalGraph, operand: object) -> tuple[Node, Node] | None:
    """(one element of each pair [..., R / 2, 1], the column it is multiplied by [..., R / 2, 2]) of a product."""
    factors = view.operands(operand, "mul")
    if factors is None or not all(isinstance(factor, Node) and view.shape(factor) for factor in factors):
        return None
    for x, table in (factors, factors[::-1]):
        if same_size(view.shape(x)[-1], 1) and same_size(view.shape(table)[-1], 2):
            return x, table
    return None


def _column(view: CanonicalGraph, lanes: Lanes, total: Node, operand: object) -> Column | None:
    factors = _factors(view, operand)
    if factors is None or not isinstance(operand, Node) or view.dtype(operand) != view.dtype(total):
        return None
    x, table = factors
    shape = view.shape(total)
    if not same_shape(view.shape(operand), shape) or not same_shape(view.shape(x), (*shape[:-1], 1)):
        return None
    if len(view.shape(table)) < 2 or not broadcasts_to(view.shape(table), shape):
        return None
    codes = lanes.read(x)
    if codes is None or codes.size == 0 or np.unique(lanes.owners(codes)).size != 1:
        return None
    return Column(operand, lanes.leaves[lanes.owners(codes).flat[0]], codes.ravel(), table)


def turns(view: CanonicalGraph, first: Node, second: Node) -> list[Node] | None:
    """The nodes that prove the columns `first` and `second` to be (a, b) and (-b, a); None without a proof."""
    rank = len(view.shape(first))
    if rank != len(view.shape(second)):
        return None
    lanes = Lanes(view, rank - 2)
    read = lanes.read(first), lanes.read(second)
    if read[0] is None or read[1] is None:
        return None
    codes: Codes = np.stack([read[0], read[1]], axis=-1)  # [R / 2, row, column]
    trail = [node for node, _ in lanes.visited]
    for _ in range(_MAX_VIEWS):
        if _is_turn(view, lanes, codes, trail):
            return trail
        inner = _before_view(view, lanes, codes)
        if inner is None:
            return None
        lanes, codes = inner
        trail += [node for node, _ in lanes.visited]
    return None


def _is_turn(view: CanonicalGraph, lanes: Lanes, codes: Codes, trail: list[Node]) -> bool:
    same = _are_same(view, lanes, codes[:, 0, 0], codes[:, 1, 1], trail)
    return same and _are_same(view, lanes, codes[:, 1, 0], -codes[:, 0, 1], trail)


def _are_same(view: CanonicalGraph, lanes: Lanes, left: Codes, right: Codes, trail: list[Node]) -> bool:
    """Whether two rows of codes are the same elements, maybe of two tensors that were computed alike."""
    owners = [lanes.owners(codes) for codes in (left, right)]
    starts = np.array(lanes.starts)
    places = [np.sign(codes) * (np.abs(codes) - starts[own] + 1) for codes, own in zip((left, right), owners)]
    if not np.array_equal(*places):
        return False
    pairs = set(zip(*(own.tolist() for own in owners)))
    return all(one == other or same_tensor(view, lanes.leaves[one], lanes.leaves[other], trail) for one, other in pairs)


def _before_view(view: CanonicalGraph, lanes: Lanes, codes: Codes) -> tuple[Lanes, Codes] | None:
    """The same codes of what their one leaf is a view of, if the view is of leading dimensions only."""
    owners = np.unique(lanes.owners(codes))
    leaf = lanes.leaves[owners[0]]
    call = view.call(leaf, "reshape", "expand", "alias") if owners.size == 1 else None
    if call is None or not isinstance(call["input"], Node):
        return None
    trailing = len(view.shape(leaf)) - lanes.lead
    source = call["input"]
    lead = len(view.shape(source)) - trailing
    if lead < 0 or not same_shape(view.shape(source)[lead:], view.shape(leaf)[lanes.lead :]):
        return None
    inner = Lanes(view, lead)
    held = inner.read(source)
    if held is None:
        return None
    return inner, np.sign(codes) * held.ravel()[np.abs(codes) - lanes.span(leaf)[0]]
