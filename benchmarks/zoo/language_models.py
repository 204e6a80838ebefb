"""Decoders of text, written anew in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, tokens

_zoo = Register("language")


def entries() -> list[Entry]:
    return _zoo.entries


def ids() -> Inputs:
    return (torch.randint(1, 50, (BATCH, LENGTH)),), {}


def tokens_and_positions() -> Inputs:
    return (torch.randn(BATCH, LENGTH, DIM), torch.arange(LENGTH).expand(BATCH, LENGTH)), {}


def sequence_first() -> Inputs:
    return (torch.randn(LENGTH, BATCH, DIM),), {}


def _rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=x1.ndim - 1)


@_zoo.add(inputs=sequence_first, attention=1, layer_norm=2, rope=2)
class NeoX(nn.Module):
    """gpt-neox: sequence first, heads packed as q, k, v of each, half of a head rotated, baddbmm, parallel branches."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.query_key_value, self.dense = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.h_to_4h, self.four_h_to_h = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 4, 2).float() / 4))

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        t = torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos()[:, None, None, :], emb.sin()[:, None, None, :]

    def forward(self, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        mixed = self.query_key_value(self.ln1(x)).view(s, b, HEADS, 3 * HEAD)
        q, k, v = torch.split(mixed, HEAD, dim=-1)
        cos, sin = self.tables(s)
        q, q_pass = q[..., :4], q[..., 4:]
        k, k_pass = k[..., :4], k[..., 4:]
        q, k = (q * cos) + (_rotate_half(q) * sin), (k * cos) + (_rotate_half(k) * sin)
        q, k = torch.cat((q, q_pass), dim=-1), torch.cat((k, k_pass), dim=-1)
        q, k = q.view(s, b * HEADS, -1), k.view(s, b * HEADS, -1)
        buffer = torch.empty(b * HEADS, s, s, dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(
            buffer, q.transpose(0, 1), k.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=1.0 / math.sqrt(HEAD)
        ).view(b, HEADS, s, s)
        future = torch.tril(torch.ones((1, s, s), device=x.device)).view(1, 1, s, s) < 0.5
        scores = scores.masked_fill(future, -10000.0)
        probs = torch.softmax(scores, dim=-1).view(b * HEADS, s, s)
        v = v.reshape(s, b * HEADS, -1)
        context = torch.bmm(probs.to(v.dtype), v.transpose(0, 1)).view(b, HEADS, s, HEAD)
        context = context.permute(2, 0, 1, 3).contiguous().view(s, b, DIM)
        return x + self.dense(context) + self.four_h_to_h(F.gelu(self.h_to_4h(self.ln2(x))))


@_zoo.add(attention=1, layer_norm=2)
class Bloom(nn.Module):
    """Bloom: alibi of cumulated padding through baddbmm with beta, a mask filled with the lowest number."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.query_key_value, self.dense = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def alibi(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        slopes = torch.pow(torch.tensor(2 ** (-8 / HEADS)), torch.arange(1, 1 + HEADS))
        arange = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]
        return (slopes[..., None] * arange).reshape(-1, 1, mask.shape[1]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        alibi = self.alibi(torch.ones(b, t), x.dtype)
        fused = self.query_key_value(self.ln1(x)).view(b, t, HEADS, 3, HEAD)
        q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        q = q.transpose(1, 2).reshape(b * HEADS, t, HEAD)
        k = k.permute(0, 2, 3, 1).reshape(b * HEADS, HEAD, t)
        v = v.transpose(1, 2).reshape(b * HEADS, t, HEAD)
        scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=1.0 / math.sqrt(HEAD)).view(b, HEADS, t, t)
        scores = scores.to(torch.float)
        causal = torch.ones(t, t, dtype=torch.bool).triu(1)[None, None]
        scores = torch.masked_fill(scores, causal, torch.finfo(scores.dtype).min)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype).view(b * HEADS, t, t)
        context = torch.bmm(probs, v).view(b, HEADS, t, HEAD).permute(0, 2, 1, 3).reshape(b, t, DIM)
        x = x + self.dense(context)
        y = self.up(self.ln2(x))
        y = y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))
        return x + self.down(y)


@_zoo.add(attention=1, layer_norm=4)
class MosaicPretrained(nn.Module):
    """MPT: norms without bias for queries and keys, values clipped, a bias of distances cut from the right."""

    class LowPrecisionNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), None, self.eps)

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (self.LowPrecisionNorm(DIM) for _ in range(2))
        self.q_ln, self.k_ln = (self.LowPrecisionNorm(DIM) for _ in range(2))
        self.wqkv, self.out_proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up_proj, self.down_proj = nn.Linear(DIM, 64, bias=False), nn.Linear(64, DIM, bias=False)

    def bias(self, length: int, dtype: torch.dtype) -> Tensor:
        distances = torch.arange(1 - 16, 1, dtype=torch.int32).view(1, 1, 1, 16)
        slopes = 1.0 / torch.pow(2, torch.arange(1, HEADS + 1, dtype=torch.float32).mul(8 / HEADS))
        bias = (distances * slopes.view(1, HEADS, 1, 1)).to(dtype)
        return bias[:, :, :, max(0, bias.size(-1) - length) :]

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.wqkv(self.norm_1(x)).clamp(min=-8, max=8)
        query, key, value = qkv.chunk(3, dim=2)
        query, key = self.q_ln(query), self.k_ln(key)
        b, s, _ = query.shape
        q = query.reshape(b, s, HEADS, HEAD).permute(0, 2, 1, 3)
        k = key.reshape(b, s, HEADS, HEAD).permute(0, 2, 3, 1)
        v = value.reshape(b, s, HEADS, HEAD).permute(0, 2, 1, 3)
        weight = q.matmul(k) * (1 / math.sqrt(HEAD))
        weight = weight + self.bias(s, x.dtype)
        causal = weight.new_ones(s, s, dtype=torch.float32).tril().to(torch.bool).logical_not()
        weight = weight.masked_fill(causal.view(1, 1, s, s), torch.finfo(q.dtype).min)
        out = torch.softmax(weight, dim=-1).to(v.dtype).matmul(v)
        x = x + self.out_proj(out.permute(0, 2, 1, 3).reshape(b, s, DIM))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm_2(x))))


class _GemmaNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1 + self.weight.float())).type_as(x)


@_zoo.add(attention=1, rms_norm=6, swiglu=1, rope=2)
class GemmaInTorch(nn.Module):
    """gemma_pytorch: halves as a complex number, written by index to a cache, softcap, local window, post-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: _GemmaNorm(DIM) for name in ("pre", "post", "pre_ffw", "post_ffw")})
        self.query_norm, self.key_norm = _GemmaNorm(HEAD), _GemmaNorm(HEAD)
        self.qkv_proj, self.o_proj = nn.Linear(DIM, (HEADS + 2 * 2) * HEAD, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(DIM, 48), nn.Linear(DIM, 48)
        self.down_proj = nn.Linear(48, DIM)
        freqs = torch.outer(torch.arange(16).float(), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.turns = torch.polar(torch.ones_like(freqs), freqs)

    def rotary(self, x: Tensor, turns: Tensor) -> Tensor:
        x_ = torch.view_as_complex(torch.stack(torch.chunk(x.transpose(1, 2).float(), 2, dim=-1), dim=-1))
        x_out = torch.view_as_real(x_ * turns).type_as(x)
        x_out = torch.cat(torch.chunk(x_out, 2, dim=-1), dim=-2)
        return x_out.reshape(x_out.shape[0], x_out.shape[1], x_out.shape[2], -1).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        index = torch.arange(t, device=x.device)
        q, k, v = self.qkv_proj(x).split([HEADS * HEAD, 2 * HEAD, 2 * HEAD], dim=-1)
        q, k, v = q.view(b, -1, HEADS, HEAD), k.view(b, -1, 2, HEAD), v.view(b, -1, 2, HEAD)
        q, k = self.query_norm(q), self.key_norm(k)
        turns = self.turns.index_select(0, index)
        q, k = self.rotary(q, turns), self.rotary(k, turns)
        key = torch.zeros(b, 12, 2, HEAD, dtype=x.dtype).index_copy_(1, index, k)
        value = torch.zeros(b, 12, 2, HEAD, dtype=x.dtype).index_copy_(1, index, v)
        key, value = torch.repeat_interleave(key, 2, dim=2), torch.repeat_interleave(value, 2, dim=2)
        q, k, v = q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        q.mul_(HEAD**-0.5)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = torch.tanh(scores / 50.0) * 50.0
        mask = torch.full((1, 1, 12, 12), -2.3819763e38).to(torch.float)
        mask = torch.triu(mask, diagonal=1)
        local = mask + torch.tril(torch.full((1, 1, 12, 12), -2.3819763e38), diagonal=-4)
        scores = scores + local.index_select(2, index)
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.o_proj(torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms["post"](self.attend(self.norms["pre"](x)))
        y = self.norms["pre_ffw"](x)
        y = self.down_proj(F.gelu(self.gate_proj(y), approximate="tanh") * self.up_proj(y))
        return x + self.norms["post_ffw"](y)


@_zoo.add(attention=2, rms_norm=8, swiglu=2, rope=4)
class OlmoTwo(nn.Module):
    """OLMo 2: norms of whole queries and keys and of the branches' results, rotation without autocast."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(DIM))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(enabled=False, device_type=x.device.type):
                og_dtype = x.dtype
                x = x.to(torch.float32)
                variance = x.pow(2).mean(-1, keepdim=True)
                x = x * torch.rsqrt(variance + 1e-6)
                x = x.to(og_dtype)
            return self.weight * x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm, self.k_norm, self.attn_norm, self.ff_norm = (OlmoTwo.Norm() for _ in range(4))
            self.att_proj, self.attn_out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
            self.ff_proj, self.ff_out = nn.Linear(DIM, 96, bias=False), nn.Linear(48, DIM, bias=False)

        def rotate_half(self, x: Tensor) -> Tensor:
            b, nh, t, hs = x.size()
            x = x.view(b, nh, t, 2, hs // 2)
            x1, x2 = x.unbind(dim=-2)
            return torch.cat((-x2, x1), dim=-1)

        def rotary(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                dim = x.shape[-1]
                inv_freq = 1.0 / (100 ** (torch.arange(0, dim, 2, device=x.device, dtype=torch.float) / dim))
                seq = torch.arange(x.shape[-2], device=x.device, dtype=torch.float)
                freqs = torch.einsum("i , j -> i j", seq, inv_freq)
                positions = torch.cat((freqs, freqs), dim=-1)
                sin, cos = positions.sin()[None, None, :, :], positions.cos()[None, None, :, :]
                x_ = x.float()
                return ((x_ * cos.type_as(x_)) + (self.rotate_half(x_) * sin.type_as(x_))).to(x.dtype).type_as(x)

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.size()
            q, k, v = self.att_proj(x).split((DIM, DIM, DIM), dim=-1)
            q, k = self.q_norm(q).to(dtype=q.dtype), self.k_norm(k).to(dtype=k.dtype)
            q, k, v = (z.view(b, t, HEADS, c // HEADS).transpose(1, 2) for z in (q, k, v))
            att = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, dropout_p=0.0, is_causal=True)
            x = x + self.attn_norm(self.attn_out(att.transpose(1, 2).contiguous().view(b, t, c)))
            y, gate = self.ff_proj(x).chunk(2, dim=-1)
            return x + self.ff_norm(self.ff_out(F.silu(gate) * y))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@_zoo.add(attention=1, rms_norm=2, swiglu=1, rope=2)
class LitGpt(nn.Module):
    """lit-gpt: groups side by side in the projection, part of a head rotated, a mean square written as x * x."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.proj = nn.Linear(DIM, (HEADS + 4) * HEAD), nn.Linear(DIM, DIM)
        self.norm_1, self.norm_2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))
        self.fc_1, self.fc_2, self.mlp_proj = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)
        theta = 1.0 / (100 ** (torch.arange(0, 4, 2).float() / 4))
        idx_theta = torch.outer(torch.arange(LENGTH), theta).repeat(1, 2)
        self.register_buffer("cos", idx_theta.cos(), persistent=False)
        self.register_buffer("sin", idx_theta.sin(), persistent=False)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        norm_x = torch.mean(x * x, dim=-1, keepdim=True)
        x_normed = x * torch.rsqrt(norm_x + 1e-5)
        return x_normed.to(dtype=dtype) * weight

    def rope(self, x: Tensor) -> Tensor:
        head_size = x.size(-1)
        x1, x2 = x[..., : head_size // 2], x[..., head_size // 2 :]
        rotated = torch.cat((-x2, x1), dim=-1)
        return ((x * self.cos) + (rotated * self.sin)).to(dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        qkv = self.attn(self.norm(x, self.norm_1))
        qkv = qkv.view(b, t, 2, 4, HEAD).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((2, 1, 1), dim=2)
        k, v = k.expand(b, 2, 2, t, HEAD), v.expand(b, 2, 2, t, HEAD)
        q, k, v = q.reshape(b, -1, t, HEAD), k.reshape(b, -1, t, HEAD), v.reshape(b, -1, t, HEAD)
        q = torch.cat((self.rope(q[..., :4]), q[..., 4:]), dim=-1)
        k = torch.cat((self.rope(k[..., :4]), k[..., 4:]), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=HEAD**-0.5, is_causal=True)
        x = self.proj(y.transpose(1, 2).reshape(b, t, c)) + x
        y = self.norm(x, self.norm_2)
        return self.mlp_proj(F.silu(self.fc_1(y)) * self.fc_2(y)) + x


@_zoo.add(inputs=tokens_and_positions, attention=1, rope=2)
class GeneralLanguageModel(nn.Module):
    """ChatGLM 2: half of a head turned by pairs from a cache of cosines and sines, one stack and flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(DIM, DIM + 4 * HEAD), nn.Linear(DIM, DIM, bias=False)
        theta = 1.0 / (100 ** (torch.arange(0, 4, 2).float() / 4))
        angles = torch.outer(torch.arange(16).float(), theta)
        self.register_buffer("rope_cache", torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1))

    def rotary(self, x: Tensor, cache: Tensor) -> Tensor:
        b, sq, np, _ = x.shape
        rot = cache.shape[-2] * 2
        x, x_pass = x[..., :rot], x[..., rot:]
        pairs = x.reshape(b, sq, np, rot // 2, 2)
        cache = cache.view(b, sq, 1, pairs.size(3), 2)
        out = torch.stack(
            [
                pairs[..., 0] * cache[..., 0] - pairs[..., 1] * cache[..., 1],
                pairs[..., 1] * cache[..., 0] + pairs[..., 0] * cache[..., 1],
            ],
            -1,
        )
        return torch.cat((out.flatten(3), x_pass), dim=-1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split([DIM, 2 * HEAD, 2 * HEAD], dim=-1)
        q, k, v = q.view(b, t, HEADS, HEAD), k.view(b, t, 2, HEAD), v.view(b, t, 2, HEAD)
        cache = self.rope_cache[positions]
        q, k = self.rotary(q, cache), self.rotary(k, cache)
        k = k.unsqueeze(-2).expand(-1, -1, -1, 2, -1).contiguous().view(b, t, HEADS, HEAD)
        v = v.unsqueeze(-2).expand(-1, -1, -1, 2, -1).contiguous().view(b, t, HEADS, HEAD)
        q, k, v = (z.permute(0, 2, 1, 3) for z in (q, k, v))
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        out = F.scaled_dot_product_attention(q, k, v, ~(~mask))
        return self.dense(out.permute(0, 2, 1, 3).reshape(b, t, DIM))


@_zoo.add(inputs=ids, attention=2, layer_norm=5)
class MinimalGpt(nn.Module):
    """minGPT before its packed projection: key, query, value; dropout modules; a mask sliced from a buffer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.query, self.value, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))
            self.ln1, self.ln2, self.drop = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.Dropout(0.0)
            self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM), nn.Dropout(0.0))
            self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.size()
            y = self.ln1(x)
            k = self.key(y).view(b, t, HEADS, c // HEADS).transpose(1, 2)
            q = self.query(y).view(b, t, HEADS, c // HEADS).transpose(1, 2)
            v = self.value(y).view(b, t, HEADS, c // HEADS).transpose(1, 2)
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.mask[:, :, :t, :t] == 0, -1e10)
            att = self.drop(F.softmax(att, dim=-1))
            y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
            x = x + self.drop(self.proj(y))
            return x + self.mlp(self.ln2(x))

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(50, DIM), nn.Parameter(torch.zeros(1, 16, DIM))
        self.blocks = nn.Sequential(*(self.Block() for _ in range(2)))
        self.ln_f, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.ln_f(self.blocks(self.tok(ids) + self.pos[:, : ids.shape[1], :])))


@_zoo.add(inputs=tokens, rms_norm=2, swiglu=2, attention=1, rope=2)
class FlexibleBlock(nn.Module):
    """x-transformers: cosine-free rotary of float positions, causal by numbers, value gates, a gated feedforward."""

    def __init__(self) -> None:
        super().__init__()
        self.g1, self.g2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.to_v_gate = nn.Linear(DIM, DIM)
        self.proj_in, self.proj_out = nn.Linear(DIM, 128), nn.Linear(64, DIM)
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, HEAD, 2).float() / HEAD)))

    def norm(self, x: Tensor, g: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * DIM**0.5 * g

    def rotate(self, t: Tensor, freqs: Tensor) -> Tensor:
        x1, x2 = t.unflatten(-1, (-1, 2)).unbind(dim=-1)
        half = torch.stack((-x2, x1), dim=-1).flatten(-2)
        return t * freqs.cos() + half * freqs.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        t = torch.arange(n, device=x.device).type_as(self.inv_freq)
        freqs = torch.einsum("... i , j -> ... i j", t, self.inv_freq)
        freqs = torch.stack((freqs, freqs), dim=-1).flatten(-2)
        y = self.norm(x, self.g1)
        q, k, v = (p(y).reshape(b, n, HEADS, HEAD).permute(0, 2, 1, 3) for p in (self.to_q, self.to_k, self.to_v))
        q, k = self.rotate(q, freqs), self.rotate(k, freqs)
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * HEAD**-0.5
        i, j = sim.shape[-2:]
        causal = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        attn = F.softmax(sim, dim=-1, dtype=torch.float32).type(sim.dtype)
        out = torch.einsum("b h i j, b h j d -> b h i d", attn, v).permute(0, 2, 1, 3).reshape(b, n, -1)
        x = x + self.to_out(out * self.to_v_gate(y).sigmoid())
        y, gate = self.proj_in(self.norm(x, self.g2)).chunk(2, dim=-1)
        return x + self.proj_out(y * F.silu(gate))
