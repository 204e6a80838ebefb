"""Residual add and RMSNorm or LayerNorm become one operator with two results.

A second stage: it looks at norm sites, not at spellings. The sum's other readers (the next residual) get the second
result. The operator stands where the norm stood, or where the add stood if somebody reads the sum before the norm is
done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.sites import Make, Site, arguments_of
from infuse.patterns.sizes import same_shape

# The joint operator of each norm; its arguments are x, residual and those that follow x in the norm's.
KINDS = {"rms_norm": "add_rms_norm", "layer_norm": "add_layer_norm"}


def propose(norm_kind: str, view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """Add + norm in place of each norm of a sum where the operator can stand."""
    for site in sites:
        joint = _join(view, site) if site.kind == norm_kind else None
        if joint is not None:
            yield joint


def _join(view: CanonicalGraph, norm: Site) -> Site | None:
    trail: list[Node] = []
    total = view.strip(norm.args[0], trail=trail)
    terms = _terms(view, total)
    if terms is None:
        return None
    interior = tuple(dict.fromkeys((total, *trail, *norm.interior)))
    before = _place(view, norm, total, interior)
    if before is None:
        return None
    return Site(
        KINDS[norm.kind],
        (norm.outputs[0], total),
        before,
        (*terms, *norm.args[1:]),
        interior,
        f"residual add, {norm.spelling}",
        norm.rounding,
        (norm,),
    )


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


RULES = tuple(Rule(joint, (norm,), functools.partial(propose, norm)) for norm, joint in KINDS.items())
