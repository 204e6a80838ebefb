"""Gated MLP activation: silu(gate) * up.

Anchored on silu, or on sigmoid for x * sigmoid(x). The operator is elementwise: where gate and up come from (two
linears, a packed one) is only described, for the report and for the rules that compose operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Finding, Refusal, Site
from infuse.patterns.sizes import same_shape

KIND = "swiglu"
ANCHORS = ("silu", "sigmoid")


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The gated activation around an anchor; None for a plain activation."""
    if anchor in view.in_place:
        return _in_place(view, anchor)
    call = view.call(anchor, "silu")
    if call is not None:
        return _gated(view, anchor, call["input"], [anchor], "silu", "")
    return _from_sigmoid(view, anchor)


def _refuse(node: Node, reason: str, remedy: str) -> Refusal:
    return Refusal(KIND, node, reason, remedy)


def _in_place(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    if view.in_place[anchor] != "silu" or not any(view.operands(reader, "mul") for reader in view.readers(anchor)):
        return None
    return _refuse(anchor, "silu writes its input in place", "use silu(x) without inplace=True")


def _from_sigmoid(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """x * sigmoid(x), then as silu."""
    call, found = view.call(anchor, "sigmoid"), view.only_reader(anchor)
    operands = view.operands(found[1], "mul") if found else None
    if call is None or found is None or operands is None:
        return None
    other = operands[1] if operands[0] is found[0] else operands[0]
    trail: list[Node] = []
    if not view.same_value(other, call["input"], trail) or view.dtype(other) != view.dtype(anchor):
        return None
    rounding = "sigmoid is rounded before it is multiplied"
    return _gated(view, found[1], call["input"], [anchor, *trail, found[1]], "x * sigmoid(x)", rounding)


def _gated(
    view: CanonicalGraph, activation: Node, gate: Node, trail: list[Node], spelling: str, rounding: str
) -> Finding | None:
    """silu's value multiplied by one other tensor."""
    value, trail = _past_cast(view, activation, trail)
    found = view.only_reader(value, trail)
    if found is None:
        return _read_elsewhere(view, activation, value)
    value, product = found
    operands = view.operands(product, "mul")
    if operands is None or (operands[0] is value) == (operands[1] is value):
        return None
    up = operands[1] if operands[0] is value else operands[0]
    if not isinstance(up, Node) or len(view.shape(up)) < 2:
        return None  # A number or a vector: a plain activation, scaled.
    gate, trail = _narrow_gate(view, gate, value, trail)
    refusal = _unlike(view, product, gate, value, up)
    if refusal is not None:
        return refusal
    order = "act * up" if operands[0] is value else "up * act"
    words = f"{_origin(view, gate, up)}, {spelling}, {order}"
    interior = tuple(dict.fromkeys([*trail, product]))
    return Site(KIND, (product,), product, (gate, up), interior, words, rounding)


def _unlike(view: CanonicalGraph, product: Node, gate: Node, value: Node, up: Node) -> Refusal | None:
    """A refusal unless the multiply is of one shape and one dtype throughout."""
    shape = view.shape(value)
    if not same_shape(view.shape(up), shape) or not same_shape(view.shape(product), shape):
        return _refuse(
            product,
            f"the multiply broadcasts: gate {tuple(shape)}, other {tuple(view.shape(up))}",
            "a gated MLP multiplies tensors of one shape; expand the smaller one if this is one",
        )
    dtypes = {view.dtype(node) for node in (gate, value, up, product)}
    if len(dtypes) == 1:
        return None
    return _refuse(
        product,
        f"gate, activation, other factor and product differ in dtype: {', '.join(sorted(map(str, dtypes)))}",
        "bring gate and other factor to one dtype before the activation",
    )


def _past_cast(view: CanonicalGraph, activation: Node, trail: list[Node]) -> tuple[Node, list[Node]]:
    """The activation's value, past a cast of it that its only reader is."""
    skipped: list[Node] = []
    found = view.only_reader(activation, skipped)
    if found is None or view.call(found[1], "cast") is None:
        return activation, trail
    return found[1], [*trail, *skipped, found[1]]


def _narrow_gate(view: CanonicalGraph, gate: Node, value: Node, trail: list[Node]) -> tuple[Node, list[Node]]:
    """silu(g.float()).to(g.dtype) is silu(g): torch computes silu of a half in float32 and rounds once."""
    casts: list[Node] = []
    narrow = view.narrowed(gate, casts)
    if view.dtype(gate) == torch.float32 != view.dtype(value) == view.dtype(narrow):
        return narrow, [*casts, *trail]
    return gate, trail


def _read_elsewhere(view: CanonicalGraph, activation: Node, value: Node) -> Refusal | None:
    """A refusal if one of several readers multiplies the activation by a tensor like it."""
    for reader in view.readers(value):
        operands = view.operands(reader, "mul")
        if operands is None or operands[0] is operands[1]:
            continue
        other = operands[1] if operands[0] is value else operands[0]
        if isinstance(other, Node) and len(view.shape(other)) >= 2 and same_shape(view.shape(other), view.shape(value)):
            return _refuse(
                activation,
                "the gate's activation is read elsewhere",
                "read silu(gate) * up alone; with the activation needed as well, fusing would compute it twice",
            )
    return None


def _origin(view: CanonicalGraph, gate: Node, up: Node) -> str:
    """Where gate and up come from, in words."""
    gate_source, gate_part = _producer(view, gate)
    up_source, up_part = _producer(view, up)
    if gate_source is up_source and gate_part and up_part:
        layer = _layer(view, gate_source)
        return f"packed {layer}, gate {'first' if gate_part < up_part else 'second'}"
    layers = {_layer(view, gate_source), _layer(view, up_source)}
    return f"separate {_plural(layers.pop())}" if len(layers) == 1 else " and ".join(sorted(layers))


def _producer(view: CanonicalGraph, node: Node) -> tuple[Node, str]:
    """(node behind views and parts, which part it is). The part is "" for the whole, else it sorts by position."""
    part = ""
    while True:
        plain = view.strip(node, widening=True)
        call = view.call(plain, "reshape", "permute", "getitem", "slice", "split", "dropout")
        if call is None or not isinstance(call["input"], Node):
            return plain, part
        if call.name in ("getitem", "slice"):
            part = _position(call.args)
        node = call["input"]


def _position(args: dict[str, Any]) -> str:
    index = args.get("index", args.get("start"))
    last = index[-1] if isinstance(index, tuple) and index else index
    start = last.start if isinstance(last, slice) else last
    return f"{start or 0:>12}" if isinstance(start, (int, type(None))) else f"{start!s:>12}"


def _layer(view: CanonicalGraph, node: Node) -> str:
    call = view.call(node, "linear", "matmul", "bmm")
    if call is None:
        return "tensor"
    if call.name == "linear":
        return "linear with bias" if call["bias"] is not None else "linear"
    return "matmul"


def _plural(layer: str) -> str:
    noun, _, rest = layer.partition(" ")
    return f"{noun}s {rest}".rstrip()
