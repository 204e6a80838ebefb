"""Reads a value as an activation function of one tensor, called by name or written out.

By name: silu, gelu, mish, sigmoid, relu, tanh. Written out: x * sigmoid(c x), x / (1 + exp(-x)), gelu around tanh or
erf, relu squared; the factors may stand in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.polynomials import Polynomial, PolynomialReader, product, same_polynomial

ANCHORS = ("silu", "gelu", "mish", "sigmoid", "relu", "tanh", "erf", "exp")
_TANH_SCALE = math.sqrt(2 / math.pi)
_GELU_TANH: Polynomial = {1: _TANH_SCALE, 3: _TANH_SCALE * 0.044715}
_GELU_ERF: Polynomial = {1: math.sqrt(0.5)}
_MAX_FACTORS = 4


@dataclass(frozen=True, slots=True)
class Activation:
    """activation(gate), as infuse::swiglu names it.

    value: the node that holds it. anchor: the node of the rare word in it. alpha: the factor of quick_gelu. trail: the
    nodes whose work it is, value included. narrowed: it was brought to a narrower dtype than it was computed in.
    """

    name: str
    gate: Node
    value: Node
    anchor: Node
    trail: tuple[Node, ...]
    spelling: str
    rounding: str = ""
    alpha: float | Node | None = None
    narrowed: bool = False


def read_activation(view: CanonicalGraph, value: object) -> Activation | None:
    """The activation that a value is."""
    if not isinstance(value, Node):
        return None
    skipped: list[Node] = []
    node = view.strip(value, trail=skipped)
    call = view.call(node)
    if call is None:
        return None
    if call.name == "cast":
        found = _cast(view, node, read_activation(view, call["input"]))
    elif call.name in ("silu", "mish", "sigmoid", "relu", "tanh"):
        found = _named(call.name, call["input"], node)
    elif call.name == "gelu":
        found = _named("gelu_tanh" if call["approximate"] == "tanh" else "gelu_erf", call["input"], node)
    elif call.name in ("pow", "square", "mul"):
        found = _relu_squared(view, node) or _written_out(view, node)
    elif call.name == "div":
        found = _silu_of_exp(view, node)
    else:
        found = None
    return None if found is None else replace(found, value=value, trail=(*found.trail, *reversed(skipped)))


def _named(name: str, gate: Node, node: Node) -> Activation:
    return Activation(name, gate, node, node, (node,), name.replace("_", " "))


def _cast(view: CanonicalGraph, node: Node, inner: Activation | None) -> Activation | None:
    """A cast of an activation. act(g.float()).to(g.dtype) is act(g): torch computes that in float32 and rounds once."""
    if inner is None:
        return None
    rounding = inner.rounding
    if view.widens(node):
        if not inner.narrowed and view.dtype(inner.gate) == view.dtype(inner.value):
            rounding = rounding or "the activation is rounded before it is multiplied"
        return replace(inner, trail=(*inner.trail, node), rounding=rounding)
    casts: list[Node] = []
    narrow = view.narrowed(inner.gate, casts)
    if view.dtype(inner.gate) == torch.float32 and view.dtype(narrow) == view.dtype(node):
        return replace(inner, gate=narrow, trail=(*casts, *inner.trail, node))
    return replace(inner, trail=(*inner.trail, node), narrowed=True)


def _relu_squared(view: CanonicalGraph, node: Node) -> Activation | None:
    call = view.call(node, "pow", "square", "mul")
    if call is None or (call.name == "pow" and call["exponent"] != 2):
        return None
    if call.name == "mul" and not view.same_value(call["input"], call["other"], []):
        return None
    trail: list[Node] = []
    relu = view.strip(call["input"], trail=trail)
    inner = view.call(relu, "relu")
    if inner is None or view.dtype(relu) != view.dtype(node):
        return None
    return Activation("relu_squared", inner["input"], node, relu, (relu, *trail, node), "relu squared")


def _silu_of_exp(view: CanonicalGraph, node: Node) -> Activation | None:
    """x / (1 + exp(-x))"""
    operands = view.operands(node, "div")
    terms = view.operands(view.strip(operands[1]), "add") if operands is not None else None
    if operands is None or terms is None:
        return None
    base, total = operands
    for curve, one in (terms, terms[::-1]):
        call = view.call(curve, "exp")
        if call is None or view.number(one) != 1.0 or not isinstance(base, Node) or not isinstance(curve, Node):
            continue
        reader = PolynomialReader(view, base)
        if same_polynomial(reader.read(call["input"]), {1: -1.0}) and not reader.symbols:
            trail = (*reader.nodes, curve, view.strip(total), node)
            return Activation(
                "silu", base, node, curve, trail, "x / (1 + exp(-x))", "exp is rounded before it is added"
            )
    return None


def _written_out(view: CanonicalGraph, node: Node) -> Activation | None:
    """x * sigmoid(c x), x/2 * (1 + tanh(...)), x/2 * (1 + erf(...))."""
    found = _curve(view, node, _MAX_FACTORS)
    if found is None:
        return None
    curve, trail, factors = found
    argument = view.call(curve, "sigmoid", "tanh", "erf")
    assert argument is not None
    for base in dict.fromkeys(base for factor in factors for base in _bases(view, factor, _MAX_FACTORS)):
        reader = PolynomialReader(view, base)
        outer: Polynomial | None = {0: 1.0}
        for factor in factors:
            outer = product(outer, reader.read(factor))
        name, alpha = _name(reader, argument.name, outer, argument["input"])
        if name:
            spelling = {"silu": "x * sigmoid(x)", "quick_gelu": "x * sigmoid(alpha * x)"}.get(name, "gelu written out")
            rounding = f"{argument.name} is rounded before it is multiplied"
            return Activation(name, base, node, curve, (*reader.nodes, curve, *trail), spelling, rounding, alpha)
    return None


def _name(
    reader: PolynomialReader, curve: str, outer: Polynomial | None, argument: Node
) -> tuple[str, float | Node | None]:
    """Which activation outer(x) * curve(argument(x)) is, and quick_gelu's alpha; "" if none."""
    if outer is None or (curve == "sigmoid" and reader.symbols):
        return "", None
    inner = reader.read(argument)
    if curve != "sigmoid":
        name, expected = ("gelu_tanh", _GELU_TANH) if curve == "tanh" else ("gelu_erf", _GELU_ERF)
        found = same_polynomial(outer, {1: 0.5}) and same_polynomial(inner, expected) and reader.fix_symbols()
        return (name if found else ""), None
    slope = 0.0 if inner is None else inner.get(1, 0.0)
    if not slope or not same_polynomial(outer, {1: 1.0}) or not same_polynomial(inner, {1: slope}):
        return "", None
    if reader.symbols:
        symbol = _symbolic_factor(reader.view, argument, reader.base)
        return ("", None) if symbol is None else ("quick_gelu", symbol)
    return ("silu", None) if slope == 1.0 else ("quick_gelu", slope)


def _symbolic_factor(view: CanonicalGraph, argument: Node, base: Node) -> Node | None:
    """The node of the only symbolic number that base is multiplied with."""
    operands = view.operands(view.strip(argument), "mul")
    if operands is None:
        return None
    for x, factor in (operands, operands[::-1]):
        number = view.number(factor)
        if isinstance(number, Node) and view.same_value(x, base, []):
            return number
    return None


def _curve(view: CanonicalGraph, node: object, depth: int) -> tuple[Node, list[Node], list[object]] | None:
    """In a product: sigmoid(..), or tanh or erf out of (1 + ..); what lies around it; the product's other factors."""
    if not isinstance(node, Node) or depth == 0:
        return None
    if view.call(node, "sigmoid") is not None:
        return node, [], []
    ones = view.operands(node, "add")
    if ones is not None:
        for one, curve in (ones, ones[::-1]):
            if one == 1 and view.call(curve, "tanh", "erf") is not None:
                return curve, [node], []
        return None
    call = view.call(node, "alias", "mul", "div")
    if call is None:
        return None
    found = _curve(view, call["input"], depth - (call.name != "alias"))
    if call.name != "mul":
        number = None if call.name == "alias" else view.operands(node, "div")
        if found is None or (call.name == "div" and not (number and isinstance(number[1], (int, float)) and number[1])):
            return None
        extra: list[object] = [1.0 / number[1]] if number else []
        return found[0], [*found[1], node], [*found[2], *extra]
    other = call["other"]
    if found is None:
        found, other = _curve(view, other, depth - 1), call["input"]
    return None if found is None else (found[0], [*found[1], node], [*found[2], other])


def _bases(view: CanonicalGraph, factor: object, depth: int) -> Iterator[Node]:
    """Tensors that a factor may be a multiple of, innermost last."""
    if not isinstance(factor, Node) or view.tensor(factor) is None:
        return
    yield factor
    call = view.call(factor, "mul", "div", "alias", "cast")
    if call is not None and depth > 0:
        for operand in (call["input"], call["other"]):
            yield from _bases(view, operand, depth - 1)
