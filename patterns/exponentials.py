"""Softmaxes that are written by exponentials in a way that no operator takes: seen, named and left as they are."""

from __future__ import annotations

from torch.fx import Node

from infuse.patterns.attention import refuse
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.contractions import PRODUCTS
from infuse.patterns.score_steps import reaches_product
from infuse.patterns.sites import Refusal

ANCHORS = ("exp",)
# From the exponentials to the product with v, or to the quotient behind it.
_MAX_STEPS = 4
_LATE = ("the product with v is divided by the sum of the exponentials", "write softmax(scores) @ v")
_MORE = (
    "something is added to the sum of the exponentials",
    "write the addition as one more score, a sink, and softmax",
)


def match(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    """A refusal for exp(q k^T) whose sum divides it late, or with something added."""
    totals = [reader for reader in view.readers(anchor) if view.call(reader, "sum") is not None]
    if len(totals) != 1 or not reaches_product(view, anchor):
        return None
    quotient = _step(view, _past(view, totals[0]), "div")
    if quotient is not None and _comes_of_product(view, quotient):
        return refuse(anchor, *_LATE)
    added = _step(view, totals[0], "add")
    quotient = None if added is None else _step(view, added, "div")
    if quotient is not None and any(view.call(reader, *PRODUCTS) for reader in view.readers(quotient)):
        return refuse(anchor, *_MORE)
    return None


def is_summed(view: CanonicalGraph, anchor: Node) -> bool:
    """Whether exponentials are summed and read elsewhere, by the words alone."""
    readers = [view.word(reader) for reader in view.readers(anchor)]
    return len(readers) > 1 and "sum" in readers


def _step(view: CanonicalGraph, node: Node, name: str) -> Node | None:
    return next((reader for reader in view.readers(node) if view.call(reader, name) is not None), None)


def _past(view: CanonicalGraph, node: Node) -> Node:
    """Through views to what divides or is divided."""
    for _ in range(_MAX_STEPS):
        following = _step(view, node, "reshape")
        if following is None:
            return node
        node = following
    return node


def _comes_of_product(view: CanonicalGraph, quotient: Node) -> bool:
    operands = view.operands(quotient, "div")
    return operands is not None and view.call(operands[0], *PRODUCTS) is not None
