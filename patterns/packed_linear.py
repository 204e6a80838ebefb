"""Linears that read the same input (q, k and v; gate and up) as one product over packed weights.

Only weights that are constants of the graph are packed: those of a model that trains, or whose weights are inputs that
may be written to between calls, would have to be packed again in every call, or be kept twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from infuse.patterns import packed_weights
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Declined, Proposal, Rule
from infuse.patterns.linears import Linear, earliest_place, read_linear
from infuse.patterns.packed_weights import Packed
from infuse.patterns.sites import Site

KIND = "packed_linear"
NOT_CONSTANT = "the weights are inputs of the graph, which may change: only frozen ones are packed"


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Proposal]:
    """packed_linear for each tensor that several linears read."""
    taken = {node for site in sites for node in site.interior}
    groups: dict[Node, list[Linear]] = {}
    for node in view.nodes:
        linear = read_linear(view, node) if view.word(node) == "linear" else None
        if linear is not None:
            groups.setdefault(linear.input, []).append(linear)
    for linears in groups.values():
        if len(linears) < 2 or any(linear.node in taken for linear in linears):
            continue
        if not all(linear.is_constant for linear in linears):
            yield Declined(KIND, NOT_CONSTANT)
            continue
        if reason := packed_weights.obstacle(linears):
            yield Declined(KIND, reason)
            continue
        composite = _pack(view, linears)
        if composite is not None:
            yield composite


def _pack(view: CanonicalGraph, linears: Sequence[Linear]) -> Site | None:
    args = (linears[0].input, tuple(linear.weight for linear in linears), tuple(linear.bias for linear in linears))
    outputs = tuple(linear.node for linear in linears)
    interior = tuple(dict.fromkeys(node for linear in linears for node in (*linear.trail, linear.node)))
    before = earliest_place(view, (linears[0].node,), args, outputs, interior)
    if before is None:
        return None
    return Site(KIND, outputs, before, args, interior, f"{len(linears)} linears of one input")


def with_packed_weights(view: CanonicalGraph, site: Site, mode: FakeTensorMode) -> tuple[Site, Packed | None]:
    """The site over weights that are packed now; as it is where the graph is only looked at, with weights without
    memory."""
    linears = [linear for node in site.outputs if (linear := read_linear(view, node)) is not None]
    if packed_weights.is_fake(linears):
        return site, None
    packed = packed_weights.pack(linears, mode)
    return replace(site, args=(site.args[0], (packed.weight,), (packed.bias,), packed.sizes)), packed


RULE = Rule(KIND, (), propose)
