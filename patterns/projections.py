"""Where a tensor comes from: the product with a weight behind views, casts, clamps and biases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sizes import same_shape

_MATMULS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")
_GROUPED = ("_grouped_mm", "grouped_mm", "_scaled_grouped_mm")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_QUANTISED = ("_scaled_mm", "_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm")
_NOUNS = {
    **dict.fromkeys(_MATMULS, "matmul"),
    **dict.fromkeys(_GROUPED, "grouped matmul"),
    **dict.fromkeys(_CONVOLUTIONS, "convolution"),
    **dict.fromkeys(_QUANTISED, "quantised matmul"),
}
_VIEWS = ("reshape", "permute", "getitem", "slice", "index", "select", "split", "dropout", "clamp", "alias", "cast")
_MAX_STEPS = 16


def _targets() -> dict[object, str]:
    """Functions that multiply by a weight, and what to call them."""
    found: dict[object, str] = {F.linear: "linear", torch.ops.aten.linear.default: "linear"}
    for name, noun in _NOUNS.items():
        for namespace in (torch, F):
            if hasattr(namespace, name):
                found[getattr(namespace, name)] = noun
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            found.update({getattr(packet, overload): noun for overload in packet.overloads()})
    return found


_TARGETS = _targets()


def projection(view: CanonicalGraph, node: Node) -> str:
    """What kind of product with a weight the node is: "linear", "matmul", ...; "" for anything else."""
    call = view.call(node, "linear", "matmul", "bmm")
    if call is not None:
        return "matmul" if call.name != "linear" else "linear with bias" if call["bias"] is not None else "linear"
    if node.op == "call_method":
        return "matmul" if node.target in _MATMULS else ""
    return _TARGETS.get(node.target, "") if node.op == "call_function" else ""


def origin(view: CanonicalGraph, node: Node) -> tuple[Node, str]:
    """(node behind views, parts, casts, clamps and biases; which part it is).

    The part is "" for the whole, else it sorts by position.
    """
    part = ""
    for _ in range(_MAX_STEPS):
        call = view.call(node, *_VIEWS)
        inner = _unbiased(view, node) if call is None else call["input"]
        if not isinstance(inner, Node):
            break
        if call is not None and call.name in ("getitem", "slice", "index", "select"):
            part = _position(call.args) or part
        node = inner
    return node, part


def _unbiased(view: CanonicalGraph, node: Node) -> Node | None:
    """The tensor to which something smaller, or a number, is added or with which it is multiplied."""
    operands = view.operands(node, "add") or view.operands(node, "mul")
    if operands is None:
        return None
    shape = view.shape(node)
    left, right = (isinstance(side, Node) and same_shape(view.shape(side), shape) for side in operands)
    return None if left == right else operands[0 if left else 1]


def _position(args: dict[str, Any]) -> str:
    """The first index that is not a whole dimension, so that parts of one tensor sort by it; "" if there is none."""
    index = args.get("index", args.get("start"))
    items = index if isinstance(index, tuple) else (index,)
    for item in items:
        if item is None or item is Ellipsis or item == slice(None):
            continue
        start = item.start if isinstance(item, slice) else item
        return f"{start or 0:>12}" if isinstance(start, (int, type(None))) else f"{start!s:>12}"
    return "" if index is not None else f"{0:>12}"


def described(view: CanonicalGraph, gate: Node, up: Node) -> str:
    """Where gate and up come from, in words: "separate linears", "packed linear, gate first"."""
    gate_source, gate_part = origin(view, gate)
    up_source, up_part = origin(view, up)
    first, second = (projection(view, source) or "tensor" for source in (gate_source, up_source))
    if gate_source is up_source and gate_part and up_part:
        return f"packed {first}, gate {'first' if gate_part < up_part else 'second'}"
    return f"separate {_plural(first)}" if first == second else " and ".join(sorted((first, second)))


def _plural(layer: str) -> str:
    noun, _, rest = layer.partition(" with ")
    return f"{noun}s with {rest}" if rest else f"{noun}s"
