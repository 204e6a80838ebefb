"""A gated activation and the projections that only it reads, without or with the RMSNorm that only those read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Declined, Proposal, Rule
from infuse.patterns.gated_projections import GateAndUp, read_linears
from infuse.patterns.linears import earliest_place, linear_readers
from infuse.patterns.sites import Site

KIND = "linear_swiglu"
WITH_NORM = "norm_linear_swiglu"
GATE = "swiglu"
_NORMS = ("rms_norm", "add_rms_norm")


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Proposal]:
    """linear_swiglu in place of each gated activation of linears."""
    for site in sites:
        found = read_linears(view, site) if site.kind == GATE else None
        if isinstance(found, str):
            yield Declined(KIND, found)
        elif found is not None:
            yield _join(site, found)


def _join(gate: Site, found: GateAndUp) -> Site:
    args = (found.linears[0].input, *found.arguments, *gate.args[2:])
    interior = tuple(dict.fromkeys((*found.interior, *gate.interior)))
    return Site(KIND, gate.outputs, gate.before, args, interior, gate.spelling, gate.rounding, (gate,))


def propose_with_norm(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """norm_linear_swiglu in place of each gated activation of linears that alone read a norm."""
    norms = {site.outputs[0]: site for site in sites if site.kind in _NORMS and not site.after}
    for site in sites:
        found = read_linears(view, site) if site.kind == GATE and norms else None
        if isinstance(found, GateAndUp) and found.linears[0].input in norms:
            joint = _join_norm(view, norms[found.linears[0].input], site, found)
            if joint is not None:
                yield joint


def _join_norm(view: CanonicalGraph, norm: Site, gate: Site, found: GateAndUp) -> Site | None:
    readers = linear_readers(view, norm.outputs[0])
    if {linear.node for linear in readers} != {linear.node for linear in found.linears}:
        return None
    x, residual, *rest = norm.args if norm.kind == "add_rms_norm" else (norm.args[0], None, *norm.args[1:])
    args = (x, residual, *found.arguments, *rest, *gate.args[2:])
    outputs = (*gate.outputs, *norm.outputs[1:])
    interior = tuple(dict.fromkeys((*norm.interior, *found.interior, *gate.interior)))
    first = min((linear.node for linear in found.linears), key=view.index.__getitem__)
    before = earliest_place(view, (gate.before, first, norm.before), args, outputs, interior)
    if before is None:
        return None
    words = f"{norm.spelling}; {gate.spelling}"
    roundings = "; ".join(filter(None, (norm.rounding, gate.rounding)))
    return Site(WITH_NORM, outputs, before, args, interior, words, roundings, (norm, gate))


RULES = (
    Rule(WITH_NORM, (*_NORMS, GATE), propose_with_norm),
    Rule(KIND, (GATE,), propose),
)
