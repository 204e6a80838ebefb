"""The two terms of each element of a rotation, and whether together they turn pairs.

    y[i] = x[i] * cos[i] + sign * x[partner(i)] * sin[i]

A real rotation is one sum of two products as wide as x, or two sums, one for each element of the pairs; a complex one
is one product. Which of a product's factors is x and which the table, and which table is the cosine, is settled by what
makes a rotation of the whole: nothing is taken from names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from infuse.patterns import rotary_matrices
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.lanes import Codes, Lanes
from infuse.patterns.sizes import broadcasts_to, same_shape, same_size

_MAX_SIGNS = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One way to read a product: as x * table.

    leaf: the tensor that x's elements are of. codes: of x, with the sign of the term. table: its own sign taken off.
    """

    leaf: Node
    codes: Codes
    table: Node


@dataclass(frozen=True, slots=True)
class Term:
    """A product, and the ways to read it."""

    product: Node
    parts: tuple[Part, ...]

    def of(self, leaf: Node) -> Part | None:
        """The product read as one of this tensor's elements."""
        return next((part for part in self.parts if part.leaf is leaf), None)


@dataclass(frozen=True, slots=True)
class Sum:
    """A node that is a sum of two terms. A complex product is one too: its table is cosine and sine at once.

    is_matrix: it is a product with matrices of two by two, whose columns are taken for the tables.
    """

    node: Node
    terms: tuple[Term, Term]
    is_complex: bool = False
    is_matrix: bool = False

    @property
    def is_paired(self) -> bool:
        """Whether the node holds the two elements of a pair next to each other, which meet one cosine and one sine."""
        return self.is_complex or self.is_matrix


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation that has been found, of R elements out of D.

    x: codes of the elements that are rotated and, behind them, passed through [D]. owner: which sum a rotated element
    is of [R]. cos, sin: for each sum the part that is taken for the cosine's and for the sine's product.
    """

    leaf: Node
    x: Codes
    owner: Codes
    interleaved: bool
    inverse: bool
    sums: tuple[Sum, ...]
    cos: tuple[Part, ...]
    sin: tuple[Part, ...]


def sum_of_terms(view: CanonicalGraph, lanes: Lanes, node: Node) -> Sum | None:
    """The node read as a sum of two products, a complex product or one of matrices; None for anything else."""
    if lanes.is_complex(node):
        return _complex_product(view, lanes, node)
    if len(view.shape(node)) - lanes.lead == 2:
        return _matrix_product(view, lanes, node)
    for name, sign in (("add", 1), ("sub", -1)):
        operands = view.operands(node, name)
        if operands is not None:
            first = _term(view, lanes, node, operands[0], 1)
            second = _term(view, lanes, node, operands[1], sign)
            return Sum(node, (first, second)) if first is not None and second is not None else None
    return None


def _unsigned(view: CanonicalGraph, node: object) -> tuple[object, int]:
    """(value, sign) of a value behind minus signs."""
    sign = 1
    for _ in range(_MAX_SIGNS):
        node = view.strip(node)
        call = view.call(node, "neg", "mul")
        if call is None or (call.name == "mul" and call["other"] != -1):
            break
        node, sign = call["input"], -sign
    return node, sign


def _term(view: CanonicalGraph, lanes: Lanes, total: Node, operand: object, sign: int) -> Term | None:
    product, own_sign = _unsigned(view, operand)
    while (scaled := view.operands(product, "mul")) is not None and scaled[1] == 1:
        product = view.strip(scaled[0])  # A scale that may be set, and is not.
    factors = view.operands(product, "mul")
    if factors is None or not isinstance(product, Node) or view.dtype(product) != view.dtype(total):
        return None
    if not same_shape(view.shape(product), view.shape(total)):
        return None
    orders = (factors, factors[::-1])
    found = (_part(view, lanes, product, x, table, sign * own_sign) for x, table in orders)
    parts = tuple(part for part in found if part is not None)
    return Term(product, parts) if parts else None


def _part(view: CanonicalGraph, lanes: Lanes, product: Node, x: object, table: object, sign: int) -> Part | None:
    """The product read as x * table; x has its shape, and the table broadcasts to that."""
    table, table_sign = _unsigned(view, table)
    shape, own = view.shape(product), view.shape(table)
    if not isinstance(table, Node) or not own or not same_shape(view.shape(x), shape):
        return None
    if not same_size(own[-1], shape[-1]) or not broadcasts_to(own, shape):
        return None
    codes = lanes.read(x)
    if codes is None:
        return None
    owners = np.unique(lanes.owners(codes))
    return Part(lanes.leaves[owners[0]], codes * (sign * table_sign), table) if owners.size == 1 else None


def _complex_product(view: CanonicalGraph, lanes: Lanes, node: Node) -> Sum | None:
    """(a + ib)(c + is) = (ac - bs) + i(bc + as); codes are [..., 2]."""
    factors = view.operands(node, "mul")
    if factors is None or not all(lanes.is_complex(factor) for factor in factors):
        return None
    parts = [_part(view, lanes, node, x, table, 1) for x, table in (factors, factors[::-1])]
    cos = tuple(part for part in parts if part is not None)
    sin = tuple(
        Part(part.leaf, np.stack([-part.codes[..., 1], part.codes[..., 0]], axis=-1), part.table) for part in cos
    )
    return Sum(node, (Term(node, cos), Term(node, sin)), True) if cos else None


def _matrix_product(view: CanonicalGraph, lanes: Lanes, node: Node) -> Sum | None:
    """(x1, x2) cos + (-x2, x1) sin; the tables are the columns (cos, sin) and (-sin, cos), unproven as yet."""
    found = rotary_matrices.columns(view, lanes, node)
    if found is None or lanes.read(node) is None:
        return None
    first, second = found
    cos = Part(first.leaf, np.stack([first.x, second.x], axis=-1), first.table)
    sin = Part(first.leaf, np.stack([-second.x, first.x], axis=-1), second.table)
    return Sum(node, (Term(first.product, (cos,)), Term(second.product, (sin,))), is_matrix=True)


def rotation_of(lanes: Lanes, codes: Codes, sums: Sequence[Sum]) -> Rotation | None:
    """The rotation whose result has these codes [D]."""
    if codes.ndim != 1 or (codes <= 0).any() or not all(item.node in lanes.leaves for item in sums):
        return None
    numbers = [lanes.leaves.index(item.node) for item in sums]
    owners = lanes.owners(codes)
    rotated = np.isin(owners, numbers)
    rotary = int(rotated.sum())
    if rotary == 0 or rotary % 2 or not rotated[:rotary].all():
        return None
    owner = np.array([numbers.index(number) for number in owners[:rotary]])
    place = codes[:rotary] - np.array([lanes.span(item.node)[0] for item in sums])[owner]
    for leaf, cos, sin in _readings(sums):
        a, b = (_gather(parts, owner, place) for parts in (cos, sin))
        x = np.concatenate([a, codes[rotary:]])
        if (a <= 0).any() or np.unique(x).size != x.size or (lanes.owners(x) != lanes.leaves.index(leaf)).any():
            continue
        for interleaved in (False, True):
            inverse = _direction(a, b, interleaved)
            if inverse is not None and np.array_equal(place, _places(rotary, interleaved, sums)):
                return Rotation(leaf, x, owner, interleaved, inverse, tuple(sums), cos, sin)
    return None


def _readings(sums: Sequence[Sum]) -> Iterator[tuple[Node, tuple[Part, ...], tuple[Part, ...]]]:
    """Each way to take one tensor for x, and of each sum one product for the cosine's: (leaf, cos parts, sin parts)."""
    for leaf in common_leaves(sums):
        orders = [((0, 1),) if item.is_paired else ((0, 1), (1, 0)) for item in sums]
        for order in itertools.product(*orders):
            cos, sin = [], []
            for item, (first, second) in zip(sums, order):
                parts = item.terms[first].of(leaf), item.terms[second].of(leaf)
                assert parts[0] is not None and parts[1] is not None
                cos.append(parts[0])
                sin.append(parts[1])
            yield leaf, tuple(cos), tuple(sin)


def common_leaves(sums: Sequence[Sum]) -> list[Node]:
    """The tensors that every product can be read to be one of."""
    terms = [term for item in sums for term in item.terms]
    return [part.leaf for part in terms[0].parts if all(term.of(part.leaf) is not None for term in terms)]


def _gather(parts: Sequence[Part], owner: Codes, place: Codes) -> Codes:
    """For each rotated element the code of the element of x in its sum's product."""
    found = np.empty_like(place)
    for number, part in enumerate(parts):
        found[owner == number] = part.codes.ravel()[place[owner == number]]
    return found


def _direction(a: Codes, b: Codes, interleaved: bool) -> bool | None:
    """Whether the pairs turn backwards; None if these are not the pairs."""
    a1, a2 = (a[0::2], a[1::2]) if interleaved else np.split(a, 2)
    b1, b2 = (b[0::2], b[1::2]) if interleaved else np.split(b, 2)
    for inverse, sign in ((False, 1), (True, -1)):
        if np.array_equal(b1, -sign * a2) and np.array_equal(b2, sign * a1):
            return inverse
    return None


def _places(rotary: int, interleaved: bool, sums: Sequence[Sum]) -> Codes:
    """Where in its sum each rotated element must be for the tables to be in order."""
    element = np.arange(rotary)
    pair, side = (element // 2, element % 2) if interleaved else (element % (rotary // 2), element // (rotary // 2))
    if sums[0].is_paired:
        return 2 * pair + side
    return element if len(sums) == 1 else pair


def resembles(sums: Sequence[Sum]) -> bool:
    """Whether the same elements of one tensor meet both tables, so that a rotation may be meant."""
    for leaf in common_leaves(sums):
        parts = [[term.of(leaf) for term in item.terms] for item in sums]
        elements = [{*np.abs(part.codes).ravel().tolist()} for pair in parts for part in pair if part is not None]
        if len(sums) == 1 and elements[0] == elements[1]:
            return True
        if len(sums) == 2 and elements[0] | elements[1] == elements[2] | elements[3]:
            return True
    return False
