"""Tests in a graph for rows of scores that are masked whole, by which a softmax is made safe."""

from __future__ import annotations

import math

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.scales import constant
from infuse.patterns.score_masks import Filled, negated


def plain(view: CanonicalGraph, condition: object, where: bool) -> tuple[object, bool]:
    """A condition without negations, and whether it is set or not where it counts."""
    while isinstance(condition, Node) and (inner := negated(view, condition)) is not None:
        condition, where = inner, not where
    return condition, where


def test_of_scores(view: CanonicalGraph, condition: object, where: bool, scores: Node) -> list[Node] | None:
    """The nodes of a test whether all scores of a row are -inf, the outermost first; None if it is none."""
    condition, where = plain(view, condition, where)
    reduced = _reduced(view, condition, "all" if where else "any")
    if reduced is None or not isinstance(condition, Node):
        return None
    inner, is_masked = plain(view, reduced, where)
    name = _name(inner)
    if not isinstance(inner, Node) or not inner.args or inner.args[0] is not scores:
        return None
    compares = name in ("eq", "ne") and len(inner.args) == 2 and constant(view, inner.args[1]) == -math.inf
    if compares:
        is_masked = is_masked == (name == "eq")
    elif name not in ("isinf", "isneginf"):
        return None
    return [condition, inner] if is_masked else None


def is_test_of_mask(view: CanonicalGraph, condition: object, where: bool, term: Filled) -> bool:
    """Whether a condition says that a row is overwritten whole, or, element by element, what is overwritten."""
    wanted = plain(view, term.condition, term.where)
    condition, where = plain(view, condition, where)
    if (condition, where) == wanted:
        return True
    reduced = _reduced(view, condition, "all" if where else "any")
    return reduced is not None and plain(view, reduced, where) == wanted


def _reduced(view: CanonicalGraph, node: object, name: str) -> object | None:
    """The input of all() or any() along the last dimension, which is kept."""
    if not isinstance(node, Node) or _name(node) != name or not node.args:
        return None
    rank = len(view.shape(node.args[0]))
    given = dict(zip(("dim", "keepdim"), node.args[1:])) | node.kwargs
    return node.args[0] if given.get("dim") in (-1, rank - 1, (-1,), [-1]) and given.get("keepdim") else None


def _name(node: object) -> str:
    target = node.target if isinstance(node, Node) else ""
    return str(getattr(target, "__name__", target)).partition(".")[0].strip("_")
