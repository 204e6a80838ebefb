"""K and V heads: reading a tensor through transpositions, and folding away the copies that grouped-query attention
makes.

The operator reads K/V head h // (H / H_kv) for q head h, as `repeat_interleave(kv, H // H_kv, dim=1)` lays them out.
`kv.repeat` orders them otherwise, and is folded only where there is a single head to repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Make
from infuse.patterns.sizes import Size, same_shape, same_size


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor [B, H, T, D] as a permutation of a node: its dimension i is the node's dimension order[i].

    trail: the nodes between the tensor and the node.
    """

    node: Node
    order: tuple[int, ...] = (0, 1, 2, 3)
    trail: tuple[Node, ...] = ()

    def argument(self) -> Node | Make:
        """The tensor as an operator's argument."""
        return self.node if self.order == (0, 1, 2, 3) else Make(torch.permute, (self.node, self.order))

    def shape(self, view: CanonicalGraph) -> tuple[Size, ...]:
        """[B, H, T, D]"""
        own = view.shape(self.node)
        return tuple(own[dim] for dim in self.order)


def transposed(view: CanonicalGraph, node: Node) -> Source:
    """The last two dimensions of a [B, H, D, T] node swapped: an existing [B, H, T, D] node if it was made from one.

    Right whichever of the two the author calls K: what matters is that the scores are the product with `node`.
    """
    swapped = Source(node, (0, 1, 3, 2))
    source = swapped
    while (below := _below(view, source)) is not None:
        source = below
        if source.order == (0, 1, 2, 3):
            return source
    return swapped


def _below(view: CanonicalGraph, source: Source) -> Source | None:
    """The same tensor read one transposition (or copy) deeper."""
    call = view.call(source.node, "alias", "permute")
    if call is None or len(view.shape(call["input"])) != 4:
        return None
    order = source.order if call.name == "alias" else tuple(call["dims"][dim] for dim in source.order)
    return Source(call["input"], order, (*source.trail, source.node))


def folded(view: CanonicalGraph, source: Source) -> tuple[Source, Size] | None:
    """(the tensor with H_kv heads, how often each is repeated); None for a tensor whose heads were not repeated."""
    current: Source | None = source
    while current is not None:
        found = _fold_here(view, current)
        if found is not None:
            return found
        current = _below(view, current)
    return None


def _fold_here(view: CanonicalGraph, source: Source) -> tuple[Source, Size] | None:
    call = view.call(source.node, "repeat_interleave", "reshape", "expand", "repeat")
    if call is None:
        return None
    axis, node = source.order[1], source.node
    if call.name == "reshape":
        return _fold_expanded(view, source, call["input"], axis)
    base, after = call["input"], view.shape(node)
    before = view.shape(base)
    if len(before) != 4 or len(after) != 4:
        return None
    if any(not same_size(before[dim], after[dim]) for dim in range(4) if dim != axis):
        return None
    if call.name == "repeat_interleave":
        repeats = call["repeats"]
        if call["dim"] != (axis,) or type(repeats) is not int or not same_size(before[axis] * repeats, after[axis]):
            return None
    elif not same_size(before[axis], 1):
        return None  # Several heads repeated as a block: another order.
    else:
        repeats = after[axis]
    return Source(base, source.order, (*source.trail, node)), repeats


def _fold_expanded(view: CanonicalGraph, source: Source, wide: Node, axis: int) -> tuple[Source, Size] | None:
    """unsqueeze behind the head axis, expand, and flatten of the two: repeat_interleave in three steps."""
    trail = [*source.trail, source.node]
    expanded = view.strip(wide, trail=trail)
    call = view.call(expanded, "expand")
    if call is None:
        return None
    trail.append(expanded)
    single = call["input"]
    narrow, many, flat = view.shape(single), view.shape(expanded), view.shape(source.node)
    if len(many) != 5 or len(narrow) != 5 or len(flat) != 4:
        return None
    heads, repeats = many[axis], many[axis + 1]
    split = (*flat[:axis], heads, repeats, *flat[axis + 1 :])
    if not same_shape(split, many) or not same_size(heads * repeats, flat[axis]):
        return None
    if not same_shape(narrow, (*many[: axis + 1], 1, *many[axis + 2 :])):
        return None
    made = view.call(single, "reshape")
    if made is None or not same_shape(view.shape(made["input"]), (*narrow[: axis + 1], *narrow[axis + 2 :])):
        return None
    return Source(made["input"], source.order, (*trail, single)), repeats
