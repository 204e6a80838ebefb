"""Reads arithmetic on one tensor and numbers as a polynomial in that tensor, in whatever order it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph

Polynomial = dict[int, float]
"""Coefficients by power: x + 0.044715 x^3 is {1: 1, 3: 0.044715}."""

_MAX_DEPTH = 8
_MAX_DEGREE = 3
# Authors write constants with 8 digits at least.
_RELATIVE = 1e-6


@dataclass(slots=True)
class PolynomialReader:
    """Reads values as polynomials in `base`.

    nodes: what was read on the way. symbols: the symbolic numbers among the coefficients, taken at their present value:
    under dynamic shapes even math.pi, a global, is one.
    """

    view: CanonicalGraph
    base: Node
    nodes: list[Node] = field(default_factory=list)
    symbols: list[torch.SymFloat] = field(default_factory=list)

    def read(self, value: object, depth: int = _MAX_DEPTH) -> Polynomial | None:
        """`value` as a polynomial, casts that lose nothing aside; None if it is none, or of a high degree."""
        view = self.view
        number = self._number(value)
        if number is not None:
            return {0: number}
        if not isinstance(value, Node) or depth == 0:
            return None
        if view.same_value(value, self.base, self.nodes):
            return {1: 1.0}
        call = view.call(value, "alias", "cast", "add", "sub", "mul", "div", "neg", "square", "pow")
        if call is None or (call.name == "cast" and not view.widens(value)):
            return None
        self.nodes.append(value)
        first = self.read(call["input"], depth - 1)
        if first is None or call.name in ("alias", "cast"):
            return first
        if call.name == "neg":
            return product({0: -1.0}, first)
        if call.name in ("square", "pow"):
            return _power(first, 2 if call.name == "square" else call["exponent"])
        if view.operands(value, call.name) is None:
            return None
        return _combined(call.name, first, self.read(call["other"], depth - 1))

    def _number(self, value: object) -> float | None:
        number = self.view.number(value)
        if not isinstance(number, Node):
            return number
        example = self.view.value(number)
        if not isinstance(example, torch.SymFloat) or not example.node.has_hint():
            return None
        self.symbols.append(example)
        return float(example.node.hint)

    def fix_symbols(self) -> bool:
        """Guards on the present values of symbolic coefficients; unlike sizes they do not vary from call to call."""
        return all(bool(symbol == symbol.node.hint) for symbol in self.symbols)


def _combined(name: str, first: Polynomial, second: Polynomial | None) -> Polynomial | None:
    if second is None:
        return None
    if name == "add":
        return _sum(first, second)
    if name == "sub":
        return _sum(first, product({0: -1.0}, second))
    if name == "div":
        divisor = second.get(0, 0.0)
        return product(first, {0: 1.0 / divisor}) if divisor and set(second) == {0} else None
    return product(first, second)


def _sum(left: Polynomial, right: Polynomial | None) -> Polynomial | None:
    if right is None:
        return None
    return {power: left.get(power, 0.0) + right.get(power, 0.0) for power in {*left, *right}}


def product(left: Polynomial | None, right: Polynomial | None) -> Polynomial | None:
    """The product of two polynomials; None if one is None or the degree is high."""
    if left is None or right is None:
        return None
    result: Polynomial = {}
    for a, x in left.items():
        for b, y in right.items():
            result[a + b] = result.get(a + b, 0.0) + x * y
    return result if max(result) <= _MAX_DEGREE else None


def _power(base: Polynomial, exponent: object) -> Polynomial | None:
    if exponent not in (2, 3):
        return None
    square = product(base, base)
    return square if exponent == 2 else product(square, base)


def same_polynomial(got: Polynomial | None, expected: Polynomial) -> bool:
    """Whether the coefficients agree as far as authors write them out."""
    if got is None:
        return False
    powers = {power for power, coefficient in got.items() if coefficient} | set(expected)
    return all(math.isclose(got.get(p, 0.0), expected.get(p, 0.0), rel_tol=_RELATIVE) for p in powers)
