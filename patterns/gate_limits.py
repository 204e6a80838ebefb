"""The limits of a gated MLP as gpt-oss has them: clamp(gate, max=limit), clamp(up, -limit, limit) + offset."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from infuse.ops.swiglu import QUICK_GELU_ALPHA
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Site


def with_limits(view: CanonicalGraph, site: Site, alpha: float | Node | None) -> Site:
    """The site with the clamps of gate and up, and what is added to up, taken in.

    alpha: quick_gelu's factor. An offset without a limit stays where it is.
    """
    gate, up = site.args[:2]
    trail: list[Node] = []
    offset, up = _plus_number(view, up, trail)
    limit, inner_gate, inner_up = _limit(view, gate, up, trail)
    if limit is None:
        trail, inner_gate, inner_up, offset = [], site.args[0], site.args[1], 0.0
    if alpha is None and limit is None:
        return site
    slope = QUICK_GELU_ALPHA if alpha is None else alpha
    return replace(
        site,
        args=(inner_gate, inner_up, site.args[2], limit, slope, offset),
        interior=tuple(dict.fromkeys((*trail, *site.interior))),
        spelling=site.spelling + (", clamped" if limit is not None else ""),
    )


def _plus_number(view: CanonicalGraph, up: object, trail: list[Node]) -> tuple[float | Node, object]:
    operands = view.operands(up, "add")
    if isinstance(up, Node) and operands is not None:
        for tensor, other in (operands, operands[::-1]):
            number = view.number(other)
            if number is not None and view.dtype(tensor) == view.dtype(up):
                trail.append(up)
                return number, tensor
    return 0.0, up


def _limit(
    view: CanonicalGraph, gate: object, up: object, trail: list[Node]
) -> tuple[float | Node | None, object, object]:
    """(limit, gate, up) of clamp(gate, max=limit) and clamp(up, -limit, limit); limit None if they are not that."""
    clamps = view.call(gate, "clamp"), view.call(up, "clamp")
    if clamps[0] is None or clamps[1] is None or clamps[0]["min"] is not None:
        return None, gate, up
    limit, high, low = (view.number(bound) for bound in (clamps[0]["max"], clamps[1]["max"], clamps[1]["min"]))
    if limit is None or limit != high or not _is_negative_of(view, low, limit):
        return None, gate, up
    trail += [node for node in (gate, up) if isinstance(node, Node)]
    return limit, clamps[0]["input"], clamps[1]["input"]


def _is_negative_of(view: CanonicalGraph, low: float | Node | None, high: float | Node) -> bool:
    if isinstance(low, float) and isinstance(high, float):
        return low == -high and high >= 0
    call = view.call(low, "neg")
    return call is not None and call["input"] is high
