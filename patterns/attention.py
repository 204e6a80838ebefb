"""Attention: calls of scaled_dot_product_attention, and the last step of every other spelling.

What a reader of a spelling finds out is a `Reading`, in which every axis of every tensor is followed by identity;
`assemble` arranges the tensors as the operator takes them and proves that it computes the same.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from infuse.patterns import score_masks
from infuse.patterns.attention_operands import Operand, Roles, Settled, behind, settle
from infuse.patterns.axes import Axis, Dims, aligned, divides, flat, fresh, leaves, numel
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.masks import ProvenMask, prove
from infuse.patterns.relayout import apply
from infuse.patterns.scales import times
from infuse.patterns.score_masks import Unfit
from infuse.patterns.sites import Finding, Make, Refusal, Site, arguments_of
from infuse.patterns.sizes import same_size

KIND = "attention"
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Reading:
    """softmax(cap(scale * q k^T) + masks) v as it was read.

    root: what the operator replaces, with its dims. scores: the dims of q k^T. roles: the axes that are no batch.
    product, values_product: the nodes of both products. scale, softcap, dropout_p: a number, or a `Make` or node of
    one. masks: what is done to the scores after the cap, the last first. by: tensors that q is multiplied by, or
    divided where the second is True. zero_rows: whether a row that is masked whole gives zeros. call: whether torch's
    own attention computes it. trail: the nodes read.
    """

    root: Node
    root_dims: Dims
    q: Operand
    k: Operand
    v: Operand
    scores: Dims
    roles: Roles
    product: Node
    values_product: Node
    scale: object = 1.0
    softcap: object = 0.0
    sinks: Operand | None = None
    masks: tuple[score_masks.Term, ...] = ()
    by: tuple[tuple[Operand, bool], ...] = ()
    is_causal: bool = False
    zero_rows: bool = False
    dropout_p: object = 0.0
    call: bool = False
    trail: tuple[Node, ...] = ()
    words: tuple[str, ...] = field(default=())


def refuse(node: Node, reason: str, remedy: str) -> Refusal:
    """A refusal of an attention."""
    return Refusal(KIND, node, reason, remedy)


def match_call(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The attention that a call of scaled_dot_product_attention is."""
    call = view.call(anchor, "sdpa")
    if call is None:
        return None
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    scale, dropout_p, causal = call["scale"], call["dropout_p"], bool(call["is_causal"])
    if scale is not None and view.number(scale) is None:
        return refuse(anchor, "the scale is a tensor", "pass scale as a Python float")
    if causal and mask is not None:
        return refuse(anchor, "it has a mask and is_causal=True", "pass one of them")
    labelled = _label_call(view, anchor, (q, k, v), bool(call["enable_gqa"]))
    if labelled is None:
        return _unfit_shapes(view, anchor, (q, k, v))
    q_dims, k_dims, v_dims, scores = labelled
    masks = () if mask is None else score_masks.added_to(view, mask, scores)
    if isinstance(masks, Unfit):
        return refuse(anchor, masks.reason, masks.remedy)
    reading = Reading(
        root=anchor,
        root_dims=(*scores[:-1], v_dims[-1]),
        q=Operand(q, q_dims),
        k=Operand(k, k_dims),
        v=Operand(v, v_dims),
        scores=scores,
        roles=Roles(q_dims[-2], k_dims[-2], q_dims[-1], v_dims[-1]),
        product=anchor,
        values_product=anchor,
        scale=_default_scale(view, q) if scale is None else scale,
        masks=masks,
        is_causal=causal,
        zero_rows=True,
        dropout_p=0.0 if dropout_p is None or view.is_zero(dropout_p) else dropout_p,
        call=True,
        trail=(anchor,),
        words=("scaled_dot_product_attention", *(["causal"] if causal else []), *(["mask"] if masks else [])),
    )
    return assemble(view, reading)


def _label_call(
    view: CanonicalGraph, root: Node, tensors: tuple[Node, Node, Node], grouped: bool
) -> tuple[Dims, Dims, Dims, Dims] | None:
    """The dims of q, k, v and the scores; all dimensions but the last two broadcast."""
    shapes = [view.shape(tensor) for tensor in tensors]
    if any(len(shape) < 2 for shape in shapes):
        return None
    (*_, queries, inner), (*_, keys, _), (*_, values) = shapes
    batch = tuple(fresh(size) for size in view.shape(root)[:-2])
    kv_batch = _with_kv_heads(batch, shapes[1]) if grouped else batch
    s, t, d, e = fresh(queries), fresh(keys), fresh(inner), fresh(values)
    outer = [aligned(shape[:-2], own) for shape, own in zip(shapes, (batch, kv_batch, kv_batch))]
    if None in outer:
        return None
    q_dims, k_dims, v_dims = ((*(dims or ()), *last) for dims, last in zip(outer, ((s, d), (t, d), (t, e))))
    return q_dims, k_dims, v_dims, (*batch, s, t)


def _with_kv_heads(batch: Dims, k: tuple[int | torch.SymInt, ...]) -> Dims:
    """The batch dimensions of k where each of its heads serves a group of q heads."""
    if len(batch) < 1 or len(k) < 3 or not batch[-1] or same_size(batch[-1][0].size, k[-3]):
        return batch
    (heads,) = batch[-1]
    if not divides(k[-3], heads.size):
        return batch
    heads.parts = (Axis(k[-3]), Axis(heads.size // k[-3]))
    return (*batch[:-1], () if same_size(k[-3], 1) else heads.parts[:1])


def _unfit_shapes(view: CanonicalGraph, root: Node, tensors: tuple[Node, Node, Node]) -> Refusal:
    q, k, v = (tuple(view.shape(tensor)) for tensor in tensors)
    return refuse(
        root,
        f"the shapes are not provably those of attention: q {q}, k {k}, v {v}",
        "give q, k and v one batch size, k and v the same heads, a divisor of q's",
    )


def assemble(view: CanonicalGraph, reading: Reading) -> Finding:
    """The site, or why the operator does not take it."""
    dtype = view.dtype(reading.values_product)
    operands = (reading.q, reading.k, reading.v)
    roles = reading.roles
    settled = settle(view, operands, reading.scores, roles, dtype, not reading.call)
    if settled is not None and _is_shared_memory(reading, settled):
        roles = replace(roles, queries=(*settled.frame.groups, *settled.frame.queries))
        settled = settle(view, operands, reading.scores, roles, dtype, not reading.call)
    after = None if settled is None else settled.relayout.plan(settled.frame.out, reading.root_dims)
    if settled is None or after is None:
        return _unfit_shapes(view, reading.root, (reading.q.node, reading.k.node, reading.v.node))
    refusal = _unfit_dtypes(view, reading, settled, dtype)
    if refusal is not None or dtype is None:
        return refusal or refuse(reading.root, "its dtype is not known", "compile with torch.compile")
    mask = mask_argument(view, reading, settled, dtype)
    if isinstance(mask, Unfit):
        return refuse(reading.root, mask.reason, mask.remedy)
    sinks = _sinks(view, reading, settled)
    if isinstance(sinks, Unfit):
        return refuse(reading.root, sinks.reason, sinks.remedy)
    q, k, v = _tensors(view, settled, dtype)
    for factor, divides_q in reading.by:
        q = _scaled_by(view, q, factor, divides_q, settled, dtype)
    scale = times(times(reading.scale, settled.q.scale), settled.k.scale)
    rounds = not reading.call and view.dtype(reading.product) in _HALF
    proven = _proven_mask(view, reading, settled, mask)
    arguments = (
        *(q, k, v, proven.mask, scale, proven.is_causal, reading.softcap, sinks),
        *(proven.masked_rows, reading.dropout_p, rounds),
    )
    words = (*reading.words, *_notes(view, reading, settled), *proven.words)
    return Site(
        KIND,
        (reading.root,),
        reading.root,
        arguments,
        _interior(view, reading, settled),
        ", ".join(words),
        _rounding(view, reading, settled) or proven.rounding,
        after=tuple(after),
    )


def _is_shared_memory(reading: Reading, settled: Settled) -> bool:
    """Whether k and v are matrices that all of q reads: q's rows are then all alike."""
    frame = settled.frame
    if frame.batch or frame.kv_heads or not frame.groups or reading.is_causal or reading.sinks is not None:
        return False
    rows = {*frame.groups, *frame.queries}
    return not any(rows & set(flat(term.dims)) for term in reading.masks)


def _unfit_dtypes(
    view: CanonicalGraph, reading: Reading, settled: Settled, dtype: torch.dtype | None
) -> Refusal | None:
    """q, k and v are in the result's dtype, or autocast brings them to it."""
    product = view.dtype(reading.product)
    narrowed = all(view.dtype(operand.node) == dtype for operand in (settled.q, settled.k))
    if product == dtype or (narrowed and product in (torch.float32, torch.float64)):
        return None
    nodes = (reading.q.node, reading.k.node, reading.v.node, reading.root)
    names = ", ".join(str(view.dtype(node)).removeprefix("torch.") for node in nodes)
    return refuse(
        reading.root,
        f"q, k, v and the result differ in dtype: {names}",
        "bring q, k and v to one dtype, outside autocast",
    )


def mask_argument(
    view: CanonicalGraph, reading: Reading, settled: Settled, dtype: torch.dtype
) -> score_masks.Mask | Unfit:
    """The operator's mask and masked_rows."""
    frame, relayout = settled.frame, settled.relayout

    def place(value: object, dims: Dims) -> object | None:
        """In the operator's dimensions; one that broadcasts to them as it is stays as it is."""
        own = [leaves(axes) for axes in dims]
        target = frame.scores[max(0, 4 - len(own)) :]
        if 2 <= len(own) <= 4 and all(not axes or axes == wanted for axes, wanted in zip(own, target)):
            return value
        steps = relayout.plan(dims, frame.scores)
        return None if steps is None else apply(value, steps)

    trains = any(
        tensor is not None and tensor.requires_grad for tensor in map(view.tensor, (settled.q.node, settled.k.node))
    )
    return score_masks.build(view, reading.masks, place, dtype, reading.zero_rows, trains)


def _proven_mask(view: CanonicalGraph, reading: Reading, settled: Settled, mask: score_masks.Mask) -> ProvenMask:
    """The operator's mask, is_causal and masked_rows, after what the graph proves of the mask."""
    if mask.argument is None:
        return ProvenMask(None, reading.is_causal, mask.masked_rows, ())
    sources = set(arguments_of(mask.argument))
    readers = [node for node in reading.trail if sources & set(node.all_input_nodes)]
    shape = [numel(axes) for axes in settled.frame.scores]
    return prove(view, mask.argument, mask.masked_rows, shape, [*readers, reading.root])


def _sinks(view: CanonicalGraph, reading: Reading, settled: Settled) -> object | Unfit:
    """The operator's sinks [H]."""
    if reading.sinks is None:
        return None
    heads = settled.frame.heads
    for state in behind(view, reading.sinks, reading.roles, may_scale=False):
        steps = settled.relayout.plan(state.dims, (heads,))
        if heads and steps is not None and set(flat(state.dims)) == set(heads):
            return apply(state.node, steps)
    return Unfit("the extra column of the scores is not one number for each head", "let sinks be a tensor [H]")


def _tensors(view: CanonicalGraph, settled: Settled, dtype: torch.dtype) -> list[object]:
    """q, k and v; what autocast casts for the products is cast here."""
    found: list[object] = []
    for operand, steps in zip((settled.q, settled.k, settled.v), settled.steps):
        value: object = operand.node
        if view.dtype(operand.node) != dtype:
            value = Make(torch.ops.aten.to.dtype, (value, dtype))
        found.append(apply(value, steps))
    return found


def _scaled_by(
    view: CanonicalGraph, q: object, factor: Operand, divides_q: bool, settled: Settled, dtype: torch.dtype
) -> object:
    """q times (or divided by) a number for each of its rows."""
    steps = settled.relayout.plan(factor.dims, settled.frame.scores) if factor.dims else []
    assert steps is not None
    target = torch.div if divides_q else torch.mul
    return Make(torch.ops.aten.to.dtype, (Make(target, (q, apply(factor.node, steps))), dtype))


def _notes(view: CanonicalGraph, reading: Reading, settled: Settled) -> list[str]:
    notes: list[str] = []
    if settled.q.scale != 1.0 or settled.k.scale != 1.0:
        notes.append(
            "scale on q" if settled.k.scale == 1.0 else "scale on k" if settled.q.scale == 1.0 else "scale on q and k"
        )
    if view.dtype(settled.q.node) != view.dtype(reading.q.node):
        notes.append("q and k cast to float32")
    if settled.k.folded:
        notes.append("K/V heads repeated")
    return notes


def _interior(view: CanonicalGraph, reading: Reading, settled: Settled) -> tuple[Node, ...]:
    trail = {*reading.trail, *settled.q.trail, *settled.k.trail, *settled.v.trail}
    return tuple(sorted(trail, key=lambda node: view.index[node]))


def _rounding(view: CanonicalGraph, reading: Reading, settled: Settled) -> str:
    """Where the source rounds between the products; the operator keeps scores and probabilities in float32."""
    if reading.dropout_p != 0.0:
        return "the random numbers of dropout are others"
    if reading.call:
        return ""
    for node in (*reading.trail, *settled.q.rounded, *settled.k.rounded):
        half = view.dtype(node) in _HALF
        if half or (view.call(node, "cast") is not None and not view.widens(node)):
            return f"scores and probabilities are rounded to {view.dtype(node)}"
    return ""


def _default_scale(view: CanonicalGraph, q: Node) -> object:
    """1 / sqrt(D)"""
    shape = view.shape(q)
    head_dim = shape[-1] if shape else 1
    if type(head_dim) is int:
        return float(head_dim) ** -0.5
    size = Make(torch.ops.aten.sym_size.int, (q, len(shape) - 1))
    return Make(operator.truediv, (1.0, Make(torch._sym_sqrt, (size,))))  # type: ignore[attr-defined]
