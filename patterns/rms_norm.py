"""RMSNorm, hand-written around `rsqrt` or called by name.

A site is read in two halves. Inwards from the anchor: rsqrt(mean(h * h, -1) + eps), where h is x or a wider copy of it.
Outwards: n = h * rsqrt(...), then a cast and a multiply by the weight, in the order in which the author has them. The
order is part of the meaning and becomes the operator's `cast_before_weight`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from infuse.patterns import norm_affine, rms_statistic
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import Norm, short
from infuse.patterns.norm_call import from_call
from infuse.patterns.rms_statistic import Product, Statistic, find_product, find_statistic, refuse
from infuse.patterns.sites import Finding, Refusal

KIND = rms_statistic.KIND
ANCHORS = ("rsqrt", "rms_norm")


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The RMSNorm around an anchor; None if there is none."""
    start = from_call(view, anchor, KIND) if view.call(anchor, KIND) else _from_rsqrt(view, anchor)
    if not isinstance(start, Norm):
        return start
    # With the leading cast absorbed the result has to come back to x's dtype; if not, the cast one is the input.
    for norm in norm_affine.inputs(view, start):
        end = norm_affine.outwards(view, norm)
        if norm_affine.is_whole(view, end):
            return norm_affine.site(view, end)
    dtypes = f"{short(view.dtype(start.root))} from x {short(view.dtype(start.x))}"
    return refuse(anchor, f"the normalised value is {dtypes}", "normalise x.float(), outside autocast")


def _from_rsqrt(view: CanonicalGraph, anchor: Node) -> Norm | Refusal | None:
    statistic = find_statistic(view, anchor)
    if not isinstance(statistic, Statistic):
        return statistic
    product = find_product(view, anchor, statistic)
    if not isinstance(product, Product):
        return product
    dtype, factor_dtype = view.dtype(product.node), view.dtype(product.factor)
    trail = [*statistic.trail, *product.trail]
    base = view.narrowed(product.x, trail)
    words = (f"{statistic.square}, mean, rsqrt",)
    norm = Norm(KIND, product.node, base, view.dtype(base), statistic.eps, torch.float32, tuple(trail), words)
    if dtype is not None and factor_dtype == view.dtype(anchor) == dtype:
        # The product may read a narrow x beside the wide factor; torch promotes it.
        wide = next((x for x in (product.x, statistic.h) if view.dtype(x) == dtype), base)
        return replace(norm, x=wide, x_dtype=view.dtype(wide), n_dtype=dtype)
    if factor_dtype == dtype == view.dtype(base):
        # x * rsqrt(...).to(x.dtype): the product is rounded as a cast behind it would round.
        rounding = f"1 / rms is rounded to {short(dtype)} before it is multiplied"
        return replace(norm, cast=True, rounding=rounding, words=(*norm.words, "product in x's dtype"))
    return refuse(
        anchor,
        f"x {short(view.dtype(base))} is multiplied by a {short(factor_dtype)} factor into {short(dtype)}",
        "normalise in float32 and cast the result: (h * torch.rsqrt(...)).to(x.dtype)",
    )
