"""Residual add and RMSNorm or LayerNorm become one operator with two results.

A second stage: it looks at norm sites, not at spellings. The sum's other readers (the next residual) get the second
result. The operator stands where the norm stood, or where the add stood if somebody reads the sum before the norm is
done.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.safety import Effects
from infuse.patterns.sites import Make, Site, arguments_of
from infuse.patterns.sizes import same_shape

# The joint operator of each norm; its arguments are x, residual and those that follow x in the norm's.
KINDS = {"rms_norm": "add_rms_norm", "layer_norm": "add_layer_norm"}


def compose(view: CanonicalGraph, effects: Effects, sites: Iterable[Site], kinds: Container[str]) -> list[Site]:
    """The sites, with each norm of a sum replaced by add + norm where that is legal; a sum is taken once.

    kinds: the joint operators that are wanted.
    """
    taken: set[Node] = set()
    composed: list[Site] = []
    for site in sites:
        joint = _join(view, effects, site, taken) if KINDS.get(site.kind) in kinds else None
        composed.append(joint or site)
        if joint is not None:
            taken.add(joint.outputs[1])
    return composed


def _join(view: CanonicalGraph, effects: Effects, norm: Site, taken: set[Node]) -> Site | None:
    trail: list[Node] = []
    total = view.strip(norm.args[0], trail=trail)
    terms = None if total in taken else _terms(view, total)
    if terms is None:
        return None
    interior = tuple(dict.fromkeys((total, *trail, *norm.interior)))
    before = _place(view, norm, total, interior)
    if before is None:
        return None
    site = Site(
        KINDS[norm.kind],
        (norm.outputs[0], total),
        before,
        (*terms, *norm.args[1:]),
        interior,
        f"residual add, {norm.spelling}",
        norm.rounding,
    )
    return site if effects.check(site) is None else None


def _terms(view: CanonicalGraph, total: object) -> tuple[object, object] | None:
    """The two tensors of one shape that a node adds, in the dtype of their sum; None for any other node."""
    operands = view.operands(total, "add")
    if operands is None:
        return None
    terms: list[object] = []
    for operand in operands:
        if view.tensor(operand) is None or not same_shape(view.shape(operand), view.shape(total)):
            return None
        # torch widens the narrower of two floats before it adds.
        is_wide = view.dtype(operand) == view.dtype(total)
        terms.append(operand if is_wide else Make(torch.ops.aten.to.dtype, (operand, view.dtype(total))))
    return terms[0], terms[1]


def _place(view: CanonicalGraph, norm: Site, total: Node, interior: tuple[Node, ...]) -> Node | None:
    """Where the operator can stand so that all of its arguments come before and all readers of the sum after it."""
    others = [view.index[user] for user in view.readers(total) if user not in interior]
    if all(index > view.index[norm.before] for index in others):
        return norm.before
    arguments = arguments_of(norm.args[1:])
    return total if all(view.index[node] < view.index[total] for node in arguments) else None
