"""Attention: calls of scaled_dot_product_attention, and the last step of every other spelling.

What a reader of a spelling finds out is a `Parts`; `assemble` proves that the operator takes it: shapes, dtypes, heads,
mask.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.heads import Source, folded
from infuse.patterns.sites import Finding, Make, Refusal, Site, arguments_of
from infuse.patterns.sizes import Size, broadcasts_to, same_size

KIND = "attention"


@dataclass(frozen=True, slots=True)
class Parts:
    """softmax(scale * q k^T + mask) v as it was read.

    q [B, H, S, D]; k, v [B, H or H_kv, T, D]. scale: a number, or a `Make` or node of one; None: 1 / sqrt(D).
    grouped: the call itself repeats K/V heads. trail: the nodes read.
    """

    root: Node
    q: Node
    k: Source
    v: Source
    mask: object
    scale: object
    trail: tuple[Node, ...]
    words: tuple[str, ...]
    is_causal: bool = False
    grouped: bool = False
    rounding: str = ""


def refuse(node: Node, reason: str, remedy: str) -> Refusal:
    """A refusal of an attention."""
    return Refusal(KIND, node, reason, remedy)


def match_call(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The attention that a call of scaled_dot_product_attention is."""
    call = view.call(anchor, "sdpa")
    if call is None:
        return None
    if call["dropout_p"] is not None and not view.is_zero(call["dropout_p"]):
        return refuse_dropout(anchor)
    tensors = [call["query"], call["key"], call["value"]]
    refusal = _unfit_tensors(view, anchor, tensors)
    if refusal is not None:
        return refusal
    mask, causal = call["attn_mask"], bool(call["is_causal"])
    scale = call["scale"]
    if scale is not None and view.number(scale) is None:
        return refuse(anchor, "the scale is a tensor", "pass scale as a Python float")
    words = ("scaled_dot_product_attention", *(["causal"] if causal else []), *(["mask"] if mask is not None else []))
    q, k, v = tensors
    return assemble(
        view,
        Parts(anchor, q, Source(k), Source(v), mask, scale, (anchor,), words, causal, bool(call["enable_gqa"])),
    )


def refuse_dropout(node: Node) -> Refusal:
    """The refusal of an attention that drops probabilities."""
    return refuse(
        node, "the attention probabilities are dropped out", "train with attention dropout 0, or call model.eval()"
    )


def _unfit_tensors(view: CanonicalGraph, anchor: Node, tensors: list[Any]) -> Refusal | None:
    ranks = [len(view.shape(tensor)) for tensor in tensors]
    if ranks != [4, 4, 4]:
        return refuse(
            anchor,
            f"q, k, v have {ranks} dimensions, expected 4 each",
            "keep heads in a dimension of their own: [B, H, S, D]",
        )
    return None


def assemble(view: CanonicalGraph, parts: Parts) -> Finding:
    """The site, or why the operator does not take it."""
    parts = _fold_heads(view, _narrow(view, parts))
    refusal = _unfit_dtypes(view, parts) or _unfit_shapes(view, parts) or _unfit_mask(view, parts)
    if refusal is not None:
        return refusal
    scale = _scale(view, parts)
    arguments = (parts.q, parts.k.argument(), parts.v.argument(), _mask(view, parts), scale, parts.is_causal)
    trail = (*parts.trail, *parts.k.trail, *parts.v.trail)
    interior = tuple(sorted(set(trail), key=lambda node: view.index[node]))
    return Site(KIND, (parts.root,), parts.root, arguments, interior, ", ".join(parts.words), parts.rounding)


def _narrow(view: CanonicalGraph, parts: Parts) -> Parts:
    """q and k without the cast to float32 for their product alone: the operator takes the product in float32 too."""
    narrow = view.dtype(parts.v.node)
    if view.dtype(parts.q) == narrow or view.dtype(parts.root) != narrow:
        return parts
    q_trail: list[Node] = []
    k_trail: list[Node] = []
    q, k = view.narrowed(parts.q, q_trail), view.narrowed(parts.k.node, k_trail)
    if view.dtype(q) != narrow or view.dtype(k) != narrow:
        return parts
    source = Source(k, parts.k.order, (*parts.k.trail, *k_trail))
    words = (*parts.words, "q and k cast to float32")
    return replace(parts, q=q, k=source, trail=(*parts.trail, *q_trail), words=words)


def _fold_heads(view: CanonicalGraph, parts: Parts) -> Parts:
    """K and V with their own number of heads, if both were repeated alike."""
    k, v = folded(view, parts.k), folded(view, parts.v)
    if k is None or v is None or not same_size(k[1], v[1]):
        return parts
    return replace(parts, k=k[0], v=v[0], grouped=True, words=(*parts.words, "K/V heads repeated"))


def _unfit_dtypes(view: CanonicalGraph, parts: Parts) -> Refusal | None:
    nodes = (parts.q, parts.k.node, parts.v.node, parts.root)
    dtypes = {view.dtype(node) for node in nodes}
    if len(dtypes) == 1:
        return None
    names = ", ".join(str(view.dtype(node)).removeprefix("torch.") for node in nodes)
    return refuse(
        parts.root,
        f"q, k, v and the result differ in dtype: {names}",
        "bring q, k and v to one dtype, outside autocast",
    )


def _unfit_shapes(view: CanonicalGraph, parts: Parts) -> Refusal | None:
    q, k, v = view.shape(parts.q), parts.k.shape(view), parts.v.shape(view)
    # That q and k agree in D, and k and v in T, is what the source needs to run at all; the operator checks it.
    fit = (
        same_size(q[0], k[0])
        and same_size(q[0], v[0])
        and same_size(k[1], v[1])
        and _heads_fit(q[1], k[1], parts.grouped)
    )
    if fit:
        return None
    return refuse(
        parts.root,
        f"the shapes are not provably those of attention: q {tuple(q)}, k {tuple(k)}, v {tuple(v)}",
        "give q, k and v one batch size, k and v the same heads, a divisor of q's",
    )


def _heads_fit(heads: Size, kv_heads: Size, grouped: bool) -> bool:
    """Whether q heads read K/V heads as the operator does: one each, one for all, or in groups."""
    if same_size(heads, kv_heads) or same_size(kv_heads, 1):
        return True
    return grouped and bool(same_size(heads % kv_heads, 0))  # type: ignore[operator]


def _unfit_mask(view: CanonicalGraph, parts: Parts) -> Refusal | None:
    if parts.mask is None:
        return None
    if parts.is_causal:
        return refuse(parts.root, "it has a mask and is_causal=True", "pass one of them")
    dtype, q_dtype = mask_dtype(view, parts.mask), view.dtype(parts.q)
    if dtype is None or not (dtype == torch.bool or dtype.is_floating_point):
        return refuse(
            parts.root, "the mask is no bool or float tensor", "pass a bool mask, or a float one that is added"
        )
    if dtype == torch.float64 != q_dtype:
        return refuse(parts.root, f"the mask is float64 beside q in {q_dtype}", "cast the mask to float32")
    target = (*view.shape(parts.q)[:3], parts.k.shape(view)[2])
    for shape in [view.shape(node) for node in arguments_of(parts.mask) if view.tensor(node) is not None]:
        if not broadcasts_to(shape, target):
            return refuse(
                parts.root,
                f"the mask's shape {tuple(shape)} is not provably broadcastable to {tuple(target)}",
                "give the mask the shape [B or 1, H or 1, S or 1, T]",
            )
    return None


def mask_dtype(view: CanonicalGraph, mask: object) -> torch.dtype | None:
    """The dtype of a mask: a node, or what is made of several."""
    dtypes = [dtype for node in arguments_of(mask) if (dtype := view.dtype(node)) is not None]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _mask(view: CanonicalGraph, parts: Parts) -> object:
    """The mask as the operator's argument: bool, float32 or in q's dtype, which is what torch's own attention takes."""
    if parts.mask is None or mask_dtype(view, parts.mask) in (torch.bool, torch.float32, view.dtype(parts.q)):
        return parts.mask
    return Make(torch.ops.aten.to.dtype, (parts.mask, torch.float32))


def _scale(view: CanonicalGraph, parts: Parts) -> object:
    """The scale as the operator's argument."""
    if parts.scale is not None:
        return parts.scale
    head_dim = view.shape(parts.q)[3]
    if type(head_dim) is int:
        return float(head_dim) ** -0.5
    size = Make(torch.ops.aten.sym_size.int, (parts.q, 3))
    return Make(operator.truediv, (1.0, Make(torch._sym_sqrt, (size,))))  # type: ignore[attr-defined]
