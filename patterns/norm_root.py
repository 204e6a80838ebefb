"""The root of a norm, 1 / sqrt(moment + eps) or sqrt(moment + eps), and the product or quotient that takes it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import as_vector
from infuse.patterns.norm_moments import at_least, number_of, past_reshapes, plus_number, scaled_by
from infuse.patterns.sites import Make
from infuse.patterns.sizes import same_shape

Eps = float | Node | Make
_ROOTS = (-0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Root:
    """A root and what stands under it.

    node: the root. is_inverse: whether it is 1 / sqrt(...). under: candidates for the moment; two when a tensor is
    added in the place of eps, which is None then. is_floor: whether the moment is bounded by eps instead. trail: the
    nodes read. row_size: of an L2 norm, the number of elements; divided by its root, the norm is a root mean square.
    """

    node: Node
    is_inverse: bool
    under: tuple[Node, ...]
    eps: float | Node | None
    is_floor: bool
    words: str
    trail: tuple[Node, ...]
    row_size: int | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """The node in which a root meets what it normalises.

    numerator: what is normalised, as it is read there. factor: the root as it is read there; shape: its shape before
    any expansion. weight: a vector that the numerator is multiplied with first. outside: whether a number is added to
    the finished root; floor: the number that bounds its square from below. is_scaled: whether an L2 norm has been
    divided by sqrt(n).
    """

    node: Node
    numerator: Node
    factor: Node
    shape: tuple[Any, ...]
    words: str
    trail: tuple[Node, ...]
    weight: Node | None
    outside: bool
    floor: Eps | None
    is_scaled: bool

    @property
    def keeps_dimension(self) -> bool:
        """Whether the root has the numerator's shape with a last dimension of 1."""
        return same_shape(self.shape, (*metadata.value(self.numerator).shape[:-1], 1))


@dataclass(frozen=True, slots=True)
class _Factor:
    """A value made of the root on the way to the product; fields as in `Product`. is_inverse: as in `Root`."""

    node: Node
    shape: tuple[Any, ...]
    is_inverse: bool
    trail: tuple[Node, ...] = ()
    outside: bool = False
    floor: Eps | None = None
    is_scaled: bool = False
    weight: Node | None = None


def may_be_root(view: CanonicalGraph, node: Node) -> bool:
    """Whether an anchor of the norms is worth a look: a power may be a root by its exponent alone."""
    return view.word(node) != "pow" or view.argument(node, "exponent") in _ROOTS


def read_root(view: CanonicalGraph, anchor: Node) -> Root | None:
    """The root that an anchor is: rsqrt, sqrt, pow with an exponent of one half."""
    call = view.call(anchor, "rsqrt", "sqrt", "pow")
    if call is None:
        return None
    exponent = {"rsqrt": -0.5, "sqrt": 0.5}.get(call.name) or view.number(call["exponent"])
    if exponent not in _ROOTS:
        return None
    words = f"pow {exponent:g}" if call.name == "pow" else call.name
    trail = [anchor]
    node = past_reshapes(view, call["input"], trail)
    root = Root(anchor, exponent == -0.5, (), 0.0, False, words, ())
    if (added := plus_number(view, node)) is not None:
        trail.append(node)
        root, node = replace(root, eps=added[1]), past_reshapes(view, added[0], trail)
    elif (bounded := at_least(view, node)) is not None:
        trail.append(node)
        root, node = replace(root, eps=bounded[1], is_floor=True), past_reshapes(view, bounded[0], trail)
    elif (operands := view.operands(node, "add")) is not None:
        under = tuple(past_reshapes(view, operand, []) for operand in operands if isinstance(operand, Node))
        return replace(root, under=under, eps=None, trail=tuple(trail))
    return replace(root, under=(node,), trail=tuple(trail)) if isinstance(node, Node) else None


Numerator = Callable[[Node, list[Node]], bool]


def find_product(view: CanonicalGraph, root: Root, is_numerator: Numerator) -> Product | None:
    """The first product of the root with a numerator, a quotient for a root that is no inverse.

    is_numerator: asked about a node; what it looks through on the way to a yes goes to the list.
    """
    pending = [_Factor(root.node, view.shape(root.node), root.is_inverse)]
    while pending:
        factor = pending.pop()
        for reader in view.readers(factor.node):
            following = _follow(view, root, factor, reader)
            if following is not None:
                pending.append(following)
                continue
            product = _product(view, factor, reader, is_numerator)
            if product is not None:
                return product
            following = _weighted_factor(view, factor, reader)
            if following is not None:
                pending.append(following)
    return None


def _follow(view: CanonicalGraph, root: Root, factor: _Factor, reader: Node) -> _Factor | None:
    """The factor behind a reader that keeps it a factor."""
    if not view.word(reader):
        return None
    step = replace(factor, node=reader, shape=view.shape(reader), trail=(*factor.trail, reader))
    if view.call(reader, "alias", "reshape", "cast") is not None:
        return step
    if view.call(reader, "expand") is not None:
        return replace(step, shape=factor.shape)
    if plus_number(view, reader) is not None:
        return replace(step, outside=True)
    if factor.is_inverse:
        return None
    bounded = at_least(view, reader)
    if bounded is not None and bounded[0] is factor.node and factor.floor is None:
        return replace(step, floor=_squared(bounded[1], None if factor.is_scaled else root.row_size))
    if _is_reciprocal(view, factor.node, reader):
        return replace(step, is_inverse=True)
    if root.row_size is not None and not factor.is_scaled:
        return replace(step, is_scaled=True) if scaled_by(view, reader, root.row_size, -0.5) is factor.node else None
    return None


def _weighted_factor(view: CanonicalGraph, factor: _Factor, reader: Node) -> _Factor | None:
    """The factor times the weight, for authors who multiply these two first."""
    operands = view.operands(reader, "mul")
    if operands is None or not factor.is_inverse or factor.weight is not None or operands[0] is operands[1]:
        return None
    weight = operands[1] if operands[0] is factor.node else operands[0]
    is_vector = isinstance(weight, Node) and as_vector(view, weight, view.shape(reader)) is weight
    if not is_vector or view.dtype(reader) != view.dtype(factor.node):
        return None
    return replace(factor, node=reader, weight=weight, trail=(*factor.trail, reader))


def _squared(bound: float | Node, row_size: int | None) -> Eps:
    """What a bound of a root, or of an L2 norm of so many elements, is for the mean of squares."""
    if isinstance(bound, float):
        return bound * bound / (row_size or 1)
    squared = Make(operator.mul, (bound, bound))
    return squared if row_size is None else Make(operator.truediv, (squared, row_size))


def _is_reciprocal(view: CanonicalGraph, factor: Node, reader: Node) -> bool:
    operands = view.operands(reader, "div")
    if operands is not None:
        return operands[1] is factor and number_of(view, operands[0]) == 1.0
    power = view.call(reader, "pow")
    return view.call(reader, "reciprocal") is not None or (power is not None and view.number(power["exponent"]) == -1.0)


def _product(view: CanonicalGraph, factor: _Factor, reader: Node, is_numerator: Numerator) -> Product | None:
    operands = view.operands(reader, "mul" if factor.is_inverse else "div")
    if operands is None or operands[0] is operands[1] or (not factor.is_inverse and operands[1] is not factor.node):
        return None
    numerator = operands[1] if operands[0] is factor.node else operands[0]
    if not isinstance(numerator, Node) or not same_shape(view.shape(reader), view.shape(numerator)):
        return None
    read: list[Node] = []
    weight = factor.weight
    if not is_numerator(numerator, read):
        if weight is not None:
            return None
        weighted = _weighted(view, numerator, is_numerator, read)
        if weighted is None or view.dtype(numerator) != view.dtype(factor.node):
            return None
        read.append(numerator)
        numerator, weight = weighted
    return Product(
        reader,
        numerator,
        factor.node,
        factor.shape,
        "multiply" if factor.is_inverse else "divide",
        (*factor.trail, *read, reader),
        weight,
        factor.outside,
        factor.floor,
        factor.is_scaled,
    )


def _weighted(view: CanonicalGraph, node: Node, is_numerator: Numerator, trail: list[Node]) -> tuple[Node, Node] | None:
    """(numerator, weight) of their product, for authors who multiply by the weight first."""
    operands = view.operands(node, "mul")
    if operands is None or len(view.readers(node)) > 1:
        return None
    for value, weight in (operands, operands[::-1]):
        is_vector = isinstance(weight, Node) and as_vector(view, weight, view.shape(node)) is weight
        if is_vector and isinstance(value, Node) and is_numerator(value, trail):
            return value, weight
    return None
