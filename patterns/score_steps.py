"""What may stand between the product of q and k and the softmax, one step each, read inwards from the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from infuse.patterns import contractions, score_masks
from infuse.patterns.attention_operands import Operand
from infuse.patterns.axes import Axes, Dims, aligned, flat, fresh, leaves, regroup, resolved, unpermuted
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.scales import constant, factor, scaled, times
from infuse.patterns.score_masks import MASKING, Added, Filled, Term
from infuse.patterns.sites import Make
from infuse.patterns.sizes import same_shape, same_size

# How far a product of q and k may lie behind the softmax to make it attention-like.
MAX_STEPS = 16
_THROUGH = ("alias", "cast", "mul", "div", "add", "sub", "permute", "reshape", "masked_fill", "where", "tanh", "cat")


@dataclass(frozen=True, slots=True)
class Scores:
    """What has been read inwards from the softmax: node is where the reading stands, dims its axes.

    scale: what node is multiplied by, a number, or a `Make` or node of one; if there is a softcap, inside it. masks:
    what is done to the scores after the cap, the last first. by: tensors that the scores are multiplied by, or divided
    where the second is True. keys: the axes of the softmax. floor: a number that -inf was raised to afterwards.
    """

    node: Node
    dims: Dims
    keys: Axes
    scale: object = 1.0
    softcap: object = 0.0
    sinks: Operand | None = None
    sink_first: bool = False
    masks: tuple[Term, ...] = ()
    by: tuple[tuple[Operand, bool], ...] = ()
    floor: float | None = None
    trail: tuple[Node, ...] = ()
    words: tuple[str, ...] = field(default=())

    def past(self, node: Node, word: str = "") -> Scores:
        """One node further."""
        words = (*self.words, word) if word else self.words
        return replace(self, node=node, trail=(*self.trail, self.node), words=words)


Step = Callable[[CanonicalGraph, Scores], Scores | None]


def _look_through(view: CanonicalGraph, scores: Scores) -> Scores | None:
    call = view.call(scores.node, "alias", "cast")
    if call is None or not isinstance(call["input"], Node):
        return None
    return scores.past(call["input"])


def _rearrange(view: CanonicalGraph, scores: Scores) -> Scores | None:
    call = view.call(scores.node, "permute", "reshape")
    if call is None:
        return None
    if call.name == "permute":
        dims: Dims | None = unpermuted(scores.dims, call["dims"])
    else:
        dims = regroup(scores.dims, view.shape(call["input"]))
    return None if dims is None else replace(scores.past(call["input"]), dims=dims)


def _scale(view: CanonicalGraph, scores: Scores) -> Scores | None:
    found = scaled(view, scores.node)
    if found is None or not same_shape(view.shape(found[0]), view.shape(scores.node)):
        return None
    word = "scale before the mask" if scores.masks else "scale"
    return replace(scores.past(found[0], word), scale=times(scores.scale, found[1]))


def _scale_by_tensor(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """A factor for each row, such as a learned temperature of each head: it can be put on q."""
    product, quotient = view.operands(scores.node, "mul"), view.operands(scores.node, "div")
    for inner, other in (product, product[::-1]) if product else (quotient,) if quotient else ():
        tensor = view.tensor(other)
        if tensor is None or not tensor.is_floating_point() or not reaches_product(view, inner):
            continue
        dims = aligned(tensor.shape, scores.dims)
        same = same_shape(view.shape(inner), view.shape(scores.node))
        if not same or dims is None or set(flat(dims)) & set(leaves(scores.keys)) or scores.softcap != 0.0:
            return None
        by = (*scores.by, (Operand(other, dims), quotient is not None))
        return replace(scores.past(inner, "scale by a tensor"), by=by)
    return None


def _add(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """An added mask; what was scaled after it scales the mask too."""
    operands = view.operands(scores.node, "add")
    if operands is None or scores.softcap != 0.0 or scores.by:
        return None
    inner, mask = operands if leads_to_product(view, operands[0]) else operands[::-1]
    if not isinstance(inner, Node) or not same_shape(view.shape(inner), view.shape(scores.node)):
        return None
    if view.number(mask) is not None:
        return scores.past(inner)  # One number for all scores changes nothing.
    tensor = view.tensor(mask)
    if tensor is None or not tensor.is_floating_point():
        return None
    terms = score_masks.added_to(view, mask, scores.dims, scores.scale)
    if isinstance(terms, score_masks.Unfit):
        return None
    if scores.floor is not None:
        if any(isinstance(term, Added) for term in scores.masks):
            return None  # A sum of lowest numbers is -inf again.
        terms = tuple(Added(Make(torch.clamp, (term.value, scores.floor)), term.dims) for term in terms)
    word = "mask" if scores.scale == 1.0 else "mask before the scale"
    return replace(scores.past(inner, word), masks=(*scores.masks, *terms))


def _subtract(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """The row's maximum, which a softmax does not see, or a float mask."""
    operands = view.operands(scores.node, "sub")
    if operands is None or not isinstance(operands[0], Node) or scores.softcap != 0.0 or scores.by:
        return None
    inner, other = operands
    trail = row_maximum(view, other, inner, _key_dim(scores))
    if trail is not None:
        past = scores.past(inner, "less its maximum")
        return replace(past, trail=(*past.trail, *trail))
    tensor = view.tensor(other)
    if tensor is None or not tensor.is_floating_point() or not leads_to_product(view, inner):
        return None
    if not isinstance(scores.scale, float) or not same_shape(view.shape(inner), view.shape(scores.node)):
        return None
    terms = score_masks.added_to(view, other, scores.dims, -scores.scale)
    if isinstance(terms, score_masks.Unfit):
        return None
    return replace(scores.past(inner, "mask"), masks=(*scores.masks, *terms))


def _key_dim(scores: Scores) -> int:
    """The dimension of the softmax; -1 if it is no longer a dimension of its own."""
    keys = leaves(scores.keys)
    return next((dim for dim, axes in enumerate(resolved(scores.dims)) if axes == keys), -1)


def row_maximum(view: CanonicalGraph, node: object, scores: Node, dim: int) -> list[Node] | None:
    """The nodes that compute a node as the maximum of `scores` along a dimension that is kept; None if it is not."""
    trail: list[Node] = []
    while isinstance(node, Node) and (call := view.call(node, "alias", "detach")) is not None:
        trail.append(node)
        node = call["input"]
    if not isinstance(node, Node):
        return None
    trail.append(node)
    picked = view.call(node, "getitem")
    values: object = node
    if picked is not None and picked["index"] in (0, "values"):
        values = picked["input"]
    elif node.target is getattr and node.args[1:] == ("values",) and isinstance(node.args[0], Node):
        values = node.args[0]
    if isinstance(values, Node) and values is not node:
        trail.append(values)
    call = view.call(values, "max", "amax")
    if call is None or dim < 0 or call["dim"] != (dim,) or not call["keepdim"]:
        return None
    return trail if view.strip(call["input"]) is view.strip(scores) else None


def _softcap(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """cap * tanh(inner): everything inside is scaled by the cap too, so that the cap may divide by it."""
    call = view.call(scores.node, "tanh")
    if call is None or scores.softcap != 0.0 or scores.by or scores.scale == 0.0:
        return None
    return replace(scores.past(call["input"], "softcap"), softcap=scores.scale)


def _fill(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """Scores overwritten by a number where a bool mask is set, or where it is not."""
    call = view.call(scores.node, "masked_fill", "where")
    if call is None or scores.softcap != 0.0 or scores.by:
        return None
    if call.name == "masked_fill":
        inner, condition, number, where = call["input"], call["mask"], call["value"], True
    else:
        where = not leads_to_product(view, call["input"])
        inner, number = (call["other"], call["input"]) if where else (call["input"], call["other"])
        condition = call["condition"]
    value = constant(view, number)
    if value is None or not isinstance(scores.scale, float) or scores.scale <= 0.0 or not isinstance(inner, Node):
        return None
    tensor = view.tensor(condition)
    if (
        tensor is None
        or tensor.dtype != torch.bool
        or not isinstance(condition, Node)
        or value * scores.scale > MASKING
    ):
        return None
    dims = aligned(tensor.shape, scores.dims)
    if dims is None or not same_shape(view.shape(inner), view.shape(scores.node)):
        return None
    word = "overwritten by -inf" if value == -math.inf else f"overwritten by {value:g}"
    value = value * scores.scale if scores.floor is None else max(value * scores.scale, scores.floor)
    filled = Filled(condition, dims, where, value)
    return replace(scores.past(inner, word), masks=(*scores.masks, filled))


def _raise_to_the_lowest(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """torch.max(scores, finfo.min), clamp(min=finfo.min): only -inf is changed by it."""
    node, clamp = scores.node, view.call(scores.node, "clamp")
    if scores.softcap != 0.0 or scores.by or scores.scale != 1.0 or scores.floor is not None:
        return None
    if clamp is not None and clamp["max"] is None:
        inner, bound = clamp["input"], clamp["min"]
    elif str(getattr(node.target, "__name__", node.target)) in ("max", "maximum") and len(node.args) == 2:
        inner, bound = node.args
    else:
        return None
    value, dtype = constant(view, bound), view.dtype(node)
    if value is None or dtype is None or not isinstance(inner, Node) or view.dtype(inner) != dtype:
        return None
    lowest = torch.finfo(dtype).min
    if value > lowest / 2 or not same_shape(view.shape(inner), view.shape(node)):
        return None
    return replace(scores.past(inner, "-inf raised"), floor=max(value, lowest))


def _sink(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """An extra column of a number for each head, as gpt-oss has it; it is sliced off after the softmax."""
    call = view.call(scores.node, "cat")
    dim = _key_dim(scores)
    if call is None or scores.masks or scores.scale != 1.0 or scores.sinks is not None or scores.softcap != 0.0:
        return None
    tensors = call["tensors"]
    rank = len(scores.dims)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 2 or dim != rank - 1:
        return None
    if not isinstance(call["dim"], int) or call["dim"] % rank != dim:
        return None
    first = same_size(view.shape(tensors[0])[-1], 1) and not leads_to_product(view, tensors[0])
    sink, inner = tensors if first else reversed(tensors)
    if not same_size(view.shape(sink)[-1], 1):
        return None
    keys = fresh(view.shape(inner)[-1])
    if not keys:
        return None
    past = scores.past(inner, "sinks")
    return replace(
        past,
        dims=(*scores.dims[:-1], keys),
        keys=keys,
        sinks=Operand(sink, (*scores.dims[:-1], ())),
        sink_first=first,
    )


STEPS: tuple[Step, ...] = (
    _look_through,
    _rearrange,
    _scale,
    _add,
    _subtract,
    _softcap,
    _fill,
    _raise_to_the_lowest,
    _sink,
    _scale_by_tensor,
)


def biased(view: CanonicalGraph, scores: Scores) -> Scores | None:
    """The scores at a product, with what baddbmm adds and multiplies; None for a factor that is no number."""
    call = view.call(scores.node, "baddbmm")
    if call is None:
        return scores
    alpha, beta = (1.0 if call[key] is None else factor(view, call[key]) for key in ("alpha", "beta"))
    if alpha is None or beta is None:
        return None
    masks = scores.masks
    if beta != 0.0:
        if scores.softcap != 0.0 or scores.by:
            return None
        terms = score_masks.added_to(view, call["input"], scores.dims, times(scores.scale, beta))
        if isinstance(terms, score_masks.Unfit):
            return None
        masks = (*masks, *terms)
    return replace(scores, scale=times(scores.scale, alpha), masks=masks, words=(*scores.words, "baddbmm"))


def leads_to_product(view: CanonicalGraph, node: object) -> bool:
    """Whether a value is made from a product of two tensors by steps that are read here."""
    pending: list[tuple[object, int]] = [(node, 0)]
    seen: set[object] = set()
    while pending:
        current, depth = pending.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        seen.add(current)
        if contractions.read(view, current) is not None:
            return True
        call = view.call(current, *_THROUGH)
        if call is None or depth > MAX_STEPS or len(view.shape(current)) < 2:
            continue
        inputs = call["tensors"] if call.name == "cat" else [call["input"], call["other"]]
        pending += [(item, depth + 1) for item in inputs or () if len(view.shape(item)) >= 2]
    return False


def reaches_product(view: CanonicalGraph, node: object) -> bool:
    """Whether a product of two tensors lies behind a value, along values as large in the last dimensions."""
    pending: list[tuple[object, int]] = [(node, 0)]
    seen: set[object] = set()
    while pending:
        current, depth = pending.pop()
        if not isinstance(current, Node) or current in seen or depth > MAX_STEPS:
            continue
        seen.add(current)
        if view.word(current) in contractions.PRODUCTS:
            return True
        rank = len(view.shape(current)) if current.op in ("call_function", "call_method") else 0
        if rank >= 2 and view.word(current) not in ("linear", "embedding"):
            pending.extend((source, depth + 1) for source in current.all_input_nodes if _is_like(view, source, current))
    return False


def _is_like(view: CanonicalGraph, source: Node, node: Node) -> bool:
    """Whether a value can be the scores that `node` was made from: both have the same queries."""
    if source.op not in ("call_function", "call_method"):
        return False
    if view.word(node) in ("reshape", "permute"):
        return True
    before, after = view.shape(source), view.shape(node)
    return len(before) >= 2 and len(after) >= 2 and same_size(before[-2], after[-2])
