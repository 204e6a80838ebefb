"""RMSNorm, with or without a residual add, whose result only linears read: the norm becomes their prologue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.linears import earliest_place, linear_readers
from infuse.patterns.sites import Site

KIND = "norm_linear"
_NORMS = ("rms_norm", "add_rms_norm")


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """norm_linear in place of each norm that only linears read."""
    for site in sites:
        composite = _join(view, site) if site.kind in _NORMS else None
        if composite is not None:
            yield composite


def _join(view: CanonicalGraph, norm: Site) -> Site | None:
    linears = linear_readers(view, norm.outputs[0])
    if not linears:
        return None
    x, residual, *rest = norm.args if norm.kind == "add_rms_norm" else (norm.args[0], None, *norm.args[1:])
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    args = (x, residual, tuple(weights), tuple(biases), *rest)
    outputs = (*(linear.node for linear in linears), *norm.outputs[1:])
    behind = [node for linear in linears for node in (*linear.trail, linear.node)]
    interior = tuple(dict.fromkeys((*norm.interior, *behind)))
    before = earliest_place(view, (linears[0].node, norm.before), args, outputs, interior)
    if before is None:
        return None
    words = f"{norm.spelling}, {len(linears)} linear{'s' if len(linears) > 1 else ''}"
    return Site(KIND, outputs, before, args, interior, words, norm.rounding, (norm,))


RULE = Rule(KIND, _NORMS, propose)
