"""Attention written out: softmax(scale * q k^T + mask) v around a softmax.

Read outwards from the softmax to the product with v, then inwards through masks, scales and casts to the product of q
and k. What is met on the way inwards is handled by a step each (`_STEPS`); what has no step becomes a refusal that
names it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from infuse.patterns.attention import Parts, assemble, refuse, refuse_dropout
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.heads import Source, transposed
from infuse.patterns.sites import Finding, Make, Refusal
from infuse.patterns.sizes import broadcasts_to, same_shape

_PRODUCTS = ("matmul", "bmm")
# How far a product of q and k may lie behind the softmax to make it attention-like.
_MAX_STEPS = 12
_MASKED_FILL = (
    "the scores are overwritten by a mask: a row that is masked wholly comes out otherwise than with the operator",
    "add a float mask to the scores, or call F.scaled_dot_product_attention with a bool mask",
)
_UNHANDLED = {
    "masked_fill": _MASKED_FILL,
    "where": _MASKED_FILL,
    "tanh": ("the scores are capped by tanh", "no operator has a softcap yet"),
    "cat": ("the scores have an extra column (attention sink)", "no operator has sinks yet"),
}


@dataclass(frozen=True, slots=True)
class _Scores:
    """What has been read inwards from the softmax: node is where the reading stands.

    mask: what is added to the scaled scores, or None. scale: a number, or a `Make` or node of one.
    """

    node: Node
    mask: object = None
    scale: object = 1.0
    trail: tuple[Node, ...] = ()
    words: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class _Output:
    """The product with v, read outwards from the softmax."""

    root: Node
    v: Node
    trail: tuple[Node, ...]


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The attention around a softmax; None for any other use of softmax."""
    call = view.call(anchor, "softmax")
    if call is None or not _leads_to_product(view, anchor):
        return None
    scores = _inwards(view, _Scores(call["input"], trail=(anchor,)))
    if not isinstance(scores, _Scores):
        return scores and replace(scores, node=anchor)
    if call["dim"] != (len(view.shape(anchor)) - 1,):
        return refuse(anchor, f"the softmax is over dimension {call['dim']}", "let the keys be the last dimension")
    output = _outwards(view, anchor)
    if not isinstance(output, _Output):
        return output
    return _attention(view, anchor, scores, output)


def _attention(view: CanonicalGraph, anchor: Node, scores: _Scores, output: _Output) -> Finding | None:
    product = view.call(scores.node, *_PRODUCTS)
    assert product is not None
    shapes = [view.shape(node) for node in (product["input"], product["other"], output.v)]
    if all(len(shape) == 2 for shape in shapes):
        return None  # A memory that is read, softmax(x M^T) M.
    if any(len(shape) != 4 for shape in shapes):
        return refuse(
            anchor,
            f"q, k, v have {[len(shape) for shape in shapes]} dimensions, expected 4 each",
            "keep heads in a dimension of their own: [B, H, S, D]",
        )
    q, scores = _query(view, product["input"], scores)
    trail = (*scores.trail, scores.node, *output.trail)
    parts = Parts(
        output.root,
        q,
        transposed(view, product["other"]),
        Source(output.v),
        scores.mask,
        scores.scale,
        trail,
        ("softmax(q k^T) v", *reversed(scores.words)),
        rounding=_rounding(view, trail),
    )
    if view.dtype(scores.node) != view.dtype(product["input"]):
        return refuse(
            anchor, "autocast changes the dtype of the scores", "cast q and k before the product, outside autocast"
        )
    return assemble(view, parts)


def _rounding(view: CanonicalGraph, trail: tuple[Node, ...]) -> str:
    """Where the source rounds between the products; the operator keeps scores and probabilities in float32."""
    for node in trail:
        half = view.dtype(node) in (torch.float16, torch.bfloat16)
        if half or (view.call(node, "cast") is not None and not view.widens(node)):
            return f"scores and probabilities are rounded to {view.dtype(node)}"
    return ""


def _query(view: CanonicalGraph, node: Node, scores: _Scores) -> tuple[Node, _Scores]:
    """q without a scale on it."""
    trail: list[Node] = []
    plain = view.strip(node, trail=trail)
    found = _scaled(view, plain)
    if found is None or len(view.shape(found[0])) != 4:
        return node, scores
    words = (*scores.words, "scale on q")
    trail = [*scores.trail, *trail, plain]
    return found[0], replace(scores, scale=_times(scores.scale, found[1]), trail=tuple(trail), words=words)


def _leads_to_product(view: CanonicalGraph, probabilities: Node) -> bool:
    """Whether a reader of the probabilities, past casts and dropout, multiplies them from the left."""
    pending = [probabilities]
    while pending:
        node = pending.pop()
        for reader in view.readers(node):
            call = view.call(reader, "alias", "cast", "dropout", *_PRODUCTS)
            if call is None or call["input"] is not node:
                continue
            if call.name in _PRODUCTS:
                return True
            pending.append(reader)
    return False


def _outwards(view: CanonicalGraph, anchor: Node) -> _Output | Refusal:
    trail: list[Node] = []
    node = anchor
    while True:
        found = view.only_reader(node, trail)
        call = view.call(found[1], "cast", "dropout", *_PRODUCTS) if found else None
        if found is None or call is None:
            return refuse(
                anchor,
                "the attention probabilities are read elsewhere",
                "do not return or reuse the probabilities (output_attentions=False, need_weights=False)",
            )
        node, reader = found
        if call.name == "dropout":
            return refuse_dropout(anchor)
        trail.append(reader)
        if call.name in _PRODUCTS:
            return _Output(reader, call["other"], tuple(trail))
        node = reader


def _inwards(view: CanonicalGraph, scores: _Scores) -> _Scores | Refusal | None:
    """The scores read back to the product of q and k; None if there is no such product behind them."""
    for _ in range(_MAX_STEPS):
        if len(view.readers(scores.node)) > 1 and _reaches_product(view, scores.node):
            return refuse(scores.node, "the attention scores are read elsewhere", "do not return or reuse the scores")
        if view.call(scores.node, *_PRODUCTS) is not None:
            return scores
        following = next((found for step in _STEPS if (found := step(view, scores)) is not None), None)
        if following is None:
            break
        scores = following
    if not _reaches_product(view, scores.node):
        return None
    name = _name(view, scores.node)
    reason, remedy = _UNHANDLED.get(
        name, (f"{name} lies between the product of q and k and the softmax", "write it as a float mask that is added")
    )
    return refuse(scores.node, reason, remedy)


def _look_through(view: CanonicalGraph, scores: _Scores) -> _Scores | None:
    call = view.call(scores.node, "alias", "cast")
    if call is None or not isinstance(call["input"], Node):
        return None
    return replace(scores, node=call["input"], trail=(*scores.trail, scores.node))


def _scale_step(view: CanonicalGraph, scores: _Scores) -> _Scores | None:
    found = _scaled(view, scores.node)
    if found is None:
        return None
    word = "scale" if scores.mask is None else "scale before the mask"
    return replace(
        scores,
        node=found[0],
        scale=_times(scores.scale, found[1]),
        trail=(*scores.trail, scores.node),
        words=(*scores.words, word),
    )


def _mask_step(view: CanonicalGraph, scores: _Scores) -> _Scores | None:
    """An added mask; what was scaled after it scales the mask too."""
    operands = view.operands(scores.node, "add")
    if operands is None:
        return None
    inner, mask = operands if _reaches_product(view, operands[0]) else operands[::-1]
    whole, tensor = view.shape(scores.node), view.tensor(mask)
    if not isinstance(inner, Node) or tensor is None or not tensor.is_floating_point():
        return None
    if not same_shape(view.shape(inner), whole) or not broadcasts_to(tensor.shape, whole):
        return None
    term: object = mask if tensor.dim() >= 2 else Make(torch.reshape, (mask, (1, -1)))
    term = term if scores.scale == 1.0 else Make(torch.mul, (term, scores.scale))
    words = (*scores.words, "mask" if scores.scale == 1.0 else "mask before the scale")
    total = term if scores.mask is None else Make(torch.add, (scores.mask, term))
    return replace(scores, node=inner, mask=total, trail=(*scores.trail, scores.node), words=words)


_STEPS: tuple[Callable[[CanonicalGraph, _Scores], _Scores | None], ...] = (_look_through, _scale_step, _mask_step)


def _scaled(view: CanonicalGraph, node: object) -> tuple[Node, object] | None:
    """(value, factor) for a node that multiplies or divides by a number."""
    product, quotient = view.operands(node, "mul"), view.operands(node, "div")
    for value, factor in (product, product[::-1]) if product else ():
        number = _number(view, factor)
        if number is not None and view.tensor(value) is not None:
            return value, number
    if quotient and view.tensor(quotient[0]) is not None:
        number = _number(view, quotient[1])
        if isinstance(number, float):
            return (quotient[0], 1.0 / number) if number != 0.0 else None
        if number is not None:
            return quotient[0], Make(operator.truediv, (1.0, number))
    return None


def _number(view: CanonicalGraph, value: object) -> object | None:
    """A factor as a float, or a node of one."""
    number = view.number(value)
    if isinstance(number, Node) and isinstance(view.value(number), (int, torch.SymInt)):
        return Make(torch.sym_float, (number,))
    return number


def _times(left: object, right: object) -> object:
    if isinstance(left, float) and isinstance(right, float):
        return left * right
    if left == 1.0:
        return right
    return left if right == 1.0 else Make(operator.mul, (left, right))


def _reaches_product(view: CanonicalGraph, node: object) -> bool:
    """Whether a product of two tensors lies behind a value, along values as large in the last dimensions."""
    pending: list[tuple[object, int]] = [(node, 0)]
    seen: set[object] = set()
    while pending:
        current, depth = pending.pop()
        if not isinstance(current, Node) or current in seen or depth > _MAX_STEPS:
            continue
        seen.add(current)
        if _name(view, current) in (*_PRODUCTS, "baddbmm", "einsum"):
            return True
        rank = len(view.shape(current)) if current.op in ("call_function", "call_method") else 0
        if rank >= 2 and _name(view, current) not in ("linear", "embedding"):
            pending.extend((source, depth + 1) for source in current.all_input_nodes if _is_like(view, source, current))
    return False


def _is_like(view: CanonicalGraph, source: Node, node: Node) -> bool:
    """Whether a value can be the scores that `node` was made from: both have the same queries."""
    if source.op not in ("call_function", "call_method"):
        return False
    before, after = view.shape(source), view.shape(node)
    return len(before) >= 3 and len(after) >= 3 and same_shape(before[-2:-1], after[-2:-1])


def _name(view: CanonicalGraph, node: Node) -> str:
    call = view.call(node)
    return call.name if call is not None else str(getattr(node.target, "__name__", node.target))
