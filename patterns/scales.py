"""Numbers in a graph: factors that a value is multiplied by, and constants that were made into tensors."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Make

# Makers of constant tensors, by where their value stands among the arguments.
_MAKERS = {"tensor": 0, "as_tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1, "new_tensor": 1, "new_full": 2}
_MAKER_NAMES = ("data", "fill_value", "s")
_MAX_DEPTH = 8


def factor(view: CanonicalGraph, value: object) -> object | None:
    """A factor as a float, or a node of one; None for what is no number."""
    number = view.number(value)
    if isinstance(number, Node):
        if isinstance(view.value(number), (int, torch.SymInt)):
            return Make(torch.sym_float, (number,))
        return number
    return constant(view, value) if number is None else number


def scaled(view: CanonicalGraph, node: object) -> tuple[Node, object] | None:
    """(value, factor) for a node that multiplies or divides by a number, in the value's dtype."""
    product, quotient = view.operands(node, "mul"), view.operands(node, "div")
    for value, other in (product, product[::-1]) if product else ():
        number = factor(view, other)
        if number is not None and _is_rest(view, node, value):
            return value, number
    if quotient and _is_rest(view, node, quotient[0]):
        number = factor(view, quotient[1])
        if isinstance(number, float):
            return (quotient[0], 1.0 / number) if number != 0.0 else None
        if number is not None:
            return quotient[0], Make(operator.truediv, (1.0, number))
    return None


def _is_rest(view: CanonicalGraph, node: object, value: object) -> bool:
    tensor = view.tensor(value)
    return tensor is not None and tensor.is_floating_point() and len(view.shape(node)) == tensor.dim()


def times(left: object, right: object) -> object:
    """The product of two factors."""
    if isinstance(left, float) and isinstance(right, float):
        return left * right
    if left == 1.0:
        return right
    return left if right == 1.0 else Make(operator.mul, (left, right))


def constant(view: CanonicalGraph, value: object) -> float | None:
    """The number that all elements of a tensor are, if the graph says so; a number itself."""
    return _constant(view, value, 0)


def _constant(view: CanonicalGraph, value: object, depth: int) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node) or depth > _MAX_DEPTH or view.tensor(value) is None:
        return None
    number = _made_of(view, value, depth)
    dtype = view.dtype(value)
    return number if number is None or dtype is None else rounded(number, dtype)


def rounded(number: float, dtype: torch.dtype) -> float:
    """A number as a tensor of a float dtype holds it."""
    if not dtype.is_floating_point or not math.isfinite(number) or number == 0.0:
        return number
    info = torch.finfo(dtype)
    bits = 1 - round(math.log2(info.eps))
    mantissa, exponent = math.frexp(number)
    near = math.ldexp(float(round(mantissa * 2.0**bits)), exponent - bits)
    return near if abs(near) <= info.max else math.copysign(math.inf, near)


def _made_of(view: CanonicalGraph, node: Node, depth: int) -> float | None:
    call = view.call(node, "alias", "cast", "expand", "reshape", "sqrt")
    if call is not None:
        inner = _constant(view, call["input"], depth + 1)
        return math.sqrt(inner) if inner is not None and inner >= 0 and call.name == "sqrt" else inner
    if node.op == "get_attr":
        return _stored(node)
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    if node.op not in ("call_function", "call_method") or name not in _MAKERS:
        return None
    position = _MAKERS[name]
    given = [node.kwargs[key] for key in _MAKER_NAMES if key in node.kwargs]
    value = given[0] if given else node.args[position] if len(node.args) > position else None
    return _constant(view, value, depth + 1)


def _stored(node: Node) -> float | None:
    """The value of a constant of one element that belongs to the graph."""
    module = node.graph.owning_module
    found = getattr(module, str(node.target), None) if module is not None else None
    if type(found) is not torch.Tensor or found.numel() != 1 or found.device.type != "cpu" or found.requires_grad:
        return None
    return float(found.detach())
