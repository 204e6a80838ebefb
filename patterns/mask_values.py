"""What one element of a tensor is, as an expression over its position: a number, a truth value, or a choice of those.

    torch.triu(torch.full((S, S), -inf), 1)   Choice(i - j + 1 <= 0, -inf, 0.0)

Bool elements are a `Formula`; integers `Linear`; floats `Number`; what is unknown an `Element`. An integer or a float
can be a `Choice`, a tree with those as leaves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.index_algebra import (
    FALSE,
    TRUE,
    All,
    Any_,
    AtMost,
    Atom,
    Coordinate,
    Element,
    Formula,
    IsTrue,
    IsZero,
    Linear,
    absolute,
    all_of,
    any_of,
    at_most,
    atoms,
    is_zero,
    mapped,
    negated,
    of,
    quotient,
    substituted,
    truth,
)

FORMULAS = (AtMost, IsZero, IsTrue, All, Any_)
# Positions and what is computed of them stay far inside these; narrower integers may wrap around.
INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, slots=True)
class Number:
    """A known float."""

    value: float


@dataclass(frozen=True, slots=True)
class Choice:
    """then where the condition holds, otherwise elsewhere."""

    condition: Formula
    then: Value
    otherwise: Value


Leaf = Linear | Number | Element | Formula
Value = Leaf | Choice


def choose(condition: Formula, then: Value, otherwise: Value) -> Value:
    """The choice in its simplest known form; between truth values it is a formula."""
    then, otherwise = _given(then, condition, True), _given(otherwise, condition, False)
    if condition == TRUE or then == otherwise:
        return then
    if condition == FALSE:
        return otherwise
    pinned = _pinned(condition)
    if pinned is not None and replaced(then, pinned) == replaced(otherwise, pinned):
        return otherwise
    if isinstance(then, FORMULAS) and isinstance(otherwise, FORMULAS):
        return any_of([all_of([condition, then]), all_of([negated(condition), otherwise])])
    return Choice(condition, then, otherwise)


def _given(value: Value, condition: Formula, holds: bool) -> Value:
    """The value where it is known whether the condition holds."""
    if not isinstance(value, Choice):
        return value
    if value.condition == condition:
        return _given(value.then if holds else value.otherwise, condition, holds)
    return Choice(value.condition, _given(value.then, condition, holds), _given(value.otherwise, condition, holds))


def _pinned(condition: Formula) -> Callable[[Atom], Linear | None] | None:
    """For a condition that leaves a coordinate one position only, `x <= 0`, the replacement of it by that position."""
    if not isinstance(condition, AtMost) or condition.value.constant or len(condition.value.terms) != 1:
        return None
    ((coordinate, factor),) = condition.value.terms
    if not isinstance(coordinate, Coordinate) or factor < 0:
        return None
    return lambda atom: Linear() if atom == coordinate else None


def replaced(value: Value, change: Callable[[Atom], Linear | None]) -> Value:
    """The value with atoms replaced."""
    if isinstance(value, Choice):
        condition = substituted(value.condition, change)
        return choose(condition, replaced(value.then, change), replaced(value.otherwise, change))
    if isinstance(value, Linear):
        return mapped(value, change)
    if isinstance(value, Element):
        return Element(value.source, tuple(mapped(index, change) for index in value.indices), value.version)
    return value if isinstance(value, Number) else substituted(value, change)


def combine(function: Callable[..., Value], *values: Value) -> Value:
    """A function of leaves, applied to choices of them."""
    for place, value in enumerate(values):
        if isinstance(value, Choice):
            before, after = values[:place], values[place + 1 :]
            return choose(
                value.condition,
                combine(function, *before, value.then, *after),
                combine(function, *before, value.otherwise, *after),
            )
    return function(*values)


def leaves(value: Value) -> Iterator[tuple[Leaf, Formula]]:
    """The leaves, each with the condition under which it is the value."""
    if not isinstance(value, Choice):
        yield value, TRUE
        return
    for branch, condition in ((value.then, value.condition), (value.otherwise, negated(value.condition))):
        for leaf, inner in leaves(branch):
            yield leaf, all_of([condition, inner])


def parts_of(value: Value) -> frozenset[Atom]:
    """Every atom in the value, those of its conditions included."""
    if isinstance(value, Choice):
        conditions = substance(value.condition)
        return conditions | parts_of(value.then) | parts_of(value.otherwise)
    return substance(value)


def substance(leaf: Leaf) -> frozenset[Atom]:
    """Every atom in a leaf."""
    return frozenset() if isinstance(leaf, Number) else atoms(leaf)


def weight(value: Value | object) -> int:
    """How large an expression is, to stop before it grows without bound."""
    if isinstance(value, Choice):
        return 1 + weight(value.condition) + weight(value.then) + weight(value.otherwise)
    if isinstance(value, (All, Any_)):
        return 1 + sum(weight(part) for part in value.parts)
    if isinstance(value, (AtMost, IsZero)):
        return len(value.value.terms) + 1
    return len(value.terms) + 1 if isinstance(value, Linear) else 1


def unknown(element: Element, dtype: torch.dtype) -> Leaf:
    """The element of a tensor of that dtype."""
    if dtype == torch.bool:
        return IsTrue(element)
    return element if dtype.is_floating_point or dtype.is_complex else of(element)


def constant(leaf: object) -> float | int | bool | None:
    """The Python number that a leaf is; None if it is none."""
    if isinstance(leaf, Number):
        return leaf.value
    if isinstance(leaf, Linear):
        return None if leaf.terms else leaf.constant
    return True if leaf == TRUE else False if leaf == FALSE else None


def literal(value: float | int | bool) -> Leaf:
    """A Python number as a leaf."""
    if isinstance(value, bool):
        return truth(value)
    return Linear(constant=value) if isinstance(value, int) else Number(value)


def spread(value: Value) -> Value:
    """A truth value that is not constant as a choice of True and False, so that it can be computed with."""
    return Choice(value, TRUE, FALSE) if isinstance(value, FORMULAS) and value not in (TRUE, FALSE) else value


def as_formula(value: Value) -> Formula:
    """Whether the value is not zero."""

    def differs(leaf: Leaf) -> Formula:
        if isinstance(leaf, Number):
            return truth(leaf.value != 0)
        if isinstance(leaf, Linear):
            return negated(is_zero(leaf))
        return IsTrue(leaf) if isinstance(leaf, Element) else leaf

    result = combine(differs, value)
    assert isinstance(result, FORMULAS)
    return result


def cast(value: Value, dtype: torch.dtype, element: Element) -> Value:
    """The value converted; element: the result, for a leaf whose conversion is not known."""
    if dtype == torch.bool:
        return as_formula(value)

    def convert(leaf: Leaf) -> Value:
        number = constant(leaf)
        if number is not None and (dtype.is_floating_point or math.isfinite(number)):
            wide = torch.float64 if isinstance(number, float) else torch.int64
            with metadata.real():
                return literal(torch.tensor(number, dtype=wide, device="cpu").to(dtype).item())
        safe = isinstance(leaf, Linear) and not any(isinstance(atom, Element) for atom in atoms(leaf))
        if dtype == torch.int64 or (dtype == torch.int32 and safe):
            return leaf if isinstance(leaf, Linear) else unknown(element, dtype)
        return unknown(element, dtype)

    return combine(convert, spread(value))


def compute(node: Node, operands: Mapping[Node, Leaf]) -> Leaf | None:
    """The node's result for constant operands, by running it on one element; None if they are not constant.

    So rounding, promotion and everything else is torch's own.
    """
    numbers = {operand: constant(leaf) for operand, leaf in operands.items()}
    if None in numbers.values():
        return None

    def argument(operand: Node) -> Any:
        number, example = numbers[operand], metadata.value(operand)
        if not isinstance(example, torch.Tensor):
            return number
        shape = (1,) if example.dim() else ()
        return torch.full(shape, number, dtype=example.dtype, device="cpu")  # type: ignore[arg-type]

    with metadata.real():
        try:
            args: Any = torch.fx.map_arg(node.args, argument)
            kwargs: Any = torch.fx.map_arg(node.kwargs, argument)
            result = metadata.evaluate(node.target, args, kwargs)
        except (RuntimeError, TypeError, ValueError, OverflowError, ZeroDivisionError):
            return None
        item = result.item() if isinstance(result, torch.Tensor) and result.numel() == 1 else result
    return literal(item) if isinstance(item, (bool, int, float)) else None


def compare(word: str, left: Leaf, right: Leaf) -> Formula | None:
    """A comparison of two integers, or of two truth values for being equal."""
    if isinstance(left, FORMULAS) and isinstance(right, FORMULAS) and word in ("eq", "ne"):
        same = any_of([all_of([left, right]), all_of([negated(left), negated(right)])])
        return same if word == "eq" else negated(same)
    first, second = _integer(left), _integer(right)
    if first is None or second is None:
        return None
    if word in ("eq", "ne"):
        return is_zero(first - second) if word == "eq" else negated(is_zero(first - second))
    return at_most(
        {"lt": first - second + 1, "le": first - second, "gt": second - first + 1, "ge": second - first}[word]
    )


def _integer(leaf: Leaf) -> Linear | None:
    # Beside a tensor of bfloat16 an integer is rounded to 8 bits before it is compared.
    if isinstance(leaf, Number) and abs(leaf.value) < 256 and leaf.value.is_integer():
        return Linear(constant=int(leaf.value))
    return leaf if isinstance(leaf, Linear) else None


def calculate(word: str, left: Leaf, right: Leaf, dtype: torch.dtype) -> Value | None:
    """Arithmetic of two integers; None where it could wrap around or is not linear."""
    if not isinstance(left, Linear) or not isinstance(right, Linear):
        return None
    if word in ("add", "sub"):
        return left + right if word == "add" else left - right
    if word in ("maximum", "minimum"):
        is_less = at_most(left - right)
        return choose(is_less, right, left) if word == "maximum" else choose(is_less, left, right)
    first, second = constant(left), constant(right)
    if word == "mul" and dtype == torch.int64 and (first is not None or second is not None):
        return left * int(second) if second is not None else right * int(first)  # type: ignore[arg-type]
    if word in ("floor_divide", "remainder") and second is not None and second > 0:
        whole = quotient(left, int(second))
        return whole if word == "floor_divide" else left - whole * int(second)
    return None


UNARY: dict[str, Callable[[Linear], Linear]] = {"neg": operator.neg, "abs": absolute}
