"""Residual add and RMSNorm become one operator with two results.

A second stage: it looks at RMSNorm sites, not at spellings. The sum's other readers (the next residual) get the second
result. The operator stands where the norm stood, or where the add stood if somebody reads the sum before the norm is
done.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.safety import Effects
from infuse.patterns.sites import Site, arguments_of
from infuse.patterns.sizes import same_shape

KIND = "add_rms_norm"


def compose(view: CanonicalGraph, effects: Effects, sites: Iterable[Site]) -> list[Site]:
    """The sites, with each norm of a sum replaced by add + norm where that is legal; a sum is taken once."""
    taken: set[Node] = set()
    composed: list[Site] = []
    for site in sites:
        joint = _join(view, effects, site, taken) if site.kind == "rms_norm" else None
        composed.append(joint or site)
        if joint is not None:
            taken.add(joint.outputs[1])
    return composed


def _join(view: CanonicalGraph, effects: Effects, norm: Site, taken: set[Node]) -> Site | None:
    trail: list[Node] = []
    total = view.strip(norm.args[0], trail=trail)
    operands = view.operands(total, "add")
    if operands is None or total in taken or not _is_plain_sum(view, total, operands):
        return None
    interior = tuple(dict.fromkeys((total, *trail, *norm.interior)))
    before = _place(view, norm, total, interior)
    if before is None:
        return None
    site = Site(
        KIND,
        (norm.outputs[0], total),
        before,
        (*operands, *norm.args[1:]),
        interior,
        f"residual add, {norm.spelling}",
        norm.rounding,
    )
    return site if effects.check(site) is None else None


def _is_plain_sum(view: CanonicalGraph, total: Node, operands: tuple[object, object]) -> bool:
    """Whether it adds two tensors of one shape and dtype."""
    whole = view.tensor(total)
    parts = [view.tensor(operand) for operand in operands]
    return whole is not None and all(
        part is not None and part.dtype == whole.dtype and same_shape(part.shape, whole.shape) for part in parts
    )


def _place(view: CanonicalGraph, norm: Site, total: Node, interior: tuple[Node, ...]) -> Node | None:
    """Where the operator can stand so that all of its arguments come before and all readers of the sum after it."""
    others = [view.index[user] for user in view.readers(total) if user not in interior]
    if all(index > view.index[norm.before] for index in others):
        return norm.before
    arguments = arguments_of(norm.args[1:])
    return total if all(view.index[node] < view.index[total] for node in arguments) else None
