"""LayerNorm called by name."""

from __future__ import annotations

from torch.fx import Node

from infuse.patterns import norm_affine
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import Norm
from infuse.patterns.norm_call import from_call
from infuse.patterns.sites import Finding

KIND = "layer_norm"
ANCHORS = ("layer_norm",)


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The LayerNorm around an anchor; None if there is none."""
    start = from_call(view, anchor, KIND)
    if not isinstance(start, Norm):
        return start
    for norm in norm_affine.inputs(view, start):
        end = norm_affine.outwards(view, norm)
        if norm_affine.is_whole(view, end):
            return norm_affine.site(view, end)
    return norm_affine.site(view, start)
