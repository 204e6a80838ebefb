"""The activation of a gated MLP whose product only the down projection reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.linears import earliest_place, linear_readers
from infuse.patterns.sites import Site

KIND = "swiglu_linear"
_GATE = "swiglu"


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """swiglu_linear in place of each gate that one linear reads."""
    for site in sites:
        composite = _join(view, site) if site.kind == _GATE else None
        if composite is not None:
            yield composite


def _join(view: CanonicalGraph, gate: Site) -> Site | None:
    linears = linear_readers(view, gate.outputs[0])
    if len(linears) != 1:
        return None
    (down,) = linears
    args = (*gate.args[:2], down.weight, down.bias, *gate.args[2:])
    interior = tuple(dict.fromkeys((*gate.interior, *down.trail, down.node)))
    before = earliest_place(view, (down.node,), args, (down.node,), interior)
    if before is None:
        return None
    return Site(KIND, (down.node,), before, args, interior, f"{gate.spelling}, linear", gate.rounding, (gate,))


RULE = Rule(KIND, (_GATE,), propose)
