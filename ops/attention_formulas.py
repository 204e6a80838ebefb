"""The arithmetic of infuse::attention in plain torch: the test oracle, its gradient, and the decomposition.

`attention_fwd_ref` and `attention_bwd_ref` compute in float32 (float64 for float64), with the kernels' dropout.
`attention_inline` is what stands in the graph where no kernel runs: torch's SDPA where it computes the same in a fused
kernel, otherwise the formula as it is usually written, so that it costs what the author's own code costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from infuse.ops import attention_dropout

_LOWEST = float("-inf")
_WIDEST_FUSED_HEAD = 256


def heads_inside(tensor: Tensor) -> Tensor:
    """[B, H, S, D] in the memory layout [B, S, H, D]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def expand_kv(kv: Tensor, num_heads: int) -> Tensor:
    """[B, H_kv, T, D] -> [B, H, T, D], each head repeated for its group of q heads."""
    batch, num_kv_heads, length, head_dim = kv.shape
    group = num_heads // num_kv_heads
    expanded = kv[:, :, None].expand(batch, num_kv_heads, group, length, head_dim)
    return expanded.reshape(batch, num_heads, length, head_dim)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _causal(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _raw_scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """scale * q k^T [B, H, S, T], capped; k has q's heads."""
    scores = torch.matmul(q, k.transpose(-2, -1)).to(accumulation_dtype(q.dtype)) * scale
    return softcap * torch.tanh(scores / softcap) if softcap != 0.0 else scores


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        mask = _causal(scores)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, _LOWEST) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _log_sum_exp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, H, S], of the scores and the head's sink."""
    lse = torch.logsumexp(scores, -1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])


def _probabilities(scores: Tensor, sinks: Tensor | None, masked_rows: str) -> Tensor:
    """The softmax over keys and sink; in rows that attend to nothing (all scores are -inf) what `masked_rows` says.

    Not exp(scores - lse): in a row of very low scores, -3e38 say, the sum is lost in lse.
    """
    nothing = (scores == _LOWEST).all(-1, keepdim=True)
    finite = torch.where(nothing, 0.0, scores)
    filling = {"nan": float("nan"), "softmax": float("nan"), "mean": 1.0 / max(1, scores.shape[-1])}.get(
        masked_rows, 0.0
    )
    some = torch.softmax(finite, -1) if sinks is None else _softmax_beside_sinks(finite, sinks)
    return torch.where(nothing, filling, some)


def attention_fwd_ref(
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
    """out and the log-sum-exp of the scores, by the formula. seed: int64 [2], for dropout."""
    num_heads, dtype = q.shape[1], accumulation_dtype(q.dtype)
    k, v = expand_kv(k, num_heads).to(dtype), expand_kv(v, num_heads).to(dtype)
    scores = _masked(_raw_scores(q.to(dtype), k, scale, softcap), mask, is_causal)
    lse = _log_sum_exp(scores, sinks)
    probabilities = _drop(_probabilities(scores, sinks, masked_rows), dropout_p, seed)
    return heads_inside(torch.matmul(probabilities, v).to(q.dtype)), lse


def _drop(values: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Zeros where dropout takes a probability [B, H, S, T] away, the others larger by what is missing."""
    if seed is None or dropout_p == 0.0:
        return values
    batch, heads, queries, keys = values.shape
    kept = attention_dropout.kept(seed, dropout_p, (batch, heads, queries, keys))
    return torch.where(kept, values / (1.0 - dropout_p), 0.0)


def attention_bwd_ref(
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
    """dq, dk, dv, dmask and dsinks in the shapes and dtypes of q, k, v, mask and sinks.

    dmask is empty [0] unless needed, dsinks without sinks. A row that attends to nothing has no gradient but that of
    the mean of v; a NaN there stays out of the gradients.
    """
    num_heads, num_kv_heads, dtype = q.shape[1], k.shape[1], accumulation_dtype(q.dtype)
    wide_k, wide_v = expand_kv(k, num_heads).to(dtype), expand_kv(v, num_heads).to(dtype)
    raw = _raw_scores(q.to(dtype), wide_k, scale, softcap)
    scores = _masked(raw, mask, is_causal)
    something = (scores != _LOWEST).any(-1, keepdim=True)
    probabilities = _probabilities(scores, sinks, "mean" if masked_rows == "mean" else "zeros")
    d = dout.to(dtype)
    dv = torch.matmul(_drop(probabilities, dropout_p, seed).transpose(-2, -1), d)
    delta = torch.where(something, (d * out.to(dtype)).sum(-1, keepdim=True), 0.0)
    dprobabilities = _drop(torch.matmul(d, wide_v.transpose(-2, -1)), dropout_p, seed)
    dscores = torch.where(something, probabilities * (dprobabilities - delta), 0.0)
    draw = dscores * (1 - (raw / softcap) ** 2) if softcap != 0.0 else dscores
    dq = torch.matmul(draw, wide_k) * scale
    dk = torch.matmul(draw.transpose(-2, -1), q.to(dtype)) * scale

    def sum_groups(expanded: Tensor) -> Tensor:
        grouped: Tensor = expanded.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
        return grouped.sum(2)

    dmask = dsinks = q.new_empty(0)
    if needs_dmask and mask is not None:
        dmask = dscores.sum_to_size(mask.shape).to(mask.dtype).contiguous()
    if sinks is not None:
        dsinks = attention_dsinks(dout, out, lse, sinks)
    return (
        heads_inside(dq.to(q.dtype)),
        heads_inside(sum_groups(dk).to(k.dtype)),
        heads_inside(sum_groups(dv).to(v.dtype)),
        dmask,
        dsinks,
    )


def attention_dsinks(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient [H] of the sinks: each took exp(sink - lse) of a row's probability, and gave no value for it."""
    dtype = accumulation_dtype(dout.dtype)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    return -(torch.exp(sinks.to(dtype)[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)


def only_formula(
    dtype: torch.dtype, mask_dtype: torch.dtype | None, softcap: object, has_sinks: bool, masked_rows: object
) -> bool:
    """Whether torch's SDPA on CUDA does not compute the same. dtype: of q; mask_dtype: None without a mask.

    The fused backwards take the probabilities from the log-sum-exp, which has no room for the sum of a row of numbers
    like -3e38. CUDA's SDPA would round a mask of more precision to q's dtype, which the formula does not.
    """
    is_wide = mask_dtype not in (None, torch.bool) and torch.promote_types(mask_dtype, dtype) != dtype
    return softcap != 0.0 or has_sinks or masked_rows == "softmax" or is_wide


def attention_inline(
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
    """out as the graph computes it where no kernel runs."""
    if mask is not None:
        mask = _mask_for_sdpa(mask, q.dtype)
    mask_dtype = mask.dtype if mask is not None and q.is_cuda else None
    plain = only_formula(q.dtype, mask_dtype, softcap, sinks is not None, masked_rows)
    plain = plain or (round_scores and has_wide_heads(q))
    if not plain and (masked_rows == "zeros" or _is_fused(q, k, v, mask, dropout_p, is_causal)):
        return attention_sdpa(q, k, v, mask, scale, is_causal, masked_rows, dropout_p)
    return _written_out(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, round_scores)


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
) -> Tensor:
    """out by torch's scaled_dot_product_attention, whatever backend it takes; without softcap and sinks."""
    if mask is not None:
        mask = _mask_for_sdpa(mask, q.dtype)
        if masked_rows == "mean" and mask.dtype == torch.bool and q.dtype != torch.float16 and not _needs_grad(q, k):
            # Beside a number so low every score vanishes: the softmax itself gives the mean.
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min / 2).to(q.dtype)
            masked_rows = "none"
    groups = _has_groups(q, k)
    if groups and not _native_groups(q, mask):
        k, v, groups = expand_kv(k, q.shape[1]), expand_kv(v, q.shape[1]), False
    added = raised(mask) if mask is not None and q.is_cuda and masked_rows in ("nan", "none") else mask
    out = F.scaled_dot_product_attention(q, k, v, added, dropout_p, is_causal, scale=scale, enable_gqa=groups)
    return out if mask is None else _fill_masked_rows(out, v, mask, masked_rows)


def raised(mask: Tensor) -> Tensor:
    """A mask whose numbers below float32's lowest half are brought into it, in their order; -inf stays.

    CUDA's kernels multiply scores by log2(e), which makes -inf of the lowest numbers: a row that has nothing else then
    loses what the softmax gives for it.
    """
    if mask.dtype not in (torch.float32, torch.bfloat16):
        return mask
    half = torch.finfo(torch.float32).min / 2
    return torch.maximum(mask, 0.25 * mask + 0.75 * half)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _mask_for_sdpa(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as SDPA takes it: at least two dimensions, and not narrower than q, which loses nothing."""
    if mask.dim() < 2:
        mask = mask.reshape(1, -1)
    if mask.dtype != torch.bool and torch.promote_types(mask.dtype, dtype) == dtype:
        mask = mask.to(dtype)
    return mask


def _is_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool) -> bool:
    """Whether torch's SDPA has a fused kernel for this; otherwise it falls back to a formula that costs more."""
    if q.is_cuda:
        groups = _has_groups(q, k) and _native_groups(q, mask)
        if not groups:
            k, v = expand_kv(k, q.shape[1]), expand_kv(v, q.shape[1])
        params = SDPAParams(q, k, v, mask, dropout_p, is_causal, groups)
        return bool(
            can_use_flash_attention(params) or can_use_efficient_attention(params) or can_use_cudnn_attention(params)
        )
    return not (
        q.device.type != "cpu"
        or dropout_p != 0.0
        or _needs_grad(mask)
        or q.shape[3] != v.shape[3]
        or any(tensor.stride(3) != 1 for tensor in (q, k, v))
    )


def has_wide_heads(q: Tensor) -> bool:
    """On CUDA: heads wider than what the kernels of flash and cuDNN take, so that SDPA is memory-efficient attention.

    That one is slow there, above all backwards, where few keys leave it one block a head: 65,536 rows of 1,024 features
    that read 64 keys take 126 ms on an H200, where the whole step takes 2.4 ms by the formula.
    """
    head_dim = q.shape[3]
    return q.is_cuda and isinstance(head_dim, int) and head_dim > _WIDEST_FUSED_HEAD


def _has_groups(q: Tensor, k: Tensor) -> bool:
    return not (isinstance(q.shape[1], int) and isinstance(k.shape[1], int) and q.shape[1] == k.shape[1])


def _native_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's SDPA has a fused kernel that reads grouped K/V heads as they are.

    Flash takes them without a mask, cuDNN (sm_90 and later) also with one; elsewhere torch falls to the plain formula.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(q.device) >= ((8, 0) if mask is None else (9, 0))


def _attends(mask: Tensor) -> Tensor:
    """[..., S or 1, 1]: whether a row attends to anything."""
    return (mask if mask.dtype == torch.bool else mask != _LOWEST).any(-1, keepdim=True)


def _fill_masked_rows(out: Tensor, v: Tensor, mask: Tensor, masked_rows: str) -> Tensor:
    """out [B, H, S, Dv] with the rows that attend to nothing, zeros so far, as `masked_rows` says."""
    if masked_rows == "nan":
        return torch.where(_attends(mask), out, float("nan"))
    if masked_rows == "mean":
        return torch.where(_attends(mask), out, expand_kv(v.mean(2, keepdim=True), out.shape[1]))
    return out


def _written_out(
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
    """The formula as authors write it: products in q's dtype if scores may be rounded to it, the softmax in float32.

    The result lies in memory as that of SDPA's fused kernels does.
    """
    wide = accumulation_dtype(q.dtype)
    dtype = q.dtype if round_scores else wide
    k, v = expand_kv(k, q.shape[1]).to(dtype), expand_kv(v, q.shape[1]).to(dtype)
    scores = _raw_scores(q.to(dtype), k, scale, softcap)
    if is_causal:
        mask = _causal(scores)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(wide).min if masked_rows == "mean" else _LOWEST
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = scores + mask.to(wide)
    probabilities = torch.softmax(scores, -1) if sinks is None else _softmax_beside_sinks(scores, sinks)
    if mask is not None and sinks is None:
        if masked_rows == "zeros":
            probabilities = torch.where(_attends(mask), probabilities, 0.0)
        elif masked_rows == "mean" and mask.dtype != torch.bool:
            probabilities = torch.where(_attends(mask), probabilities, 1.0 / scores.shape[-1])
    probabilities = F.dropout(probabilities.to(dtype), dropout_p, training=dropout_p != 0.0)
    return heads_inside(torch.matmul(probabilities, v).to(q.dtype))


def _softmax_beside_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """The probabilities of the keys in a softmax over the keys and the head's sink."""
    sink = sinks.to(scores.dtype)[:, None, None]
    highest = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
    weights = torch.exp(scores - highest)
    return weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - highest))
