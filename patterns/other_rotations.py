"""Rotary embeddings that are put together in ways the matcher does not read: seen, named and left as they are."""

from __future__ import annotations

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Refusal

KIND = "rope"
ANCHORS = ("sub", "roll")
# Products with signs, sine and a cast lie between the rolled half and the sum.
_MAX_STEPS = 4


def match(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    """A refusal for x1 * cos - x2 * sin that is written into a slice, and for x * cos + roll(x) * signs * sin."""
    if view.word(anchor) == "sub":
        return _written(view, anchor)
    return _rolled(view, anchor)


def may_be_rotation(view: CanonicalGraph, anchor: Node) -> bool:
    """Whether the words around an anchor are those of a rotation."""
    if view.word(anchor) == "roll":
        return True
    products = [view.word(node) for node in anchor.all_input_nodes] == ["mul", "mul"]
    return products and any(_is_write(reader) for reader in anchor.users)


def _is_write(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "setitem"


def _written(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    factors = [view.operands(operand, "mul") or () for operand in view.operands(anchor, "sub") or ()]
    sources = [{_whole(view, factor) for factor in pair} - {None} for pair in factors]
    if len(sources) != 2 or not sources[0] & sources[1]:
        return None
    return Refusal(
        KIND,
        anchor,
        "the rotated parts are written into slices of another tensor",
        "put them together by torch.cat or torch.stack",
    )


def _whole(view: CanonicalGraph, node: object) -> Node | None:
    """What a value is a slice of, along the last dimension."""
    call = view.call(node, "slice", "getitem", "chunk", "split")
    source = call["input"] if call is not None else None
    return source if isinstance(source, Node) else None


def _rolled(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    call = view.call(anchor, "roll")
    shape = view.shape(anchor)
    if (
        call is None
        or not shape
        or type(shape[-1]) is not int
        or call["shifts"] not in (shape[-1] // 2, [shape[-1] // 2])
    ):
        return None
    node = anchor
    for _ in range(_MAX_STEPS):
        readers = view.readers(node)
        if len(readers) != 1:
            return None
        terms = view.operands(readers[0], "add")
        if terms is not None:
            other = terms[1] if terms[0] is node else terms[0]
            factors = view.operands(other, "mul") or ()
            if not any(view.same_value(factor, call["input"], []) for factor in factors):
                return None
            return Refusal(
                KIND,
                anchor,
                "the turned half is made by roll and signs, which are not known to be -1 and 1",
                "write torch.cat((-x2, x1), dim=-1)",
            )
        if view.call(readers[0], "mul", "cast") is None:
            return None
        node = readers[0]
    return None
