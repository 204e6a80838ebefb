"""The inner half of a hand-written RMSNorm: 1 / sqrt(mean(h * h) + eps), and the product of x with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import plus_number, short
from infuse.patterns.sites import Refusal
from infuse.patterns.sizes import same_shape

KIND = "rms_norm"


@dataclass(frozen=True, slots=True)
class Statistic:
    """rsqrt(mean(h * h, -1) + eps). eps: a number or the node of one. trail: the nodes read."""

    h: Node
    eps: float | Node
    square: str
    trail: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """x * factor: the node, x as it is read there, the reciprocal root as it is read there, the nodes between."""

    node: Node
    x: Node
    factor: Node
    trail: tuple[Node, ...]


def refuse(node: Node, reason: str, remedy: str) -> Refusal:
    """A refusal of an RMSNorm."""
    return Refusal(KIND, node, reason, remedy)


def find_statistic(view: CanonicalGraph, anchor: Node) -> Statistic | Refusal | None:
    """What an rsqrt is taken of, if it is a mean of squares; None for any other rsqrt."""
    trail: list[Node] = [anchor]
    found = _mean_and_eps(view, anchor, trail)
    if not isinstance(found, tuple):
        return found
    mean, eps = found
    call = view.call(mean, "mean")
    assert call is not None
    squared = view.strip(call["input"], widening=True, trail=trail)
    inside = plus_number(view, squared)
    if inside is not None and _square(view, view.strip(inside[0]), []) is not None:
        return refuse(anchor, "eps is added inside the mean", "add eps to the mean of squares: rsqrt(mean + eps)")
    square = _square(view, squared, trail)
    if square is None or _is_centred(view, view.strip(square[0], widening=True)):
        return None
    trail.append(squared)
    return _checked(view, Statistic(square[0], eps, square[1], tuple(trail)), call["dim"], (squared, mean))


def _mean_and_eps(view: CanonicalGraph, anchor: Node, trail: list[Node]) -> tuple[Node, float | Node] | Refusal | None:
    """(mean, eps) for rsqrt(mean(...) + eps), eps being 0 where none is added."""
    call = view.call(anchor, "rsqrt")
    node = _past_reshapes(view, call["input"], trail) if call else None
    eps: float | Node = 0.0
    if isinstance(node, Node) and (found := plus_number(view, node)) is not None:
        trail.append(node)
        node, eps = _past_reshapes(view, found[0], trail), found[1]
    elif any(_is_mean_of_squares(view, operand) for operand in view.operands(node, "add") or ()):
        return refuse(anchor, "eps is a tensor", "keep eps as a Python float")
    if not isinstance(node, Node) or view.call(node, "mean") is None:
        return None
    trail.append(node)
    return node, eps


def _checked(
    view: CanonicalGraph, statistic: Statistic, dims: tuple[int, ...], nodes: tuple[Node, Node]
) -> Statistic | Refusal | None:
    """The statistic if it is over the last dimension and in float32 (float64 for float64)."""
    anchor = statistic.trail[0]
    rank = len(view.shape(nodes[0]))
    if dims != (rank - 1,):
        names = " and ".join(str(dim) for dim in dims)
        return refuse(
            anchor,
            f"the mean of squares runs over dimension {names} of {rank}, expected the last one alone",
            "move the normalised dimension to the end, or normalise one dimension at a time",
        )
    dtypes = {view.dtype(node) for node in (*nodes, anchor)}
    if dtypes != {torch.float32} and dtypes != {torch.float64}:
        names = ", ".join(sorted(short(dtype) for dtype in dtypes))
        return refuse(
            anchor,
            f"the statistics are not computed in float32 throughout: got {names}",
            "compute them in float32: x.float().pow(2).mean(-1, keepdim=True)",
        )
    return statistic


def _is_mean_of_squares(view: CanonicalGraph, node: object) -> bool:
    mean = view.call(node, "mean")
    return mean is not None and _square(view, view.strip(mean["input"]), []) is not None


def _past_reshapes(view: CanonicalGraph, node: Any, trail: list[Node]) -> Any:
    """Looks through reshapes of the statistic (unsqueeze in place of keepdim); the product checks the final shape."""
    while True:
        node = view.strip(node, trail=trail)
        call = view.call(node, "reshape")
        if call is None:
            return node
        trail.append(node)
        node = call["input"]


def _square(view: CanonicalGraph, node: object, trail: list[Node]) -> tuple[Node, str] | None:
    """(h, how it is written) for h**2, h.square() and h * h."""
    call = view.call(node, "pow", "square", "mul")
    if call is None or not isinstance(call["input"], Node):
        return None
    if call.name == "square":
        return call["input"], "square"
    if call.name == "pow":
        return (call["input"], "pow 2") if view.number(call["exponent"]) == 2.0 else None
    return (call["input"], "x * x") if view.same_value(call["input"], call["other"], trail) else None


def find_product(view: CanonicalGraph, anchor: Node, statistic: Statistic) -> Product | Refusal | None:
    """The multiply of x by the reciprocal root."""
    pending: list[tuple[Node, tuple[Node, ...]]] = [(anchor, ())]
    while pending:
        factor, trail = pending.pop()
        for reader in view.readers(factor):
            if view.call(reader, "alias", "reshape", "cast") is not None:
                pending.append((reader, (*trail, reader)))
            if plus_number(view, reader) is not None:
                return refuse(anchor, "eps is added outside the root", "add eps under it: rsqrt(mean + eps)")
            operands = view.operands(reader, "mul")
            if operands is None:
                continue
            x = operands[1] if operands[0] is factor else operands[0]
            same: list[Node] = []
            if x is factor or not view.same_value(x, statistic.h, same):
                continue
            if same_shape(view.shape(factor), (*view.shape(x)[:-1], 1)):
                return Product(reader, x, factor, (*trail, *same, reader))
            return refuse(
                anchor,
                f"the statistic has shape {tuple(view.shape(factor))} beside x {tuple(view.shape(x))}",
                "keep the reduced dimension: mean(-1, keepdim=True)",
            )
    return None


def _is_centred(view: CanonicalGraph, node: Node) -> bool:
    """Whether a value is x - mean(x): a LayerNorm's."""
    operands = view.operands(node, "sub")
    return operands is not None and view.call(view.strip(operands[1], widening=True), "mean") is not None
