"""Attention as authors spell it, torch's own kernels by name, FlashAttention-3, and a reference that fits in memory."""

from __future__ import annotations

import torch
from harness import Function, Impl
from implementations import optional
from rope import require_kernels
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_ROWS = 512  # of queries whose scores the reference holds at a time

BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def expand(kv: Tensor, heads: int) -> Tensor:
    return kv.repeat_interleave(heads // kv.shape[1], 1)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, softcap: float = 0.0
) -> Tensor:
    """The definition, a block of queries at a time. mask: bool or added, broadcastable to [B, H, S, T]."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    k, v = expand(k, heads), expand(v, heads)
    blocks = []
    for first in range(0, queries, _ROWS):
        rows = slice(first, min(first + _ROWS, queries))
        scores = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if is_causal:
            hidden = torch.arange(keys, device=q.device) > torch.arange(queries, device=q.device)[rows, None]
            scores.masked_fill_(hidden, float("-inf"))
        if mask is not None:
            part = mask.expand(*mask.shape[:2], queries, keys)[:, :, rows]
            scores = scores.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else scores.add_(part)
        blocks.append(scores.softmax(-1) @ v)
    return torch.cat(blocks, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def with_backend(name: str, function: Function) -> Impl:
    """`function` where SDPA may take one backend alone."""

    def run(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return function(*tensors)  # type: ignore[return-value]

    return Impl(name, lambda: run)


def hand_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers' eager attention: K and V repeated, an additive mask, the softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (
        kv[:, :, None].expand(-1, -1, groups, -1, -1).reshape(kv.shape[0], q.shape[1], *kv.shape[2:]) for kv in (k, v)
    )
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def hand_written_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nanoGPT's: a triangle of the scores is filled with minus infinity."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    seen = torch.tril(torch.ones(length, length, dtype=torch.bool, device=q.device))
    return F.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v


def flash_attention_3(is_causal: bool) -> Impl:
    """Of the package fa3-fwd or of a flash_attn_interface that the user has built; [B, T, H, D]."""

    def prepare() -> Function:
        try:
            module = optional("fa3_fwd_interface")
        except Exception:
            module = optional("flash_attn_interface")

        def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            out = module.flash_attn_func(q, k, v, causal=is_causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return Impl("flash-attention-3", prepare)


def forward_kernel(name: str = "infuse-kernel", *, is_causal: bool = False, map_given: bool = False) -> Impl:
    """The raw kernel and no compiler around it. map_given: the map of the mask's tiles is made before, once a mask."""

    def prepare() -> Function:
        require_kernels()
        kernels = optional("infuse.ops.attention_kernels")
        maps: dict[int, Tensor] = {}

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
            found = None
            if mask is not None:
                found = maps.get(mask.data_ptr()) if map_given else None
                found = kernels.tile_map(mask, q.shape[2], k.shape[2]) if found is None else found
                maps[mask.data_ptr()] = found
            scale = q.shape[-1] ** -0.5
            return kernels.forward(q, k, v, mask, found, None, out, scale=scale, is_causal=is_causal)  # type: ignore[no-any-return]

        return run

    return Impl(name, prepare, note="the operator, not compiled")
