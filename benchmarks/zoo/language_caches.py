"""Decoders of text with caches, latent caches, experts and packed documents, in the manner of their reference code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.language_encoders import T5Norm
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register

_zoo = Register("language")


def entries() -> list[Entry]:
    return _zoo.entries


def ragged() -> Inputs:
    return (torch.randn(2 * LENGTH, DIM), torch.tensor([0] * 4 + [1] * 5 + [2] * 3)), {}


class _Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(BATCH, 2, 12, HEAD))
        self.register_buffer("v_cache", torch.zeros(BATCH, 2, 12, HEAD))
        self.register_buffer("mask", torch.tril(torch.ones(12, 12, dtype=torch.bool)))
        self.wqkv, self.wo = nn.Linear(DIM, (HEADS + 4) * HEAD, bias=False), nn.Linear(DIM, DIM, bias=False)


def _one_position() -> Inputs:
    return (torch.randn(BATCH, 1, DIM), torch.tensor([5])), {}


@_zoo.add(inputs=_one_position, trains=False, attention=1, rope=2)
class GptFast(_Cached):
    """gpt-fast: a cache written by position, rows of a causal buffer, pairs stacked and flattened."""

    def __init__(self) -> None:
        super().__init__()
        freqs = torch.outer(torch.arange(12).float(), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        turns = torch.polar(torch.ones_like(freqs), freqs)
        self.register_buffer("freqs_cis", torch.stack([turns.real, turns.imag], dim=-1))

    def rotary(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        shaped = x.float().reshape(*x.shape[:-1], -1, 2)
        freqs_cis = freqs_cis.view(1, shaped.size(1), 1, shaped.size(3), 2)
        out = torch.stack(
            [
                shaped[..., 0] * freqs_cis[..., 0] - shaped[..., 1] * freqs_cis[..., 1],
                shaped[..., 1] * freqs_cis[..., 0] + shaped[..., 0] * freqs_cis[..., 1],
            ],
            -1,
        )
        return out.flatten(3).type_as(x)

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        b, t, _ = x.shape
        mask = self.mask[None, None, input_pos]
        freqs_cis = self.freqs_cis[input_pos]
        q, k, v = self.wqkv(x).split([DIM, 2 * HEAD, 2 * HEAD], dim=-1)
        q, k, v = q.view(b, t, HEADS, HEAD), k.view(b, t, 2, HEAD), v.view(b, t, 2, HEAD)
        q, k = self.rotary(q, freqs_cis), self.rotary(k, freqs_cis)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        k, v = self.k_cache.repeat_interleave(2, dim=1), self.v_cache.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, DIM))


@_zoo.add(inputs=_one_position, trains=False, attention=1)
class RollingCache(_Cached):
    """mistral-inference in little: positions modulo the window, the oldest entries turned to the front."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.wqkv(x).split([DIM, 2 * HEAD, 2 * HEAD], dim=-1)
        k, v = torch.roll(self.k_cache, -1, 2), torch.roll(self.v_cache, -1, 2)
        new_k, new_v = (z.view(b, t, 2, HEAD).transpose(1, 2) for z in self.wqkv(x)[..., DIM:].chunk(2, -1))
        k, v = torch.cat([k[:, :, :-1], new_k], 2), torch.cat([v[:, :, :-1], new_v], 2)
        q = q.view(b, t, 2, 2, HEAD).permute(0, 2, 3, 1, 4)
        scores = torch.einsum("bgrqd,bgkd->bgrqk", q, k) * HEAD**-0.5
        visible = torch.arange(12, device=x.device) >= 12 - 1 - positions
        scores = scores.masked_fill(~visible, float("-inf"))
        out = torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), v)
        return self.wo(out.permute(0, 3, 1, 2, 4).reshape(b, t, DIM))


def _paged() -> Inputs:
    return (torch.randn(BATCH, 1, DIM), torch.tensor([[0, 3], [2, 5]]), torch.tensor([5, 7])), {}


@_zoo.add(inputs=_paged, trains=False, attention=1)
class PagedCache(nn.Module):
    """Pages of four keys, gathered by a table, their tails masked by lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(6, 4, 2, HEAD))
        self.register_buffer("values", torch.randn(6, 4, 2, HEAD))
        self.q_proj, self.o_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        b = x.shape[0]
        k = self.keys[table].reshape(b, -1, 2, HEAD).transpose(1, 2)
        v = self.values[table].reshape(b, -1, 2, HEAD).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        q = self.q_proj(x).view(b, 1, HEADS, HEAD).transpose(1, 2)
        scores = (q @ k.mT) / HEAD**0.5
        valid = torch.arange(k.shape[2], device=x.device)[None, :] < lengths[:, None]
        scores = torch.where(valid[:, None, None, :], scores, -float("inf"))
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, 1, DIM))


@_zoo.add(attention=1, rms_norm=3, swiglu=3, rope=2, discrete=True)
class LatentExperts(nn.Module):
    """DeepSeek V2: latents of queries and keys, one rotated key for all heads, shared experts, experts by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.q_norm, self.q_b = nn.Linear(DIM, 16, bias=False), T5Norm(16), nn.Linear(16, HEADS * 12)
        self.kv_a, self.kv_norm, self.kv_b = nn.Linear(DIM, 16 + 4), T5Norm(16), nn.Linear(16, HEADS * 16, bias=False)
        self.o, self.norm = nn.Linear(DIM, DIM, bias=False), T5Norm()
        self.gate = nn.Linear(DIM, 2, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(DIM, 24), "w3": nn.Linear(DIM, 24), "w2": nn.Linear(24, DIM)})
            for _ in range(3)
        )
        freqs = torch.outer(torch.arange(LENGTH).float(), 100.0 ** -torch.arange(0, 1, 0.5))
        self.turns = torch.polar(torch.ones_like(freqs), freqs)

    def rotary(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        y = torch.view_as_real(x * self.turns.view(1, x.size(1), 1, x.size(-1))).flatten(3)
        return y.to(dtype)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.size()
        q = self.q_b(self.q_norm(self.q_a(x))).view(b, t, HEADS, 12)
        q_nope, q_pe = torch.split(q, [8, 4], dim=-1)
        kv, k_pe = torch.split(self.kv_a(x), [16, 4], dim=-1)
        k_pe = self.rotary(k_pe.unsqueeze(2))
        q = torch.cat([q_nope, self.rotary(q_pe)], dim=-1)
        k_nope, v = torch.split(self.kv_b(self.kv_norm(kv)).view(b, t, HEADS, 16), [8, 8], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, -1, HEADS, -1)], dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * 12**-0.5
        mask = torch.full((t, t), float("-inf"), device=x.device).triu_(1)
        scores += mask.unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        return self.o(torch.einsum("bsht,bthd->bshd", scores, v).flatten(2))

    def expert(self, i: int, x: Tensor) -> Tensor:
        parts: Any = self.experts[i]
        return parts["w2"](F.silu(parts["w1"](x)) * parts["w3"](x))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        y = self.norm(x).flatten(0, 1)
        weights = self.gate(y).softmax(dim=-1, dtype=torch.float32).type_as(y)
        routed = sum(weights[:, i, None] * self.expert(i, y) for i in range(2))
        return x + (routed + self.expert(2, y)).view_as(x)


@_zoo.add(attention=1, rope=2)
class AbsorbedLatent(nn.Module):
    """DeepSeek V3 at decoding: projections of keys and values absorbed, two products of scores added."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv_a = nn.Linear(DIM, HEADS * 12), nn.Linear(DIM, 16 + 4)
        self.wkv_b, self.wo = nn.Linear(16, HEADS * 16, bias=False), nn.Linear(DIM, DIM)
        self.kv_weight = nn.Parameter(torch.ones(16))
        freqs = torch.outer(torch.arange(LENGTH).float(), 100.0 ** -torch.arange(0, 1, 0.5))
        self.register_buffer("cos", freqs.cos())
        self.register_buffer("sin", freqs.sin())

    def rotary(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[:, None], self.sin[:, None]
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q_nope, q_pe = self.wq(x).view(b, t, HEADS, 12).split([8, 4], -1)
        kv, k_pe = self.wkv_a(x).split([16, 4], -1)
        q_pe, k_pe = self.rotary(q_pe), self.rotary(k_pe[:, :, None])[:, :, 0]
        wkv_b = self.wkv_b.weight.view(HEADS, -1, 16)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :8])
        scores = torch.einsum("bshc,btc->bsht", q_nope, kv) + torch.einsum("bshr,btr->bsht", q_pe, k_pe)
        scores = (scores * 12**-0.5).softmax(dim=-1, dtype=torch.float32).type_as(x)
        out = torch.einsum("bsht,btc->bshc", scores, kv)
        return self.wo(torch.einsum("bshc,hdc->bshd", out, wkv_b[:, 8:]).flatten(2))


@_zoo.add(inputs=ragged, attention=1, swiglu=1)
class PackedDocuments(nn.Module):
    """Documents end to end without a batch, kept apart by their numbers and causal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.w1w3, self.w2 = nn.Linear(DIM, 96, bias=False), nn.Linear(48, DIM, bias=False)

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = self.qkv(x).view(n, 3, HEADS, HEAD).permute(1, 2, 0, 3)
        scores = torch.matmul(q, k.transpose(1, 2)) * HEAD**-0.5
        at = torch.arange(n, device=x.device)
        allowed = (document[:, None] == document[None, :]) & (at[:, None] >= at[None, :])
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        x = x + self.out(torch.matmul(scores.softmax(-1), v).transpose(0, 1).flatten(1))
        gate, up = self.w1w3(x).unflatten(-1, (2, 48)).unbind(-2)
        return x + self.w2(F.silu(gate) * up)
