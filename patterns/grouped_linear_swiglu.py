"""A gated activation of a mixture's experts, whose gate and up are grouped products of rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Declined, Proposal, Rule
from infuse.patterns.gated_projections import OTHER_INPUT, Projections, read_projections
from infuse.patterns.linear_swiglu import GATE
from infuse.patterns.sites import Site
from infuse.patterns.sizes import same_shape

KIND = "grouped_linear_swiglu"
_PARAMETERS = ("input", "weight", "offs", "bias", "out_dtype")


def _targets() -> frozenset[Any]:
    functional = getattr(torch.nn.functional, "grouped_mm", None)  # since torch 2.10
    return frozenset({torch._grouped_mm, torch.ops.aten._grouped_mm.default, functional} - {None})


_TARGETS = _targets()


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Proposal]:
    """grouped_linear_swiglu in place of each gated activation of grouped products."""
    for site in sites:
        found = read_projections(view, site, _is_grouped) if site.kind == GATE else None
        if isinstance(found, str):
            yield Declined(KIND, found)
        elif found is not None and (joint := _join(view, site, found)) is not None:
            yield joint


def _is_grouped(node: Node) -> bool:
    return node.op == "call_function" and node.target in _TARGETS


def _join(view: CanonicalGraph, gate: Site, found: Projections) -> Proposal | None:
    calls = [_arguments(view, node) for node in found.products]
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


def _arguments(view: CanonicalGraph, node: Node) -> dict[str, Node] | None:
    """The tensors of a grouped product of rows; None for one in another form, with a bias or another dtype."""
    call: dict[str, Any] = {**dict(zip(_PARAMETERS, node.args)), **node.kwargs}
    if "self" in call or "mat_a" in call:
        call = {"input": call.get("self", call.get("mat_a")), "weight": call.get("mat2", call.get("mat_b")), **call}
    tensors = [item for name in _PARAMETERS[:3] if isinstance(item := call.get(name), Node)]
    if len(tensors) != 3 or any(call.get(name) is not None for name in _PARAMETERS[3:]):
        return None
    x, weight, offsets = tensors
    if [len(view.shape(item)) for item in tensors] != [2, 3, 1] or view.dtype(offsets) != torch.int32:
        return None
    if not view.dtype(x) == view.dtype(weight) == view.dtype(node):
        return None
    return dict(zip(_PARAMETERS, tensors))


RULE = Rule(KIND, (GATE,), propose)
