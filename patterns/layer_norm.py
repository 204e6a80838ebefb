"""LayerNorm, hand-written around a root of a variance, or called by name.

Inwards from the anchor stands 1 / sqrt(var(h, -1) + eps), where h is x or a wider copy of it; the product of it with
h - mean(h) is the normalised value. What follows that is read in `norm_affine`.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from infuse.patterns import norm_affine
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import Norm
from infuse.patterns.norm_call import from_call
from infuse.patterns.norm_moments import Moment, centred, deviation, variance
from infuse.patterns.norm_root import Product, Root, find_product, read_root
from infuse.patterns.sites import Finding, Refusal

KIND = "layer_norm"
ANCHORS = ("rsqrt", "sqrt", "pow", "std", "std_mean", "layer_norm")


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The LayerNorm around an anchor; None if there is none."""
    start = from_call(view, anchor, KIND) or _by_hand(view, anchor)
    return norm_affine.finish(view, start) if isinstance(start, Norm) else start


def _refuse(node: Node, reason: str, remedy: str) -> Refusal:
    return Refusal(KIND, node, reason, remedy)


def _by_hand(view: CanonicalGraph, anchor: Node) -> Norm | Refusal | None:
    trail: list[Node] = []
    found = _statistic(view, anchor, trail)
    if found is None:
        return None
    root, moment = found

    def is_numerator(node: Node, same: list[Node]) -> bool:
        read: list[Node] = []
        difference = centred(view, view.strip(node, widening=True, trail=read), read)
        if difference is None or difference[1].dims != moment.dims:
            return False
        if not view.same_value(difference[0], moment.h, read):
            return False
        same += read
        return True

    product = find_product(view, root, is_numerator)
    if product is None or not _is_layer(moment.dims, len(view.shape(moment.h))):
        return None
    return _flaw(view, root, moment, product) or _norm(view, root, moment, product, trail)


def _statistic(view: CanonicalGraph, anchor: Node, trail: list[Node]) -> tuple[Root, Moment] | None:
    """The root and the variance under it."""
    moment = deviation(view, anchor, trail)
    if moment is not None:
        node = trail[-1]
        return Root(node, False, (), 0.0, False, "std", ()), moment
    root = read_root(view, anchor)
    if root is None:
        return None
    moment = next((found for node in root.under if (found := variance(view, node, trail))), None)
    trail += root.trail
    return None if moment is None else (root, moment)


def _is_layer(dims: tuple[int, ...], rank: int) -> bool:
    """Whether it can be a LayerNorm; not over the batch, and not over the image of an instance norm."""
    return dims == (rank - 1,) or (0 not in dims and not (rank >= 4 and len(dims) == rank - 2 and 1 not in dims))


def _flaw(view: CanonicalGraph, root: Root, moment: Moment, product: Product) -> Refusal | None:
    """What keeps a product of x - mean with a root of its variance from being a LayerNorm over the last dimension."""
    anchor, rank = root.node, len(view.shape(moment.h))
    if product.outside:
        return _refuse(anchor, "eps is added outside the root", "add eps under it: rsqrt(var + eps)")
    if moment.correction != 0:
        reason = f"the variance is divided by n - {moment.correction:g}, expected n"
        return _refuse(anchor, reason, "take the biased variance: x.var(-1, unbiased=False, keepdim=True)")
    if root.eps is None:
        return _refuse(anchor, "eps is a tensor", "keep eps as a Python float")
    if root.is_floor or product.floor is not None:
        return _refuse(anchor, "eps bounds the variance instead of being added to it", "add eps: rsqrt(var + eps)")
    if moment.dims != (rank - 1,):
        names = " and ".join(str(dim) for dim in moment.dims)
        return _refuse(
            anchor,
            f"the variance runs over dimension {names} of {rank}, expected the last one alone",
            "permute the normalised dimension to the end, normalise, and permute back",
        )
    nodes = (*moment.inner, product.numerator, product.factor, product.node)
    if (refusal := norm_affine.narrow_statistics(view, KIND, anchor, nodes)) is not None:
        return refusal
    if not product.keeps_dimension:
        shapes = f"{tuple(product.shape)} beside x {tuple(view.shape(product.numerator))}"
        return _refuse(anchor, f"the statistic has shape {shapes}", "keep the reduced dimension: var(-1, keepdim=True)")
    return None


def _norm(view: CanonicalGraph, root: Root, moment: Moment, product: Product, trail: list[Node]) -> Norm:
    dtype = view.dtype(product.node)
    assert root.eps is not None and dtype in (torch.float32, torch.float64)
    words = (moment.words, root.words, *(["divide"] if product.words == "divide" else []))
    trail += product.trail
    norm = Norm(
        KIND,
        product.node,
        moment.h,
        dtype,
        root.eps,
        dtype,
        tuple(trail),
        words,
        rounding=moment.rounding,
    )
    return norm if product.weight is None else norm_affine.weighted(view, norm, product.weight)
