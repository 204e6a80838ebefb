"""RMSNorm, hand-written around a root or an L2 norm, or called by name.

Inwards from the anchor stands the statistic, 1 / sqrt(mean(h * h, -1) + eps), where h is x or a wider copy of it; the
product of h with it is the normalised value. What follows that is read in `norm_affine`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from infuse.patterns import norm_affine
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import Norm, short
from infuse.patterns.norm_call import from_call
from infuse.patterns.norm_moments import Moment, centred, mean_of, mean_of_squares, plus_number, square_of
from infuse.patterns.norm_root import Product, Root, find_product, read_root
from infuse.patterns.rms_l2 import from_l2
from infuse.patterns.sites import Finding, Refusal

KIND = "rms_norm"
ANCHORS = ("rsqrt", "sqrt", "pow", "vector_norm", "normalize", "rms_norm")


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The RMSNorm around an anchor; None if there is none."""
    start = from_call(view, anchor, KIND) or from_l2(view, anchor) or _from_root(view, anchor)
    return norm_affine.finish(view, start) if isinstance(start, Norm) else start


def _refuse(node: Node, reason: str, remedy: str) -> Refusal:
    return Refusal(KIND, node, reason, remedy)


def _from_root(view: CanonicalGraph, anchor: Node) -> Norm | Refusal | None:
    root = read_root(view, anchor)
    if root is None:
        return None
    trail = [*root.trail]
    moment = next((found for node in root.under if (found := mean_of_squares(view, node, trail))), None)
    if moment is None:
        return _eps_inside(view, root)
    own_mean = centred(view, view.strip(moment.h, widening=True), [])
    if own_mean is not None and own_mean[1].dims == moment.dims:
        return None  # a LayerNorm's
    product = find_product(view, root, lambda node, same: view.same_value(node, moment.h, same))
    if product is None:
        return None
    refusal = _flaw(view, root, moment, product)
    return refusal or _norm(view, root, moment, product, trail)


def _eps_inside(view: CanonicalGraph, root: Root) -> Refusal | None:
    """A refusal for rsqrt(mean(h * h + eps))."""
    mean = mean_of(view, root.under[0], [])
    inside = plus_number(view, view.strip(mean.input, widening=True)) if mean is not None else None
    square = square_of(view, view.strip(inside[0]), []) if inside is not None else None
    if square is None or find_product(view, root, lambda node, same: view.same_value(node, square[0], same)) is None:
        return None
    return _refuse(root.node, "eps is added inside the mean", "add eps to the mean of squares: rsqrt(mean + eps)")


def _flaw(view: CanonicalGraph, root: Root, moment: Moment, product: Product) -> Refusal | None:
    """What keeps a product of x with a root of its mean of squares from being an RMSNorm over the last dimension."""
    anchor, rank = root.node, len(view.shape(moment.h))
    if root.eps is None:
        return _refuse(anchor, "eps is a tensor", "keep eps as a Python float")
    if product.outside:
        return _refuse(anchor, "eps is added outside the root", "add eps under it: rsqrt(mean + eps)")
    if product.floor is not None and (root.is_floor or root.eps != 0.0):
        return _refuse(anchor, "eps is applied twice, under the root and to it", "keep the one under the root")
    if moment.dims != (rank - 1,):
        names = " and ".join(str(dim) for dim in moment.dims)
        return _refuse(
            anchor,
            f"the mean of squares runs over dimension {names} of {rank}, expected the last one alone",
            "move the normalised dimension to the end, or normalise one dimension at a time",
        )
    if (refusal := norm_affine.narrow_statistics(view, KIND, anchor, moment.inner)) is not None:
        return refusal
    if not product.keeps_dimension:
        shapes = f"{tuple(product.shape)} beside x {tuple(view.shape(product.numerator))}"
        remedy = "keep the reduced dimension: mean(-1, keepdim=True)"
        return _refuse(anchor, f"the statistic has shape {shapes}", remedy)
    return None


def _norm(view: CanonicalGraph, root: Root, moment: Moment, product: Product, trail: list[Node]) -> Norm | Refusal:
    dtype, factor_dtype, anchor = view.dtype(product.node), view.dtype(product.factor), root.node
    assert root.eps is not None and dtype is not None
    trail += product.trail
    base = view.narrowed(product.numerator, trail)
    eps = root.eps if product.floor is None else product.floor
    words = (moment.words, root.words, *(["divide"] if product.words == "divide" else []))
    norm = Norm(
        KIND,
        product.node,
        base,
        view.dtype(base),
        eps,
        torch.float32,
        tuple(trail),
        words,
        eps_as_minimum=root.is_floor or product.floor is not None,
    )
    if factor_dtype == view.dtype(anchor) == dtype:
        # The product may read a narrow x beside the wide factor; torch promotes it.
        wide = next((x for x in (product.numerator, moment.h) if view.dtype(x) == dtype), base)
        norm = replace(norm, x=wide, x_dtype=dtype, n_dtype=dtype)
        return norm if product.weight is None else norm_affine.weighted(view, norm, product.weight)
    if factor_dtype == dtype == view.dtype(base) and product.weight is None:
        # x * rsqrt(...).to(x.dtype): the product is rounded as a cast behind it would round.
        rounding = f"1 / rms is rounded to {short(dtype)} before it is multiplied"
        return replace(norm, cast=True, rounding=rounding, words=(*words, "product in x's dtype"))
    return _refuse(
        anchor,
        f"x {short(view.dtype(base))} is multiplied by a {short(factor_dtype)} factor into {short(dtype)}",
        "normalise in float32 and cast the result: (h * torch.rsqrt(...)).to(x.dtype)",
    )
