"""A gated MLP as a whole: gate and up projections, activation, and the down projection that alone reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.gated_projections import GateAndUp, read_linears
from infuse.patterns.linear_swiglu import GATE
from infuse.patterns.linears import linear_readers
from infuse.patterns.sites import Site

KIND = "gated_mlp"


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """gated_mlp in place of each gated activation between linears."""
    for site in sites:
        found = read_linears(view, site) if site.kind == GATE else None
        if isinstance(found, GateAndUp) and (joint := _join(view, site, found)) is not None:
            yield joint


def _join(view: CanonicalGraph, gate: Site, found: GateAndUp) -> Site | None:
    linears = linear_readers(view, gate.outputs[0])
    if len(linears) != 1:
        return None
    (down,) = linears
    args = (found.linears[0].input, *found.arguments, down.weight, down.bias, *gate.args[2:])
    interior = tuple(dict.fromkeys((*found.interior, *gate.interior, *down.trail, down.node)))
    words = f"{gate.spelling}; linear"
    return Site(KIND, (down.node,), down.node, args, interior, words, gate.rounding, (gate,))


RULE = Rule(KIND, (GATE,), propose, training=True)
