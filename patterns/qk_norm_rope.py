"""RMSNorm or LayerNorm of the heads of q or k whose result only a rotary embedding reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.sites import Make, Site

KIND = "qk_norm_rope"
NORMS = ("rms_norm", "layer_norm")
# Views between the two: heads before positions, or after.
_MAX_VIEWS = 4


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """qk_norm_rope in place of each norm and the rotation that reads it."""
    norms = norms_of(sites)
    for site in sites:
        composite = join(view, norms, site) if site.kind == "rope" and not site.after else None
        if composite is not None:
            yield composite


def norms_of(sites: Sequence[Site]) -> dict[Node, Site]:
    """The norms that a rotation may take in, by their results."""
    return {site.outputs[0]: site for site in sites if site.kind in NORMS and not site.after}


def join(view: CanonicalGraph, norms: dict[Node, Site], rope: Site) -> Site | None:
    """The norm and the rotation as one site, if nobody but the rotation reads what the norm makes."""
    found = _behind_views(view, norms, rope)
    if found is None:
        return None
    norm, order, trail = found
    interior = tuple(dict.fromkeys((*norm.interior, *trail, *rope.interior)))
    if any(user not in interior for node in (norm.outputs[0], *trail) for user in view.readers(node)):
        return None  # The norm would be computed twice.
    x, *rest = norm.args
    x = x if order == tuple(range(len(order))) else Make(torch.permute, (x, order))
    _, cos, sin, *flags = rope.args
    args = (x, cos, sin, *_norm_arguments(norm, rest), *flags)
    words = f"{norm.spelling}; {rope.spelling}"
    roundings = "; ".join(filter(None, (norm.rounding, rope.rounding)))
    return Site(KIND, rope.outputs, rope.before, args, interior, words, roundings, (norm, rope))


def _behind_views(
    view: CanonicalGraph, norms: dict[Node, Site], rope: Site
) -> tuple[Site, tuple[int, ...], tuple[Node, ...]] | None:
    """(norm, order of its dimensions in the rotated tensor, nodes between): the last dimension stays the last."""
    node, trail = rope.args[0], list[Node]()
    if not isinstance(node, Node):
        return None
    order = tuple(range(len(view.shape(node))))
    for _ in range(_MAX_VIEWS):
        if node in norms:
            return norms[node], order, tuple(trail)
        call = view.call(node, "alias", "permute")
        if call is None:
            return None
        if call.name == "permute":
            order = tuple(call["dims"][dim] for dim in order)
            if order[-1] != len(order) - 1:
                return None
        trail.append(node)
        node = call["input"]
    return None


def _norm_arguments(norm: Site, rest: list[object]) -> tuple[object, ...]:
    """weight, bias, eps, centered, weight_offset, cast_before_weight, eps_as_minimum."""
    if norm.kind == "layer_norm":
        weight, bias, eps, offset, cast = rest
        return weight, bias, eps, True, offset, cast, False
    weight, eps, offset, cast, minimum = rest
    return weight, None, eps, False, offset, cast, minimum


RULE = Rule(KIND, (*NORMS, "rope"), propose)
