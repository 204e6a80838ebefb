"""A gated activation of a mixture's experts, whose gate and up are grouped products of rows sorted by expert, or
batched products of as many rows for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Declined, Proposal, Rule
from infuse.patterns.gated_projections import OTHER_INPUT, Projections, read_projections
from infuse.patterns.linear_swiglu import GATE
from infuse.patterns.sites import Site
from infuse.patterns.sizes import same_shape, same_size

KIND = "grouped_linear_swiglu"
_BATCHED = ("bmm", "matmul")


@dataclass(frozen=True, slots=True)
class _Product:
    """x [R, D] with the ends of the experts' rows, or [E, C, D] without; weight [E, D, F]."""

    x: Node
    weight: Node
    offsets: Node | None


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Proposal]:
    """grouped_linear_swiglu in place of each gated activation of grouped products."""
    for site in sites:
        found = read_projections(view, site, "grouped_mm", *_BATCHED) if site.kind == GATE else None
        if isinstance(found, str):
            yield Declined(KIND, found)
        elif found is not None and (joint := _join(view, site, found)) is not None:
            yield joint


def _join(view: CanonicalGraph, gate: Site, found: Projections) -> Proposal | None:
    read = [_read(view, node) for node in found.products]
    products = [product for product in read if product is not None]
    if len(products) < len(read):
        return None
    first = products[0]
    if any(product.x is not first.x or product.offsets is not first.offsets for product in products):
        return Declined(KIND, OTHER_INPUT)
    weights = tuple(product.weight for product in products)
    if not all(same_shape(view.shape(weight), view.shape(weights[0])) for weight in weights):
        return None
    interior = tuple(dict.fromkeys((*found.products, *found.between, *gate.interior)))
    args = (first.x, weights, first.offsets, found.order, *gate.args[2:])
    return Site(KIND, gate.outputs, gate.before, args, interior, gate.spelling, gate.rounding, (gate,))


def _read(view: CanonicalGraph, node: Node) -> _Product | None:
    """A product of experts' rows; None for one in another form, with a bias or another dtype."""
    if (call := view.call(node, *_BATCHED)) is not None:
        found, ranks = _Product(call["input"], call["other"], None), [3, 3]
    elif (call := view.call(node, "grouped_mm")) is not None and call["bias"] is None and call["out_dtype"] is None:
        found, ranks = _Product(call["input"], call["weight"], call["offs"]), [2, 3, 1]
        if view.dtype(found.offsets) != torch.int32:
            return None
    else:
        return None
    tensors = [item for item in (found.x, found.weight, found.offsets) if item is not None]
    if [len(view.shape(item)) for item in tensors] != ranks:
        return None
    # matmul repeats what is there once.
    if found.offsets is None and not same_size(view.shape(found.x)[0], view.shape(found.weight)[0]):
        return None
    return found if view.dtype(found.x) == view.dtype(found.weight) == view.dtype(node) else None


RULE = Rule(KIND, (GATE,), propose)
