"""torch.nn.MultiheadAttention, which Dynamo leaves one call: projections, attention, and projection of the result.

The projections become linears of their own, as torch computes them; the attention between them the operator. Layouts:
query [L, B, E] (or [L, E]), key [S, B, Ek], value [S, B, Ev]; weights of the projections [E, Ex].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from infuse.patterns import score_masks
from infuse.patterns.attention import KIND, refuse
from infuse.patterns.axes import Dims, aligned, fresh
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.readings import Call
from infuse.patterns.relayout import Relayout, Step, apply
from infuse.patterns.score_masks import Added, Filled, Mask, Term, Unfit
from infuse.patterns.sites import Finding, Make, Refusal, Site

_HALF = (torch.float16, torch.bfloat16)
# How many nodes behind the probabilities are looked at to see that they are dropped.
_MAX_DEAD = 16
_FEATURES = {
    "static_k": "keys are given after their projection",
    "static_v": "values are given after their projection",
}


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The attention in a call of multi_head_attention_forward."""
    call = view.call(anchor, "multi_head_attention")
    if call is None:
        return None
    readers = [reader for reader in view.readers(anchor) if not _is_dead(view, reader)]
    outputs = [reader for reader in readers if (found := view.call(reader, "getitem")) and found["index"] == 0]
    refusal = _unfit(view, anchor, call, readers, outputs)
    if refusal is not None:
        return refusal
    (root,) = outputs
    (query, key) = (view.shape(call[name]) for name in ("query", "key"))
    batch = fresh(query[1]) if len(query) == 3 else ()
    scores = (batch, fresh(call["num_heads"]), fresh(query[0]), fresh(key[0]))
    mask = _mask(view, call, scores, _num_appended(call))
    if isinstance(mask, Unfit):
        return refuse(anchor, mask.reason, mask.remedy)
    causal = bool(call["is_causal"]) and call["key_padding_mask"] is None and not _needs_weights(call)
    head_dim = call["embed_dim"] // call["num_heads"]
    rounds = _needs_weights(call) and view.dtype(root) in _HALF
    q, k, v = _projections(view, call)
    k, v = _appended(view, call, k, call["bias_k"]), _appended(view, call, v, call["bias_v"])
    q, k, v = (_heads(projected, call["num_heads"], len(query)) for projected in (q, k, v))
    dropout_p = call["dropout_p"] if call["training"] in (None, True) and not view.is_zero(call["dropout_p"]) else 0.0
    arguments = (q, k, v, mask.argument, head_dim**-0.5, causal, 0.0, None, mask.masked_rows, dropout_p, rounds)
    words = ("multi_head_attention_forward", *(["causal"] if causal else ["mask"] if mask.argument is not None else []))
    rounding = "the random numbers of dropout are others" if dropout_p != 0.0 else ""
    rounding = rounding or (f"scores and probabilities are rounded to {view.dtype(root)}" if rounds else "")
    return Site(
        KIND, (root,), root, arguments, (anchor, root), ", ".join(words), rounding, after=_after(call, len(query))
    )


def _is_dead(view: CanonicalGraph, node: Node) -> bool:
    """Whether nothing comes of a value: Dynamo leaves in the graph what is computed and dropped."""
    pending = [node]
    for _ in range(_MAX_DEAD):
        if not pending:
            return True
        current = pending.pop()
        if not view.word(current):
            return False
        pending += view.readers(current)
    return False


def _needs_weights(call: Call) -> bool:
    return call["need_weights"] is not False


def _unfit(view: CanonicalGraph, anchor: Node, call: Call, readers: list[Node], outputs: list[Node]) -> Refusal | None:
    if len(outputs) != 1 or len(readers) != 1:
        return refuse(anchor, "the attention probabilities are read elsewhere", "pass need_weights=False")
    for name, reason in _FEATURES.items():
        if call[name] is not None:
            return refuse(anchor, reason, "leave it off: projections are part of the call")
    # torch has checked that it is the query's.
    size = call["embed_dim"]
    if len(view.shape(call["query"])) not in (2, 3) or type(size) is not int or type(call["num_heads"]) is not int:
        return refuse(anchor, "the embedding's size is not known", "compile with a static embedding size")
    dtypes = {view.dtype(node) for node in (call["query"], call["key"], call["value"], outputs[0])}
    if len(dtypes) != 1:
        return refuse(anchor, "autocast changes its dtype", "cast the model instead, or call it outside autocast")
    if call["is_causal"] and call["attn_mask"] is None:
        return refuse(anchor, "is_causal is a hint about a mask that is not there", "pass attn_mask too")
    return None


def _num_appended(call: Call) -> int:
    """How many keys are appended."""
    return (call["bias_k"] is not None) + bool(call["add_zero_attn"])


def _appended(view: CanonicalGraph, call: Call, projected: object, bias: object) -> object:
    """Keys or values [S, B, E] (or [S, E]) with a learned one and a zero behind them."""
    rank = len(view.shape(call["query"]))
    if bias is not None:
        row: object = Make(torch.squeeze, (bias, 1)) if rank == 2 else bias
        if rank == 3:
            batch = Relayout(view, [call["query"]]).size(view.shape(call["query"])[1])
            row = Make(torch.broadcast_to, (bias, (-1, batch, -1)))
        projected = Make(torch.cat, ((projected, row),))
    return Make(F.pad, (projected, (0, 0) * (rank - 1) + (0, 1))) if call["add_zero_attn"] else projected


def _mask(view: CanonicalGraph, call: Call, scores: Dims, num_appended: int) -> Mask | Unfit:
    """key_padding_mask and attn_mask, True where masked, or added; appended keys are never masked."""
    batch, heads, queries, keys = scores
    terms: list[Term] = []
    padding, mask = call["key_padding_mask"], call["attn_mask"]
    if call["is_causal"] and padding is None and not _needs_weights(call):
        mask = None  # The hint is taken instead.
    nodes: list[tuple[Any, Dims]] = [(padding, (batch, keys) if len(view.shape(padding)) == 2 else (keys,))]
    rank = len(view.shape(mask))
    nodes.append((mask, (queries, keys) if rank == 2 else ((*batch, *heads), queries, keys)))
    for node, dims in nodes:
        if node is None:
            continue
        own = aligned(view.shape(node), dims) if len(view.shape(node)) == len(dims) else None
        if own is None:
            return Unfit("a mask's shape is not that of the scores", "pass attn_mask [L, S] or [B * H, L, S]")
        is_bool = view.dtype(node) == torch.bool
        if num_appended and (is_bool or own[-1] != keys):
            return Unfit("keys are appended beside a bool mask", "pass float masks of the shape of the scores")
        terms.append(Filled(node, own, True, -math.inf) if is_bool else Added(node, own))
    relayout = Relayout(view, [call["query"], call["key"]])

    def place(value: object, dims: Dims) -> object | None:
        steps = relayout.plan(dims, scores)
        placed = None if steps is None else apply(value, steps)
        return placed if placed is None or not num_appended else Make(F.pad, (placed, (0, num_appended)))

    dtype = view.dtype(call["query"])
    assert dtype is not None
    trains = any(tensor is not None and tensor.requires_grad for tensor in [view.tensor(call["query"])])
    return score_masks.build(view, terms, place, dtype, not _needs_weights(call), trains)


def _projections(view: CanonicalGraph, call: Call) -> list[object]:
    """q, k and v [..., E], with as few linears as torch makes of them."""
    query, key, value, bias = (call[name] for name in ("query", "key", "value", "in_proj_bias"))
    size = call["embed_dim"]

    def part(tensor: object, first: int, count: int = 1, dim: int = 0) -> object:
        return None if tensor is None else Make(torch.narrow, (tensor, dim, first * size, count * size))

    if call["use_separate_proj_weight"]:
        weights = [call[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        inputs = zip((query, key, value), weights)
        return [Make(F.linear, (source, weight, part(bias, i))) for i, (source, weight) in enumerate(inputs)]
    weight = call["in_proj_weight"]
    if query is key and key is value:
        packed = Make(F.linear, (query, weight, bias))
        return [part(packed, i, dim=-1) for i in range(3)]
    q = Make(F.linear, (query, part(weight, 0), part(bias, 0)))
    if key is value:
        packed = Make(F.linear, (key, part(weight, 1, 2), part(bias, 1, 2)))
        return [q, part(packed, 0, dim=-1), part(packed, 1, dim=-1)]
    return [
        q,
        *(Make(F.linear, (source, part(weight, i), part(bias, i))) for i, source in ((1, key), (2, value))),
    ]


def _heads(projected: object, num_heads: int, rank: int) -> object:
    """[L, B, E] or [L, E] -> [B, H, L, D]"""
    split = Make(torch.unflatten, (projected, -1, (num_heads, -1)))
    if rank == 2:
        return Make(torch.unsqueeze, (Make(torch.permute, (split, (1, 0, 2))), 0))
    return Make(torch.permute, (split, (1, 2, 0, 3)))


def _after(call: Call, rank: int) -> tuple[Step, ...]:
    """[B, H, L, D] -> [L, B, E] or [L, E], projected."""
    joined: list[Step] = [(torch.permute, ((2, 0, 1, 3),)), (torch.flatten, (2,))]
    if rank == 2:
        joined.append((torch.squeeze, (1,)))
    return (*joined, (F.linear, (call["out_proj_weight"], call["out_proj_bias"])))
