"""A gated MLP as a whole: gate and up projections, activation, and the down projection that alone reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.fx import Node

from infuse.ops.swiglu import QUICK_GELU_ALPHA
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.gated_projections import GateAndUp, read_linears
from infuse.patterns.linear_swiglu import GATE
from infuse.patterns.linears import linear_readers
from infuse.patterns.safety import storages, writes
from infuse.patterns.sites import Site

KIND = "gated_mlp"
NORMS = ("rms_norm", "add_rms_norm")
# Of a swiglu site's arguments behind gate and up.
_DEFAULTS = ("silu", None, QUICK_GELU_ALPHA, 0.0)
_NUM_ARGUMENTS = 6 + len(_DEFAULTS)


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """gated_mlp in place of each gated activation between linears."""
    norms = {site.outputs[0]: site for site in sites if site.kind in NORMS and not site.after}
    written = frozenset[int]().union(*(write.storages for write in writes(view)))
    for site in sites:
        found = read_linears(view, site) if site.kind == GATE else None
        if isinstance(found, GateAndUp):
            norm = norms.get(found.linears[0].input)
            recipe = () if norm is None else _recipe(view, norm, written)
            if (joint := _join(view, site, found, recipe)) is not None:
                yield joint


def _recipe(view: CanonicalGraph, norm: Site, written: frozenset[int]) -> tuple[object, ...]:
    """By what the input of an MLP, a norm's result, can be computed again: the norm's input, weight and numbers.

    () where that is no tensor of the graph, of another dtype, or written to somewhere.
    """
    x, rest = norm.args[0], norm.args[1:]
    if norm.kind == "add_rms_norm":
        x, rest = norm.outputs[1], norm.args[2:]
    tensors = [item for item in (x, rest[0]) if item is not None]
    if not all(isinstance(item, Node) and not storages(view.value(item)) & (written | {-1}) for item in tensors):
        return ()
    return (x, *rest) if view.dtype(x) == view.dtype(norm.outputs[0]) else ()


def _join(view: CanonicalGraph, gate: Site, found: GateAndUp, recipe: tuple[object, ...]) -> Site | None:
    linears = linear_readers(view, gate.outputs[0])
    if len(linears) != 1:
        return None
    (down,) = linears
    args = (found.linears[0].input, *found.arguments, down.weight, down.bias, *gate.args[2:])
    if recipe:
        args = (*args, *_DEFAULTS[len(gate.args) - 2 :], *recipe)
    interior = tuple(dict.fromkeys((*found.interior, *gate.interior, *down.trail, down.node)))
    words = f"{gate.spelling}; linear"
    return Site(KIND, (down.node,), down.node, args, interior, words, gate.rounding, (gate,))


def alone(site: Site) -> Site:
    """A gated_mlp that keeps its input, whatever made that: the norm before it is no part of it."""
    return replace(site, args=site.args[:_NUM_ARGUMENTS]) if site.kind == KIND else site


RULE = Rule(KIND, (GATE,), propose, training=True)
