"""RMSNorm written with an L2 norm: x / norm(x) * sqrt(n), x / (norm(x) / sqrt(n)), F.normalize(x) * sqrt(n).

A lower bound of the norm, as F.normalize has, is one of the mean of squares: norm >= c is mean >= c * c / n. Without
the factor sqrt(n) it is an L2 normalisation and no site.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from infuse.patterns import norm_affine
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import Norm
from infuse.patterns.norm_moments import equals, l2_norm
from infuse.patterns.norm_root import Eps, Root, find_product
from infuse.patterns.sites import Refusal

KIND = "rms_norm"
# What F.normalize takes without an eps.
_NORMALIZE_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class _Unit:
    """x / max(norm(x), bound), times sqrt(n) where is_scaled; eps: what bounds the mean of squares."""

    node: Node
    x: Node
    eps: Eps
    is_scaled: bool
    words: str
    trail: tuple[Node, ...]
    outside: bool = False


def from_l2(view: CanonicalGraph, anchor: Node) -> Norm | Refusal | None:
    """The RMSNorm around an L2 norm."""
    unit = _normalize(view, anchor) or _divided(view, anchor)
    scaled = _scaled(view, unit) if unit is not None else None
    if unit is None or scaled is None:
        return None
    if unit.outside:
        return Refusal(KIND, anchor, "eps is added outside the root", "add eps under it: rsqrt(mean + eps)")
    refusal = norm_affine.narrow_statistics(view, KIND, anchor, (unit.x, unit.node))
    if refusal is not None:
        return refusal
    dtype = view.dtype(unit.x)
    assert dtype is not None
    node, weight, trail = scaled
    norm = Norm(
        KIND,
        node,
        unit.x,
        dtype,
        unit.eps,
        dtype,
        (*unit.trail, *trail),
        (unit.words,),
        eps_as_minimum=True,
    )
    return norm if weight is None else norm_affine.weighted(view, norm, weight)


def _row_size(view: CanonicalGraph, x: object, dims: tuple[int, ...]) -> int | None:
    """The size of the last dimension if that alone is reduced; None for a symbolic one, whose root is not known."""
    shape = view.shape(x)
    is_last = len(shape) > 0 and dims == (len(shape) - 1,)
    return shape[-1] if is_last and type(shape[-1]) is int else None


def _normalize(view: CanonicalGraph, anchor: Node) -> _Unit | None:
    call = view.call(anchor, "normalize")
    if call is None or call["ord"] not in (None, 2, 2.0) or not isinstance(call["input"], Node):
        return None
    row_size = _row_size(view, call["input"], call["dim"])
    bound = _NORMALIZE_EPS if call["eps"] is None else view.number(call["eps"])
    if row_size is None or not isinstance(bound, float):
        return None
    return _Unit(anchor, call["input"], bound * bound / row_size, False, "F.normalize * sqrt(n)", (anchor,))


def _divided(view: CanonicalGraph, anchor: Node) -> _Unit | None:
    call = l2_norm(view, anchor)
    row_size = None if call is None else _row_size(view, call["input"], call["dim"])
    if call is None or row_size is None:
        return None
    root = Root(anchor, False, (), 0.0, False, "norm", (anchor,), row_size)
    product = find_product(view, root, lambda node, same: view.same_value(node, call["input"], same))
    if product is None or product.weight is not None or not product.keeps_dimension:
        return None
    eps = 0.0 if product.floor is None else product.floor
    words = "x / (norm / sqrt(n))" if product.is_scaled else "x / norm * sqrt(n)"
    trail = (anchor, *product.trail)
    if view.dtype(product.numerator) != view.dtype(product.node):
        return None
    return _Unit(product.node, product.numerator, eps, product.is_scaled, words, trail, product.outside)


def _scaled(view: CanonicalGraph, unit: _Unit) -> tuple[Node, Node | None, tuple[Node, ...]] | None:
    """(last node, weight, nodes read): x / norm times sqrt(n), before or behind a multiply by the weight."""
    node, weight = unit.node, None
    trail: list[Node] = []
    row_size = view.shape(unit.x)[-1]
    while not unit.is_scaled:
        found = view.only_reader(node, trail)
        operands = view.operands(found[1], "mul") if found is not None else None
        if found is None or operands is None:
            return None
        value, node = found
        other = operands[1] if operands[0] is value else operands[0]
        trail.append(node)
        if equals(view, other, row_size, 0.5):
            break
        is_vector = isinstance(other, Node) and norm_affine.as_vector(view, other, view.shape(value)) is other
        if weight is not None or not is_vector or view.dtype(node) != view.dtype(value):
            return None
        weight = other
    return node, weight, tuple(trail)
