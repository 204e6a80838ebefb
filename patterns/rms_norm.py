"""RMSNorm, hand-written around `rsqrt` or called by name.

A site is read in two halves. Inwards from the anchor: rsqrt(mean(h * h, -1) + eps), where h is x or a wider copy of it.
Outwards: n = h * rsqrt(...), then a cast and a multiply by the weight, in the order in which the author has them. The
order is part of the meaning and becomes the operator's `cast_before_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns import rms_statistic
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.rms_statistic import (
    Product,
    Statistic,
    find_product,
    find_statistic,
    plus_number,
    refuse,
    short,
)
from infuse.patterns.sites import Finding, Make, Refusal, Site
from infuse.patterns.sizes import same_size

KIND = rms_statistic.KIND
ANCHORS = ("rsqrt", "rms_norm")
_HALF = (torch.float16, torch.bfloat16)
_STATISTICS = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class _Norm:
    """What has been read so far.

    root: the last node read. x: the operator's input. n_dtype: the dtype in which the normalised value is multiplied.
    cast: whether the value was rounded to x's dtype before the weight. closed: nothing more may be absorbed.
    """

    root: Node
    x: Node
    eps: float | Node
    n_dtype: torch.dtype
    trail: tuple[Node, ...]
    words: tuple[str, ...]
    weight: object = None
    offset: float = 0.0
    cast: bool = False
    closed: bool = False
    rounding: str = ""


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The RMSNorm around an anchor; None if there is none."""
    start = _from_call(view, anchor) if view.call(anchor, "rms_norm") else _from_rsqrt(view, anchor)
    if not isinstance(start, _Norm):
        return start
    # With the leading cast absorbed the result has to come back to x's dtype; if not, the cast one is the input.
    for norm in _inputs(view, start):
        end = _outwards(view, norm)
        if _is_whole(view, end):
            return _site(end)
    dtypes = f"{short(view.dtype(start.root))} from x {short(view.dtype(start.x))}"
    return refuse(anchor, f"the normalised value is {dtypes}", "normalise x.float(), outside autocast")


def _inputs(view: CanonicalGraph, norm: _Norm) -> list[_Norm]:
    """The norm on the narrow x behind the leading cast, if there is one, and on x as it stands."""
    trail: list[Node] = []
    base = view.narrowed(norm.x, trail)
    if view.dtype(base) in _HALF and view.dtype(norm.x) == torch.float32:
        words = (f"x cast from {short(view.dtype(base))}", *norm.words)
        return [replace(norm, x=base, trail=(*trail, *norm.trail), words=words), norm]
    return [norm]


def _from_rsqrt(view: CanonicalGraph, anchor: Node) -> _Norm | Refusal | None:
    statistic = find_statistic(view, anchor)
    if not isinstance(statistic, Statistic):
        return statistic
    product = find_product(view, anchor, statistic)
    if not isinstance(product, Product):
        return product
    dtype, factor_dtype = view.dtype(product.node), view.dtype(product.factor)
    trail = [*statistic.trail, *product.trail]
    base = view.narrowed(product.x, trail)
    norm = _Norm(product.node, base, statistic.eps, torch.float32, tuple(trail), (f"{statistic.square}, mean, rsqrt",))
    if dtype is not None and factor_dtype == view.dtype(anchor) == dtype:
        # The product may read a narrow x beside the wide factor; torch promotes it.
        wide = next((x for x in (product.x, statistic.h) if view.dtype(x) == dtype), base)
        return replace(norm, x=wide, n_dtype=dtype)
    if factor_dtype == dtype == view.dtype(base):
        # x * rsqrt(...).to(x.dtype): the product is rounded as a cast behind it would round.
        rounding = f"1 / rms is rounded to {short(dtype)} before it is multiplied"
        return replace(norm, cast=True, rounding=rounding, words=(*norm.words, "product in x's dtype"))
    return refuse(
        anchor,
        f"x {short(view.dtype(base))} is multiplied by a {short(factor_dtype)} factor into {short(dtype)}",
        "normalise in float32 and cast the result: (h * torch.rsqrt(...)).to(x.dtype)",
    )


def _from_call(view: CanonicalGraph, anchor: Node) -> _Norm | Refusal | None:
    call = view.call(anchor, "rms_norm")
    assert call is not None
    x, shape, weight = call["input"], call["normalized_shape"], call["weight"]
    dtype = view.dtype(x)
    if dtype is None or view.dtype(anchor) != dtype:
        return refuse(anchor, "autocast changes the dtype", "cast x before the norm, outside autocast")
    dims = shape if isinstance(shape, (tuple, list)) else (shape,)
    if len(dims) != 1:
        return refuse(
            anchor,
            f"normalized_shape has {len(dims)} dimensions, expected 1",
            "flatten the normalised dimensions into one",
        )
    n_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if weight is not None and torch.promote_types(view.dtype(weight) or n_dtype, n_dtype) != n_dtype:
        return refuse(anchor, f"the weight is {short(view.dtype(weight))} beside x {short(dtype)}", "cast the weight")
    # torch takes the eps of the dtype it computes in, which is float32 for half precision.
    eps = torch.finfo(n_dtype).eps if call["eps"] is None else view.number(call["eps"])
    if eps is None:
        return refuse(anchor, "eps is a tensor", "pass eps as a Python float")
    rounded = dtype in _HALF
    norm = _Norm(anchor, x, eps, n_dtype, (anchor,), ("rms_norm",), weight=weight, cast=rounded and weight is None)
    # A half-precision result is rounded after the weight, which leaves nothing to absorb.
    return replace(norm, closed=rounded and weight is not None)


def _outwards(view: CanonicalGraph, norm: _Norm) -> _Norm:
    """The norm with what follows it absorbed, as far as it can be expressed."""
    while not norm.closed:
        skipped: list[Node] = []
        found = view.only_reader(norm.root, skipped)
        if found is None:
            return norm
        value, reader = found
        step = _absorb_cast(view, norm, reader) or _absorb_weight(view, norm, value, reader)
        if step is None:
            return norm
        norm = replace(step, root=reader, trail=(*step.trail, *skipped, reader))
    return norm


def _absorb_cast(view: CanonicalGraph, norm: _Norm, reader: Node) -> _Norm | None:
    """A cast back to the dtype of a narrow x."""
    x_dtype, cast = view.dtype(norm.x), view.call(reader, "cast")
    if cast is None or norm.cast or view.dtype(reader) != x_dtype or x_dtype == norm.n_dtype:
        return None
    if norm.weight is None:
        return replace(norm, cast=True, words=(*norm.words, "cast"))
    return replace(norm, closed=True, words=(*norm.words, "cast last"))


def _absorb_weight(view: CanonicalGraph, norm: _Norm, value: Node, reader: Node) -> _Norm | None:
    """A multiply by a vector as long as the last dimension."""
    operands = view.operands(reader, "mul")
    if operands is None or norm.weight is not None or operands[0] is operands[1]:
        return None
    weight = operands[1] if operands[0] is value else operands[0]
    order = "y * w" if operands[0] is value else "w * y"
    vector = _as_vector(view, weight, view.shape(value))
    dtype = view.dtype(weight)
    if not isinstance(weight, Node) or vector is None or dtype is None or not dtype.is_floating_point:
        return None
    if torch.promote_types(dtype, view.dtype(value) or dtype) != view.dtype(reader):
        return None
    if norm.cast or torch.promote_types(dtype, norm.n_dtype) != norm.n_dtype:
        # Multiplied after the rounding, or by something wider than the statistics: the operator's other order.
        if norm.cast or view.dtype(norm.x) == norm.n_dtype:
            return replace(norm, weight=vector, cast=True, closed=True, words=(*norm.words, order))
        return None
    if vector is not weight:
        return replace(norm, weight=vector, words=(*norm.words, order))
    source, offset, trail = _without_offset(view, weight, norm.n_dtype)
    words = (*norm.words, f"{order} with w = {offset:g} + weight" if offset else order)
    return replace(norm, weight=source, offset=offset, words=words, trail=(*norm.trail, *trail))


def _as_vector(view: CanonicalGraph, weight: object, shape: tuple[Any, ...]) -> object | None:
    """The weight as [D]: itself, or a reshape of [1, ..., D]; None if it is something else."""
    own = view.shape(weight)
    if not own or len(own) > len(shape) or not same_size(own[-1], shape[-1]):
        return None
    if len(own) == 1:
        return weight
    return Make(torch.reshape, (weight, (-1,))) if all(same_size(size, 1) for size in own[:-1]) else None


def _without_offset(view: CanonicalGraph, weight: Node, n_dtype: torch.dtype) -> tuple[Node, float, tuple[Node, ...]]:
    """(w, c, nodes read) for a weight c + w that is added in the dtype of the statistics; (weight, 0, ()) otherwise."""
    trail: list[Node] = []
    plain = view.strip(weight, trail=trail)
    found = plus_number(view, plain)
    if found is not None and isinstance(found[1], float) and view.dtype(plain) == n_dtype:
        trail.append(plain)
        return view.strip(found[0], widening=True, trail=trail), found[1], tuple(trail)
    wide: list[Node] = []
    narrow = view.strip(weight, widening=True, trail=wide)
    return (narrow, 0.0, tuple(wide)) if view.dtype(weight) == n_dtype else (weight, 0.0, ())


def _is_whole(view: CanonicalGraph, norm: _Norm) -> bool:
    """Whether what was absorbed has the operator's result dtype."""
    x_dtype, out = view.dtype(norm.x), view.dtype(norm.root)
    if x_dtype is None or out is None:
        return False
    if norm.weight is not None and norm.cast:
        weight = norm.weight.args[0] if isinstance(norm.weight, Make) else norm.weight
        return torch.promote_types(x_dtype, view.dtype(weight) or x_dtype) == out
    return x_dtype == out


def _site(norm: _Norm) -> Site:
    cast_before_weight = norm.cast and norm.weight is not None
    args = (norm.x, norm.weight, norm.eps, norm.offset, cast_before_weight)
    interior = tuple(dict.fromkeys(norm.trail))
    return Site(KIND, (norm.root,), norm.root, args, interior, ", ".join(norm.words), norm.rounding)
