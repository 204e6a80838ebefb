"""Exact expressions over positions in a tensor: linear ones of integers, and truth values made of comparisons of them.

    Linear   2 * j - i + S - 1              integers; j and i are coordinates, S a symbolic size
    Formula  j - i <= 0 and i - j - 3 <= 0  truth values

Equal expressions are equal values for all positions and sizes; the reverse need not hold. What is not understood is an
atom (`Element`): equal to itself and to nothing else. Bounds are proven, never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A position along a dimension: 0 <= name < size."""

    name: str
    size: Linear


@dataclass(frozen=True, slots=True)
class Symbol:
    """A symbolic size, or a product of them, with its known bounds."""

    expression: Any
    low: int | None
    high: int | None


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a tensor of which nothing is known. version: how often the tensor had been written to."""

    source: Hashable
    indices: tuple[Linear, ...]
    version: int = 0


@dataclass(frozen=True, slots=True)
class Quotient:
    """floor(dividend / divisor), divisor positive."""

    dividend: Linear
    divisor: int


@dataclass(frozen=True, slots=True)
class Absolute:
    """|value|."""

    value: Linear


Atom = Coordinate | Symbol | Element | Quotient | Absolute


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + sum of factor * atom; no factor is 0."""

    terms: frozenset[tuple[Atom, int]] = frozenset()
    constant: int = 0

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.terms, self.constant + other)
        factors = dict(self.terms)
        for atom, factor in other.terms:
            factors[atom] = factors.get(atom, 0) + factor
        terms = frozenset((atom, factor) for atom, factor in factors.items() if factor)
        return Linear(terms, self.constant + other.constant)

    def __mul__(self, factor: int) -> Linear:
        if factor == 0:
            return Linear()
        return Linear(frozenset((atom, own * factor) for atom, own in self.terms), self.constant * factor)

    def __neg__(self) -> Linear:
        return self * -1

    def __sub__(self, other: Linear | int) -> Linear:
        return self + -other


def of(atom: Atom) -> Linear:
    """The atom as an expression."""
    return Linear(frozenset({(atom, 1)}))


def highest(value: Linear) -> int | None:
    """An upper bound over all positions and sizes; None if none is known."""
    ends = Linear(constant=value.constant)
    for atom, factor in value.terms:
        if not isinstance(atom, Coordinate):
            ends += of(atom) * factor
        elif factor > 0:
            ends += (atom.size - 1) * factor
    total = ends.constant
    for atom, factor in ends.terms:
        low, high = _bounds(atom)
        bound = high if factor > 0 else low
        if bound is None:
            return None
        total += factor * bound
    return total


def lowest(value: Linear) -> int | None:
    """A lower bound over all positions and sizes; None if none is known."""
    bound = highest(-value)
    return None if bound is None else -bound


def _bounds(atom: Atom) -> tuple[int | None, int | None]:
    if isinstance(atom, Symbol):
        return atom.low, atom.high
    return (0 if isinstance(atom, Absolute) else None), None


@dataclass(frozen=True, slots=True)
class AtMost:
    """value <= 0."""

    value: Linear


@dataclass(frozen=True, slots=True)
class IsZero:
    """value == 0 if `holds`, else value != 0."""

    value: Linear
    holds: bool = True


@dataclass(frozen=True, slots=True)
class IsTrue:
    """A bool element of which nothing is known, or its negation."""

    element: Element
    holds: bool = True


@dataclass(frozen=True, slots=True)
class All:
    """Every part is true; without parts: true."""

    parts: frozenset[Formula]


@dataclass(frozen=True, slots=True)
class Any_:
    """Some part is true; without parts: false."""

    parts: frozenset[Formula]


Formula = AtMost | IsZero | IsTrue | All | Any_
TRUE, FALSE = All(frozenset()), Any_(frozenset())


def truth(value: bool) -> Formula:
    """A constant."""
    return TRUE if value else FALSE


def at_most(value: Linear) -> Formula:
    """value <= 0. A single |x| in it is resolved: |x| + r <= 0 is x + r <= 0 and -x + r <= 0."""
    for atom, factor in value.terms:
        if isinstance(atom, Absolute):
            rest = value - of(atom) * factor
            sides = [at_most(rest + atom.value * (sign * abs(factor))) for sign in (1, -1)]
            return all_of(sides) if factor > 0 else any_of(sides)
    high, low = highest(value), lowest(value)
    if high is not None and high <= 0:
        return TRUE
    if low is not None and low > 0:
        return FALSE
    factor = _common_factor(value)
    return AtMost(Linear(_divided(value, factor), -(-value.constant // factor)))


def is_zero(value: Linear) -> Formula:
    """value == 0."""
    high, low = highest(value), lowest(value)
    if low is not None and high is not None and low == high == 0:
        return TRUE
    factor = _common_factor(value)
    if (high is not None and high < 0) or (low is not None and low > 0) or value.constant % factor:
        return FALSE
    return IsZero(Linear(_divided(value, factor), value.constant // factor))


def _common_factor(value: Linear) -> int:
    return math.gcd(*(factor for _, factor in value.terms)) or 1


def _divided(value: Linear, divisor: int) -> frozenset[tuple[Atom, int]]:
    return frozenset((atom, factor // divisor) for atom, factor in value.terms)


def negated(formula: Formula) -> Formula:
    """Not the formula; integers make not (v <= 0) the same as 1 - v <= 0."""
    if isinstance(formula, AtMost):
        return at_most(-formula.value + 1)
    if isinstance(formula, IsZero):
        return IsZero(formula.value, not formula.holds)
    if isinstance(formula, IsTrue):
        return IsTrue(formula.element, not formula.holds)
    parts = [negated(part) for part in formula.parts]
    return any_of(parts) if isinstance(formula, All) else all_of(parts)


def all_of(formulas: Iterable[Formula]) -> Formula:
    """The conjunction; of bounds on one expression the tightest is kept."""
    parts = _merged(formulas, All, max, 0)
    if FALSE in parts or any(negated(part) in parts for part in parts if not isinstance(part, (All, Any_))):
        return FALSE
    return next(iter(parts)) if len(parts) == 1 else All(parts)


def any_of(formulas: Iterable[Formula]) -> Formula:
    """The disjunction; of bounds on one expression the loosest is kept."""
    parts = _merged(formulas, Any_, min, 1)
    if TRUE in parts or any(negated(part) in parts for part in parts if not isinstance(part, (All, Any_))):
        return TRUE
    return next(iter(parts)) if len(parts) == 1 else Any_(parts)


def _merged(
    formulas: Iterable[Formula], kind: type[All] | type[Any_], choose: Callable[[int, int], int], edge: int
) -> frozenset[Formula]:
    """The parts without nesting, one bound for each expression.

    edge: v <= 0 and v != 0 is v <= -1 in a conjunction; v <= -1 or v == 0 is v <= 0 in a disjunction.
    """
    bounds: dict[frozenset[tuple[Atom, int]], int] = {}
    parts: set[Formula] = set()
    for formula in formulas:
        for part in formula.parts if isinstance(formula, kind) else (formula,):
            if isinstance(part, AtMost):
                terms, constant = part.value.terms, part.value.constant
                bounds[terms] = choose(bounds.get(terms, constant), constant)
            else:
                parts.add(part)
    for part in [part for part in parts if isinstance(part, IsZero) and part.holds == bool(edge)]:
        for side in (part.value, -part.value):
            if bounds.get(side.terms) == side.constant + edge:
                bounds[side.terms] = side.constant + 1 - edge
                parts.discard(part)
    return frozenset({*parts, *(AtMost(Linear(terms, constant)) for terms, constant in bounds.items())})


def mapped(value: Linear, change: Callable[[Atom], Linear | None]) -> Linear:
    """The expression with each atom replaced; None leaves it, and what is inside it is changed."""
    result = Linear(constant=value.constant)
    for atom, factor in value.terms:
        result += (change(atom) or _inside(atom, change)) * factor
    return result


def _inside(atom: Atom, change: Callable[[Atom], Linear | None]) -> Linear:
    if isinstance(atom, Element):
        return of(Element(atom.source, tuple(mapped(index, change) for index in atom.indices), atom.version))
    if isinstance(atom, Quotient):
        return quotient(mapped(atom.dividend, change), atom.divisor)
    if isinstance(atom, Absolute):
        return absolute(mapped(atom.value, change))
    return of(atom)


def quotient(dividend: Linear, divisor: int) -> Linear:
    """floor(dividend / divisor); multiples of the divisor are taken out."""
    assert divisor > 0
    whole = Linear(
        frozenset((atom, factor // divisor) for atom, factor in dividend.terms if factor % divisor == 0),
        dividend.constant // divisor,
    )
    rest = dividend - whole * divisor
    low, high = lowest(rest), highest(rest)
    if low is not None and high is not None and low // divisor == high // divisor:
        return whole + low // divisor
    return whole + of(Quotient(rest, divisor))


def absolute(value: Linear) -> Linear:
    """|value|."""
    low, high = lowest(value), highest(value)
    if low is not None and low >= 0:
        return value
    return -value if high is not None and high <= 0 else of(Absolute(value))


def substituted(formula: Formula, change: Callable[[Atom], Linear | None]) -> Formula:
    """The formula with atoms replaced."""
    if isinstance(formula, AtMost):
        return at_most(mapped(formula.value, change))
    if isinstance(formula, IsZero):
        result = is_zero(mapped(formula.value, change))
        return result if formula.holds else negated(result)
    if isinstance(formula, IsTrue):
        indices = tuple(mapped(index, change) for index in formula.element.indices)
        return IsTrue(Element(formula.element.source, indices, formula.element.version), formula.holds)
    parts = [substituted(part, change) for part in formula.parts]
    return all_of(parts) if isinstance(formula, All) else any_of(parts)


def atoms(value: Linear | Formula | Element) -> frozenset[Atom]:
    """Every atom in an expression, inner ones included; sizes of coordinates do not count."""
    if isinstance(value, Element):
        return frozenset[Atom]({value}).union(*(atoms(index) for index in value.indices))
    if isinstance(value, Linear):
        return frozenset[Atom]().union(*(_with_inner(atom) for atom, _ in value.terms))
    if isinstance(value, (AtMost, IsZero)):
        return atoms(value.value)
    if isinstance(value, IsTrue):
        return atoms(value.element)
    return frozenset[Atom]().union(*(atoms(part) for part in value.parts))


def _with_inner(atom: Atom) -> frozenset[Atom]:
    if isinstance(atom, Element):
        return atoms(atom)
    if isinstance(atom, Quotient):
        return atoms(atom.dividend) | {atom}
    return atoms(atom.value) | {atom} if isinstance(atom, Absolute) else frozenset({atom})
