"""Gated MLP activation: act(gate) * up, for every activation of infuse::swiglu.

Anchored on the activation's rare node. The operator is elementwise: which linears made gate and up (two, a packed one,
experts, LoRA beside them) does not matter and is only described, for the report.

silu, gelu, quick_gelu, mish and relu squared of one tensor times another of its shape are gates wherever they stand.
sigmoid, relu and tanh have other uses (recurrent cells, scores, masks): there the gate must come out of a product with
a weight, and for relu and tanh the other factor too. A factor that is broadcast (squeeze and excitation, a gate per
head or expert) makes no gated MLP.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from infuse.patterns.activations import ANCHORS as _ACTIVATION_ANCHORS
from infuse.patterns.activations import Activation, read_activation
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.gate_limits import with_limits
from infuse.patterns.projections import described, origin, projection
from infuse.patterns.sites import Finding, Make, Refusal, Site
from infuse.patterns.sizes import Size, same_shape

KIND = "swiglu"
# Gates that the operator has no activation for.
_OTHERS = ("elu", "hardswish", "leaky_relu", "softplus")
ANCHORS = (*_ACTIVATION_ANCHORS, "glu", *_OTHERS)
# Those with other uses, from the likeliest gate to the least.
_WEAK = ("sigmoid", "relu", "tanh")
# From the anchor of a written-out gelu to the product there are six nodes; casts and copies come on top.
_MAX_CLIMB = 12
_WRITTEN_OUT = ("cast", "add", "mul", "div")
_CLIMBED = {"relu": ("cast", "mul", "pow", "square"), "tanh": _WRITTEN_OUT, "erf": _WRITTEN_OUT, "exp": _WRITTEN_OUT}


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The gated activation around an anchor; None for a plain activation."""
    if anchor in view.in_place:
        return _in_place(view, anchor)
    if view.call(anchor, "glu") is not None:
        return _glu(view, anchor)
    if view.word(anchor) in _OTHERS:
        return _unknown(view, anchor)
    value, steps = anchor, _CLIMBED.get(view.word(anchor), ("cast", "mul"))
    for _ in range(_MAX_CLIMB):
        found = view.only_reader(value)
        if found is None:
            return _read_elsewhere(view, value, anchor)
        value, reader = found
        call = view.call(reader, *steps)
        if call is None:
            if view.call(reader, "reshape") is not None:
                return _viewed(view, value, reader, anchor)
            return _multiplied_in_place(view, value, reader, anchor)
        if call.name == "mul" and read_activation(view, reader) is None:
            sides = (call["input"], call["other"])
            if any(read_activation(view, side) is not None for side in sides):
                return _gated(view, reader, sides, anchor)
        value = reader
    return None


def _refuse(node: Node, reason: str, remedy: str) -> Refusal:
    return Refusal(KIND, node, reason, remedy)


def _gated(view: CanonicalGraph, product: Node, sides: tuple[object, object], anchor: Node) -> Finding | None:
    """The product of an activation and another tensor."""
    gates = [(found, up) for side, up in (sides, sides[::-1]) if (found := read_activation(view, side)) is not None]
    # Of two activations the one that is rarer as anything else is the gate; for two alike, the first.
    act, up = min(gates, key=lambda pair: _rank(pair[0]))
    if act.anchor is not anchor or not isinstance(up, Node) or not _is_gate(view, product, act, up):
        return None
    shape = view.shape(act.value)
    if not same_shape(view.shape(up), shape):
        if _broadcasts(shape, view.shape(up)):
            return _scaled_first(view, product, act)
        return _unproven(view, product, shape, view.shape(up))
    return _site(view, product, act, up, up_last=sides[1] is up)


def _site(
    view: CanonicalGraph, product: Node, act: Activation, up: Node, *, up_last: bool, viewed: Node | None = None
) -> Finding:
    """The site of act * up. viewed: the activation in up's shape, if it has another of its own."""
    dtypes = _to_one_dtype(view, product, act, up)
    if isinstance(dtypes, Refusal):
        return dtypes
    gate, other = dtypes
    words = f"{act.spelling}, {'act * up' if up_last else 'up * act'}"
    site = Site(
        KIND,
        (product,),
        product,
        (gate if viewed is None else Make(torch.ops.aten.reshape_as.default, (gate, up)), other, act.name),
        tuple(dict.fromkeys((*act.trail, *([] if viewed is None else [viewed]), product))),
        f"{described(view, act.gate, up)}, {words}",
        act.rounding or _rounding(view, product, act, up),
    )
    return with_limits(view, site, act.alpha)


def _viewed(view: CanonicalGraph, value: Node, viewed: Node, anchor: Node) -> Finding | None:
    """act(gate).view(...) * up, the gate of attention's heads."""
    act, found = read_activation(view, value), view.only_reader(viewed)
    operands = view.operands(found[1], "mul") if found is not None else None
    if act is None or act.anchor is not anchor or act.alpha is not None or found is None or operands is None:
        return None
    product = found[1]
    up = operands[1] if operands[0] is found[0] else operands[0]
    if not isinstance(up, Node) or up is found[0] or not same_shape(view.shape(up), view.shape(viewed)):
        return None
    other = view.call(up, "reshape")
    behind = up if other is None else other["input"]
    if read_activation(view, behind) is not None or not _is_gate(view, product, act, behind):
        return None
    return _site(view, product, act, up, up_last=operands[1] is up, viewed=viewed)


def _scaled_first(view: CanonicalGraph, scaled: Node, act: Activation) -> Refusal | None:
    """A refusal for (act * mask) * up, the mask being smaller than either."""
    found = view.only_reader(scaled)
    operands = view.operands(found[1], "mul") if found is not None else None
    if found is None or operands is None:
        return None
    up = operands[1] if operands[0] is found[0] else operands[0]
    like = isinstance(up, Node) and same_shape(view.shape(up), view.shape(act.value))
    if not like or not same_shape(view.shape(scaled), view.shape(act.value)) or not _is_gate(view, found[1], act, up):
        return None
    return _refuse(
        found[1],
        "a smaller tensor multiplies the activation before the other factor does",
        "write act(gate) * up, and multiply by a mask after that",
    )


def _rank(act: Activation) -> int:
    return _WEAK.index(act.name) + 1 if act.name in _WEAK else 0


def _is_gate(view: CanonicalGraph, product: Node, act: Activation, up: Node) -> bool:
    """Whether a product like this belongs to a gated MLP rather than to something else that multiplies so."""
    if view.same_value(up, act.gate, []) or view.same_value(up, act.value, []) or not view.shape(up):
        return False
    from_weight = bool(projection(view, origin(view, act.gate)[0]))
    if act.name not in _WEAK:
        return len(view.shape(up)) > 1 or from_weight
    if not from_weight:
        return False
    if act.name in ("relu", "tanh"):
        return bool(projection(view, origin(view, up)[0]))
    other = view.strip(up, widening=True)
    if view.call(other, "sigmoid") is not None:  # scores of two kinds
        return False
    squashed = view.call(other, "tanh")
    if squashed is not None and not projection(view, origin(view, squashed["input"])[0]):
        return False
    return not _updates_a_state(view, product, squashed is not None)


def _updates_a_state(view: CanonicalGraph, product: Node, has_tanh: bool) -> bool:
    """Whether the product is a term of f * c + i * tanh(g), a recurrent cell. has_tanh: it is the second one."""
    words = ("sigmoid",) if has_tanh else ("tanh",)
    for reader in view.readers(product):
        terms = view.operands(reader, "add")
        other = None if terms is None else terms[1] if terms[0] is product else terms[0]
        factors = view.operands(view.strip(other), "mul") if other is not None else None
        if any(view.call(view.strip(factor, widening=True), *words) is not None for factor in factors or ()):
            return True
    return False


def _unknown(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    """A refusal for a gated MLP with an activation that the operator has not."""
    found, call = view.only_reader(anchor), view.call(anchor)
    sides = view.operands(found[1], "mul") if found else None
    if found is None or call is None or sides is None:
        return None
    up = sides[1] if sides[0] is found[0] else sides[0]
    if not isinstance(up, Node) or not same_shape(view.shape(up), view.shape(anchor)) or up is call["input"]:
        return None
    if not all(projection(view, origin(view, node)[0]) for node in (call["input"], up)):
        return None
    name = view.word(anchor)
    return _refuse(
        found[1], f"infuse::swiglu has no {name}", "use an activation that it has: silu, gelu, relu, sigmoid"
    )


def _broadcasts(left: tuple[Size, ...], right: tuple[Size, ...]) -> bool:
    """Whether two shapes, which multiply, are known to differ."""
    if len(left) != len(right):
        return True
    return any((type(a) is int and type(b) is int and a != b) or _is_one(a) != _is_one(b) for a, b in zip(left, right))


def _is_one(size: Size) -> bool:
    return type(size) is int and size == 1


def _unproven(view: CanonicalGraph, product: Node, gate: tuple[Size, ...], up: tuple[Size, ...]) -> Refusal:
    return _refuse(
        product,
        f"the multiply may broadcast: gate {tuple(gate)}, other {tuple(up)}",
        "give gate and other factor sizes that torch can prove equal",
    )


def _to_one_dtype(view: CanonicalGraph, product: Node, act: Activation, up: Node) -> tuple[object, object] | Refusal:
    """gate and up in the product's dtype: the operator computes and rounds in it. Narrower ones are widened first."""
    dtype = view.dtype(product)
    dtypes = [view.dtype(node) for node in (act.gate, act.value, up, product)]
    widening = all(d and dtype and d.is_floating_point and torch.promote_types(d, dtype) == dtype for d in dtypes)
    if widening and not act.narrowed:
        gate, other = (
            node if view.dtype(node) == dtype else Make(torch.ops.aten.to.dtype, (node, dtype))
            for node in (act.gate, up)
        )
        return gate, other
    return _refuse(
        product,
        f"gate, activation, other factor and product differ in dtype: {', '.join(sorted(set(map(str, dtypes))))}",
        "bring gate and other factor to one dtype before the activation",
    )


def _rounding(view: CanonicalGraph, product: Node, act: Activation, up: Node) -> str:
    """What the operator does not round where the activation is called by name."""
    if act.name == "sigmoid" and view.dtype(product) in (torch.float16, torch.bfloat16):
        return "sigmoid is rounded before it is multiplied"
    if view.dtype(act.gate) != view.dtype(product):
        return "the activation is rounded before it is multiplied"
    return ""


def _glu(view: CanonicalGraph, anchor: Node) -> Site | None:
    """F.glu: the first half times the sigmoid of the second."""
    call = view.call(anchor, "glu")
    rank = len(view.shape(call["input"])) if call else 0
    dim = -1 if call is None or call["dim"] is None else call["dim"]
    if call is None or not rank or type(dim) is not int or view.dtype(anchor) != view.dtype(call["input"]):
        return None
    halves = Make(torch.chunk, (call["input"], 2, dim))
    up, gate = (Make(operator.getitem, (halves, half)) for half in (0, 1))
    layer = projection(view, origin(view, call["input"])[0]) or "tensor"
    return Site(KIND, (anchor,), anchor, (gate, up, "sigmoid"), (anchor,), f"packed {layer}, gate second, glu")


def _read_elsewhere(view: CanonicalGraph, value: Node, anchor: Node) -> Refusal | None:
    """A refusal if one of several readers multiplies the activation by a tensor like it."""
    act = read_activation(view, value)
    if act is None or act.name in _WEAK or act.anchor is not anchor:
        return None
    for reader in view.readers(value):
        operands = view.operands(reader, "mul")
        if operands is None or operands[0] is operands[1]:
            continue
        other = operands[1] if operands[0] is value else operands[0]
        like = isinstance(other, Node) and same_shape(view.shape(other), view.shape(value))
        if like and _is_gate(view, reader, act, other):
            return _refuse(
                anchor,
                "the gate's activation is read elsewhere",
                "read act(gate) * up alone; with the activation needed as well, fusing would compute it twice",
            )
    return None


def _in_place(view: CanonicalGraph, anchor: Node) -> Refusal | None:
    name = view.in_place[anchor]
    if name != "silu" or not any(view.operands(reader, "mul") for reader in view.readers(anchor)):
        return None
    return _refuse(anchor, f"{name} writes its input in place", f"use {name}(x) without inplace=True")


def _multiplied_in_place(view: CanonicalGraph, value: Node, reader: Node, anchor: Node) -> Refusal | None:
    """A refusal for act(gate).mul_(up), a gate but for its last step."""
    if (
        reader.target not in ("mul_", "multiply_", operator.imul)
        or len(reader.args) != 2
        or reader.args[0] is not value
    ):
        return None
    act, up = read_activation(view, value), reader.args[1]
    if act is None or act.anchor is not anchor or not isinstance(up, Node):
        return None
    if not same_shape(view.shape(up), view.shape(value)) or not _is_gate(view, reader, act, up):
        return None
    return _refuse(reader, "the product is written in place, into the activation", "write act(gate) * up")
