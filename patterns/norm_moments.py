"""Means, mean squares and variances over dimensions of a tensor, in the ways that models write them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sizes import same_size

_LARGEST_ERROR = 4 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of `input` over `dims`. node: where its value stands, kept or reduced dimensions alike."""

    node: Node
    input: Node
    dims: tuple[int, ...]
    words: str


@dataclass(frozen=True, slots=True)
class Moment:
    """What stands under a norm's root: the mean of squares of `h`, or its variance, over `dims`.

    inner: the nodes whose dtype is that of the statistics. correction: 0 for the biased variance. rounding: as in
    `Site`.
    """

    h: Node
    dims: tuple[int, ...]
    words: str
    inner: tuple[Node, ...]
    correction: float = 0.0
    rounding: str = ""


def past_reshapes(view: CanonicalGraph, node: Any, trail: list[Node]) -> Any:
    """Looks through reshapes of a statistic (unsqueeze in place of keepdim); the product checks the final shape."""
    while True:
        node = view.strip(node, trail=trail)
        call = view.call(node, "reshape")
        if call is None:
            return node
        trail.append(node)
        node = call["input"]


def number_of(view: CanonicalGraph, value: object) -> float | Node | None:
    """A number, the node of a symbolic one, or what a constant tensor is filled with."""
    call = view.call(value, "full", "tensor")
    if call is None:
        return view.number(value)
    filled, dtype = view.number(call["fill_value"]), view.dtype(value)
    return float(torch.tensor(filled, dtype=dtype)) if isinstance(filled, float) and dtype is not None else filled


def plus_number(view: CanonicalGraph, node: object) -> tuple[Node, float | Node] | None:
    """(value, number) for a node that adds a number to a tensor."""
    operands = view.operands(node, "add")
    if operands is None:
        return None
    for value, other in (operands, operands[::-1]):
        number = number_of(view, other)
        if number is not None and view.tensor(value) is not None:
            return value, number
    return None


def at_least(view: CanonicalGraph, node: object) -> tuple[Node, float | Node] | None:
    """(value, number) for a node that bounds a tensor by a number from below."""
    call = view.call(node, "clamp", "maximum", "max")
    if call is None or not isinstance(call["input"], Node) or view.tensor(node) is None:
        return None
    if call.name == "clamp":
        number = number_of(view, call["min"])
        return (call["input"], number) if number is not None and call["max"] is None else None
    for value, other in ((call["input"], call["other"]), (call["other"], call["input"])):
        number = number_of(view, other)
        if number is not None and isinstance(value, Node):
            return value, number
    return None


def equals(view: CanonicalGraph, value: object, size: Any, power: float) -> bool:
    """Whether a value is provably size ** power; a symbolic size is compared itself only.

    A float that is symbolic because of dynamic shapes, such as a module's scale, is fixed by a guard if it is that now.
    """
    example = view.value(value) if isinstance(value, Node) else None
    if isinstance(value, Node) and power == 1.0:
        return isinstance(example, (int, torch.SymInt)) and same_size(example, size)
    if type(size) is not int or size <= 0:
        return False
    if isinstance(example, torch.SymFloat):
        return (
            example.node.has_hint() and _is_power(example.node.hint, size, power) and bool(example == example.node.hint)
        )
    number = number_of(view, value)
    return isinstance(number, float) and _is_power(number, size, power)


def _is_power(number: float, size: int, power: float) -> bool:
    return math.isclose(number, float(size) ** power, rel_tol=_LARGEST_ERROR)


def scaled_by(view: CanonicalGraph, node: object, size: Any, power: float) -> Node | None:
    """The value that a node multiplies by size ** power, or divides by its inverse."""
    for name, wanted in (("mul", power), ("div", -power)):
        operands = view.operands(node, name)
        if operands is None:
            continue
        pairs = [operands, operands[::-1]] if name == "mul" else [operands]
        for value, factor in pairs:
            if isinstance(value, Node) and view.tensor(value) is not None and equals(view, factor, size, wanted):
                return value
    return None


def mean_of(view: CanonicalGraph, node: Any, trail: list[Node]) -> Mean | None:
    """The mean that a node is, reshapes aside: mean, sum / n, sum * (1 / n), the second result of var_mean."""
    read: list[Node] = []
    node = past_reshapes(view, node, read)
    found = _mean(view, node, read)
    if found is not None:
        trail += read
    return found


def _mean(view: CanonicalGraph, node: Any, read: list[Node]) -> Mean | None:
    read.append(node)
    call = view.call(node, "mean")
    if call is not None:
        return Mean(node, call["input"], call["dim"], "mean")
    joint = _of_both(view, node, 1, read)
    if joint is not None:
        return Mean(node, joint["input"], joint["dim"], "var_mean")
    operands = view.operands(node, "div") or view.operands(node, "mul") or ()
    for operand in operands:
        total = view.call(operand, "sum")
        if total is None or len(total["dim"]) != 1:
            continue
        size = view.shape(total["input"])[total["dim"][0]]
        if (scaled := scaled_by(view, node, size, -1.0)) is operand and scaled is not None:
            read.append(scaled)
            return Mean(node, total["input"], total["dim"], "sum / n")
    return None


def _of_both(view: CanonicalGraph, node: object, which: int, trail: list[Node]) -> Any:
    """The var_mean (or std_mean) call whose result number `which` a node is."""
    item = view.call(node, "getitem")
    names = ("var_mean", "std_mean") if which else ("var_mean",)
    call = view.call(item["input"], *names) if item is not None and item["index"] == which else None
    if call is not None and item is not None:
        trail.append(item["input"])
    return call


def square_of(view: CanonicalGraph, node: object, trail: list[Node]) -> tuple[Node, str] | None:
    """(h, how it is written) for h**2, h.square() and h * h."""
    call = view.call(node, "pow", "square", "mul")
    if call is None or not isinstance(call["input"], Node):
        return None
    if call.name == "square":
        return call["input"], "square"
    if call.name == "pow":
        return (call["input"], "pow 2") if view.number(call["exponent"]) == 2.0 else None
    return (call["input"], "x * x") if view.same_value(call["input"], call["other"], trail) else None


def l2_norm(view: CanonicalGraph, node: object) -> Any:
    """The call of an L2 norm, None for other norms."""
    call = view.call(node, "vector_norm")
    if call is None or call["ord"] not in (None, 2, 2.0, "fro") or call["dtype"] is not None:
        return None
    return call


def mean_of_squares(view: CanonicalGraph, node: Any, trail: list[Node]) -> Moment | None:
    """mean(h * h) in its spellings; norm(h) ** 2 / n is one."""
    read: list[Node] = []
    mean = mean_of(view, node, read)
    if mean is not None:
        squared = view.strip(mean.input, widening=True, trail=read)
        square = square_of(view, squared, read)
        if square is None:
            return None
        trail += [*read, squared]
        return Moment(square[0], mean.dims, f"{square[1]}, {mean.words}", (squared, mean.node))
    return _of_squared_norm(view, node, trail) or _of_inner_product(view, node, trail)


def _of_inner_product(view: CanonicalGraph, node: Node, trail: list[Node]) -> Moment | None:
    """einsum("...d,...d->...", h, h) / n"""
    for operand in view.operands(node, "div") or view.operands(node, "mul") or ():
        read: list[Node] = []
        inner = past_reshapes(view, operand, read)
        call = view.call(inner, "einsum")
        if call is None or not isinstance(call["equation"], str) or len(call["operands"]) != 2:
            continue
        left, right = call["operands"]
        term, _, rest = call["equation"].replace(" ", "").partition(",")
        if rest != f"{term}->{term[:-1]}" or not term[-1:].isalpha() or not view.same_value(left, right, read):
            continue
        rank = len(view.shape(left))
        scaled = scaled_by(view, node, view.shape(left)[-1], -1.0)
        if scaled is operand and scaled is not None and len(set(term)) == len(term.replace("...", ".")):
            trail += [*read, inner, node, scaled]
            return Moment(left, (rank - 1,), "einsum / n", (inner, node))
    return None


def _of_squared_norm(view: CanonicalGraph, node: Node, trail: list[Node]) -> Moment | None:
    for operand in view.operands(node, "div") or view.operands(node, "mul") or ():
        read: list[Node] = []
        square = square_of(view, operand, read)
        call = l2_norm(view, square[0]) if square is not None else None
        if square is None or call is None or len(call["dim"]) != 1:
            continue
        size = view.shape(call["input"])[call["dim"][0]]
        if (scaled := scaled_by(view, node, size, -1.0)) is operand and scaled is not None:
            trail += [*read, node, scaled, square[0]]
            return Moment(call["input"], call["dim"], "norm ** 2 / n", (square[0], node))
    return None


def centred(view: CanonicalGraph, node: Any, trail: list[Node]) -> tuple[Node, Mean] | None:
    """(h, its mean) for a node that is h - mean(h)."""
    operands = view.operands(node, "sub")
    if operands is None or not isinstance(operands[0], Node):
        return None
    read: list[Node] = [node]
    mean = mean_of(view, view.strip(operands[1], widening=True, trail=read), read)
    if mean is None or not view.same_value(operands[0], mean.input, read):
        return None
    trail += read
    return operands[0], mean


def variance(view: CanonicalGraph, node: Any, trail: list[Node]) -> Moment | None:
    """The variance that a node is: var, var_mean, mean((h - mean) ** 2), mean(h * h) - mean(h) ** 2."""
    read: list[Node] = [node]
    call = view.call(node, "var") or _of_both(view, node, 0, read)
    if call is not None and isinstance(call["input"], Node):
        trail += read
        return Moment(call["input"], call["dim"], "var", (call["input"], node), _correction(call))
    moment = mean_of_squares(view, node, read)
    if moment is not None:
        difference = view.strip(moment.h, widening=True, trail=read)
        found = centred(view, difference, read)
        if found is None or found[1].dims != moment.dims:
            return None
        trail += read
        inner = (*moment.inner, found[1].node, difference)
        return Moment(found[0], moment.dims, f"x - mean, {moment.words}", inner)
    return _difference_of_moments(view, node, trail)


def deviation(view: CanonicalGraph, anchor: Node, trail: list[Node]) -> Moment | None:
    """The variance of a standard deviation; the node of the latter is the last one of the trail."""
    call = view.call(anchor, "std", "std_mean")
    if call is None or not isinstance(call["input"], Node):
        return None
    node = anchor
    if call.name == "std_mean":
        items = [reader for reader in view.readers(anchor) if view.call(reader, "getitem")]
        node = next((item for item in items if item.args[1] == 0), anchor)
        trail.append(anchor)
    trail.append(node)
    return Moment(call["input"], call["dim"], "std", (call["input"], node), _correction(call))


def _difference_of_moments(view: CanonicalGraph, node: Any, trail: list[Node]) -> Moment | None:
    operands = view.operands(node, "sub")
    read: list[Node] = [node]
    second = mean_of_squares(view, operands[0], read) if operands else None
    square = square_of(view, view.strip(operands[1], trail=read), read) if operands else None
    first = mean_of(view, square[0], read) if square else None
    if operands is None or second is None or first is None or first.dims != second.dims:
        return None
    if not view.same_value(first.input, second.h, read):
        return None
    trail += [*read, operands[1]]
    inner = (*second.inner, first.node, node)
    rounding = "mean(x^2) - mean(x)^2 cancels where the mean is large"
    return Moment(second.h, second.dims, "mean of squares less squared mean", inner, 0.0, rounding)


def _correction(call: Any) -> float:
    """What torch subtracts from n: 1 if nothing is said. NaN for what is not known."""
    given = call["correction"] if call["correction"] is not None else call["unbiased"]
    if given is None:
        return 1.0
    return float(given) if isinstance(given, (bool, int, float)) else float("nan")
