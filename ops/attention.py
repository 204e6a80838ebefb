"""Scaled dot product attention with grouped K/V heads (Vaswani et al. 2017; Ainslie et al. 2023, GQA).

    out = softmax(cap(scale * q k^T) + mask) v        q head h reads K/V head h // (H / H_kv)

Shapes: q [B, H, S, D]; k [B, H_kv, T, D]; v [B, H_kv, T, Dv]; mask broadcastable to [B, H, S, T]; sinks [H];
out [B, H, S, Dv]; lse [B, H, S], float32 (float64 for a float64 q). out and the gradients lie in memory as
[B, S, H, D], so that the transpose and reshape that joins the heads again copies nothing.
Dtypes: q, k, v one float dtype, out the same; mask bool (True attends) or float (added to scores); sinks float; softmax
in float32.
scale, softcap: cap(x) = softcap * tanh(x / softcap) (Gemma 2), the identity for 0.
is_causal: query i reads keys 0..i, aligned at the upper left as in torch; exclusive with mask.
sinks: a logit of each head that takes part in the softmax's denominator and reads no value (gpt-oss).
masked_rows: what a row gives whose keys are all masked, by False or by -inf: "zeros" as torch's SDPA, "nan" as a
softmax that is written out, "mean" (of all T rows of v) as one over scores that were overwritten by a large negative
number, "softmax" (of a float mask) what the softmax makes of it, NaN or not, gradient included, "none" if there is no
such row. With sinks it is always zeros.
dropout_p: drops probabilities; seed, int64 [2], decides which (infuse.ops.attention_dropout). infuse::attention draws
one from torch's generator; its inline overload takes the random numbers of whatever computes it.
Overload expanded: inline, with K and V repeated for each head of q.
round_scores: the caller rounds scores and probabilities to q's dtype, so the inline overload may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops import attention_dropout, attention_sharding, checks
from infuse.ops.attention_formulas import (
    accumulation_dtype,
    attention_bwd_ref,
    attention_dsinks,
    attention_fwd_ref,
    attention_inline,
    attention_sdpa,
    expand_kv,
    heads_inside,
)
from infuse.ops.registration import (
    define,
    differentiate,
    implement,
    register,
    register_differentiable,
    register_sharding,
    with_defaults,
)

ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal=False, float softcap=0.0,"
    ' Tensor? sinks=None, str masked_rows="zeros", float dropout_p=0.0, bool round_scores=False'
)
MASKED_ROWS = ("zeros", "nan", "mean", "softmax", "none")

__all__ = [
    "attention",
    "attention_bwd_ref",
    "attention_dsinks",
    "attention_fwd_ref",
    "attention_inline",
    "attention_ref",
    "attention_sdpa",
    "expand_kv",
    "heads_inside",
]


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    sinks: Tensor | None,
    masked_rows: str,
) -> None:
    checks.floating(op, "q", q)
    checks.same_dtype(op, q=q, k=k, v=v)
    checks.rank(op, "q", q, 4, "[B, H, S, D]")
    checks.rank(op, "k", k, 4, "[B, H_kv, T, D]")
    checks.rank(op, "v", v, 4, "[B, H_kv, T, Dv]")
    checks.equal(op, "k: batch", k.shape[0], q.shape[0])
    checks.equal(op, "v: batch", v.shape[0], q.shape[0])
    checks.equal(op, "k: head_dim", k.shape[3], q.shape[3])
    checks.equal(op, "v: heads", v.shape[1], k.shape[1])
    checks.equal(op, "v: length", v.shape[2], k.shape[2])
    checks.equal(op, "q: heads modulo K/V heads", q.shape[1] % k.shape[1], 0)
    if masked_rows not in MASKED_ROWS:
        raise ValueError(f"infuse::{op}: masked_rows: got {masked_rows!r}, expected one of {MASKED_ROWS}")
    if sinks is not None:
        _check_sinks(op, q, sinks, masked_rows)
    if mask is not None:
        _check_mask(op, mask, is_causal)


def _check_sinks(op: str, q: Tensor, sinks: Tensor, masked_rows: str) -> None:
    checks.floating(op, "sinks", sinks)
    checks.rank(op, "sinks", sinks, 1, "[H]")
    checks.equal(op, "sinks: heads", sinks.shape[0], q.shape[1])
    if masked_rows not in ("zeros", "none"):
        raise ValueError(f"infuse::{op}: masked_rows: got {masked_rows!r} beside sinks, expected 'zeros'")


def _check_mask(op: str, mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError(f"infuse::{op}: got a mask and is_causal=True, expected one of them")
    if mask.dtype != torch.bool:
        checks.floating(op, "mask", mask)
    if mask.dim() > 4:
        raise ValueError(
            f"infuse::{op}: mask: got shape {tuple(mask.shape)}, expected one that broadcasts to [B, H, S, T]"
        )


def _check_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"infuse::{op}: dropout_p: got {dropout_p}, expected a number from 0 up to but not 1")
    if dropout_p != 0.0 and (seed is None or seed.dtype != torch.int64 or seed.shape != (2,)):
        raise ValueError(f"infuse::{op}: seed: got {seed}, expected [2] in int64 for dropout_p = {dropout_p}")


def empty_heads_inside(like: Tensor, head_dim: int | torch.SymInt) -> Tensor:
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """out by the formula."""
    return attention_fwd_ref(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)[0]


def _inline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    round_scores: bool = False,
) -> Tensor:
    _check("attention", q, k, v, mask, is_causal, sinks, masked_rows)
    return attention_inline(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, round_scores)


def attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    round_scores: bool = False,
) -> Tensor:
    _check("attention", q, k, v, mask, is_causal, sinks, masked_rows)
    return empty_heads_inside(q, v.shape[3])


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check("attention_fwd", q, k, v, mask, is_causal, sinks, masked_rows)
    _check_dropout("attention_fwd", dropout_p, seed)
    return attention_fwd_ref(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)


def attention_fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_dropout("attention_fwd", dropout_p, seed)
    out = attention_fake(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows)
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def attention_bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    needs_dmask: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dmask = mask.new_empty(mask.shape) if needs_dmask and mask is not None else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    dq, dk, dv = (empty_heads_inside(tensor, tensor.shape[3]) for tensor in (q, k, v))
    return dq, dk, dv, dmask, dsinks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        softcap: float,
        sinks: Tensor | None,
        masked_rows: str,
        dropout_p: float,
        round_scores: bool,
    ) -> Tensor:
        seed = attention_dropout.draw_seed(q.device) if dropout_p != 0.0 else None
        flags = (scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)
        out, lse = torch.ops.infuse.attention_fwd(q, k, v, mask, *flags)
        ctx.save_for_backward(q, k, v, out, lse, mask, sinks, seed)
        ctx.flags = scale, is_causal, softcap, masked_rows, dropout_p
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sinks, seed = ctx.saved_tensors
        q, k, v, _, _, mask = tensors
        scale, is_causal, softcap, masked_rows, dropout_p = ctx.flags
        if torch.is_grad_enabled():
            inputs = (q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)
            return differentiate(attention_ref, inputs, (dout,))
        needs_dmask = bool(ctx.needs_input_grad[3])
        dq, dk, dv, dmask, dsinks = torch.ops.infuse.attention_bwd(
            dout, *tensors, scale, is_causal, needs_dmask, softcap, sinks, masked_rows, dropout_p, seed
        )
        return (
            *(dq, dk, dv, dmask if needs_dmask else None, None, None),
            *(None, None if sinks is None else dsinks, None, None, None),
        )


def _implementation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    round_scores: bool = False,
) -> Tensor:
    return heads_inside(_inline(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, round_scores))


def _expanded(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """The inline form with K and V repeated for each head of q."""
    heads = q.shape[1]
    return _inline(q, expand_kv(k, heads), expand_kv(v, heads), *rest)


register_differentiable(
    "attention",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=_inline,
    fake=attention_fake,
    autograd=_Attention.apply,
    is_random=lambda *args: args[9] != 0.0,
)
define(f"attention.expanded({ARGUMENTS}) -> Tensor")
implement(
    "attention.expanded", with_defaults(torch.ops.infuse.attention.expanded, _expanded), "CompositeImplicitAutograd"
)
register(
    "attention_fwd",
    "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, float softcap=0.0, Tensor? sinks=None,"
    ' str masked_rows="zeros", float dropout_p=0.0, Tensor? seed=None',
    "(Tensor, Tensor)",
    implementation=_fwd,
    fake=attention_fwd_fake,
)
register(
    "attention_bwd",
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, float scale, bool is_causal,"
    ' bool needs_dmask, float softcap=0.0, Tensor? sinks=None, str masked_rows="zeros", float dropout_p=0.0,'
    " Tensor? seed=None",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=attention_bwd_ref,
    fake=attention_bwd_fake,
)
register_sharding("attention", attention_sharding.inference)
register_sharding("attention_fwd", attention_sharding.forward)
register_sharding("attention_bwd", attention_sharding.backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(cap(scale * q k^T) + mask) v; scale defaults to 1 / sqrt(D). See the module's text for the arguments.

    Raises TypeError for dtypes that are no floats or differ, ValueError for shapes that do not fit, a mask with
    is_causal or an unknown `masked_rows`.
    """
    _check("attention", q, k, v, mask, is_causal, sinks, masked_rows)
    value = q.shape[-1] ** -0.5 if scale is None else scale
    packet = torch.ops.infuse.attention
    overload = packet.inline if dropout_p else packet.default
    return overload(  # type: ignore[no-any-return]
        q, k, v, mask, value, is_causal, softcap, sinks, masked_rows, dropout_p
    )
