"""A gated activation of a mixture's experts, whose gate and up are grouped products of rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Declined, Proposal, Rule
from infuse.patterns.gated_projections import OTHER_INPUT, Projections, read_projections
from infuse.patterns.linear_swiglu import GATE
from infuse.patterns.readings import Call
from infuse.patterns.sites import Site
from infuse.patterns.sizes import same_shape

KIND = "grouped_linear_swiglu"


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Proposal]:
    """grouped_linear_swiglu in place of each gated activation of grouped products."""
    for site in sites:
        found = read_projections(view, site, "grouped_mm") if site.kind == GATE else None
        if isinstance(found, str):
            yield Declined(KIND, found)
        elif found is not None and (joint := _join(view, site, found)) is not None:
            yield joint


def _join(view: CanonicalGraph, gate: Site, found: Projections) -> Proposal | None:
    calls = [_read(view, node) for node in found.products]
    if any(call is None for call in calls):
        return None
    given = [call for call in calls if call is not None]
    x, offsets = given[0]["input"], given[0]["offs"]
    if any(call["input"] is not x or call["offs"] is not offsets for call in given):
        return Declined(KIND, OTHER_INPUT)
    weights = tuple(call["weight"] for call in given)
    if not all(same_shape(view.shape(weight), view.shape(weights[0])) for weight in weights):
        return None
    interior = tuple(dict.fromkeys((*found.products, *found.between, *gate.interior)))
    args = (x, weights, offsets, found.order, *gate.args[2:])
    return Site(KIND, gate.outputs, gate.before, args, interior, gate.spelling, gate.rounding, (gate,))


def _read(view: CanonicalGraph, node: Node) -> Call | None:
    """A grouped product of rows; None for one in another form, with a bias or another dtype."""
    call = view.call(node, "grouped_mm")
    if call is None or call["bias"] is not None or call["out_dtype"] is not None:
        return None
    tensors = [call[name] for name in ("input", "weight", "offs")]
    if [len(view.shape(item)) for item in tensors] != [2, 3, 1] or view.dtype(call["offs"]) != torch.int32:
        return None
    return call if view.dtype(call["input"]) == view.dtype(call["weight"]) == view.dtype(node) else None


RULE = Rule(KIND, (GATE,), propose)
