"""Blocks of published language models, in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, split_heads

_zoo = Register("published")


def entries() -> list[Entry]:
    return _zoo.entries


def _ids() -> Inputs:
    return (torch.randint(0, 50, (BATCH, LENGTH)),), {}


@_zoo.add(inputs=_ids, attention=2, layer_norm=5)
class NanoGpt(nn.Module):
    """Learned positions, pre-norm, the flash branch off, GELU, tied head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(DIM, bias=False), nn.LayerNorm(DIM)
            self.c_attn, self.c_proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            self.c_fc, self.c_out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
            self.attn_dropout = nn.Dropout(0.0)
            self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.size()
            q, k, v = self.c_attn(self.ln_1(x)).split(DIM, dim=2)
            q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
            x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
            return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, DIM), nn.Embedding(16, DIM)
        self.blocks, self.ln_f = nn.ModuleList(self.Block() for _ in range(2)), nn.LayerNorm(DIM)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


class _MetaNorm(nn.Module):
    """Meta's Llama."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eps, self.weight = 1e-5, nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


@_zoo.add(inputs=_ids, attention=2, rms_norm=5, swiglu=2, rope=4)
class MetaLlama(nn.Module):
    """Complex rotations, two key heads, a mask of triu, softmax in float."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.ffn_norm = _MetaNorm(DIM), _MetaNorm(DIM)
            self.wq, self.wo = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
            self.wk, self.wv = nn.Linear(DIM, 2 * HEAD, bias=False), nn.Linear(DIM, 2 * HEAD, bias=False)
            self.w1, self.w3 = nn.Linear(DIM, 48, bias=False), nn.Linear(DIM, 48, bias=False)
            self.w2 = nn.Linear(48, DIM, bias=False)

        def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)

        def forward(self, x: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
            b, t, _ = x.shape
            y = self.attention_norm(x)
            q = self.rotate(self.wq(y).view(b, t, HEADS, HEAD), turns)
            k = self.rotate(self.wk(y).view(b, t, 2, HEAD), turns)
            v = self.wv(y).view(b, t, 2, HEAD)
            k, v = (z[:, :, :, None, :].expand(b, t, 2, 2, HEAD).reshape(b, t, HEADS, HEAD) for z in (k, v))
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD)
            scores = F.softmax((scores + mask).float(), dim=-1).type_as(q)
            h = x + self.wo(torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, t, -1))
            y = self.ffn_norm(h)
            return h + self.w2(F.silu(self.w1(y)) * self.w3(y))

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, DIM), _MetaNorm(DIM)
        self.layers, self.output = nn.ModuleList(self.Block() for _ in range(2)), nn.Linear(DIM, 50, bias=False)
        angles = torch.outer(torch.arange(16).float(), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        length = ids.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf"), device=ids.device), diagonal=1).type_as(h)
        for layer in self.layers:
            h = layer(h, self.turns[:length], mask)
        return self.output(self.norm(h))


@_zoo.add(attention=1, layer_norm=1)
class LowRankAttention(nn.Module):
    """Linformer: keys and values are projected along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.e, self.f = nn.Parameter(torch.randn(LENGTH, 3)), nn.Parameter(torch.randn(LENGTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        k, v = torch.einsum("bnd,nk->bkd", k, self.e), torch.einsum("bnd,nk->bkd", v, self.f)
        q, k, v = split_heads(q), split_heads(k), split_heads(v)
        weights = (torch.einsum("bhnd,bhkd->bhnk", q, k) * HEAD**-0.5).softmax(dim=-1)
        return x + self.out(torch.einsum("bhnk,bhkd->bhnd", weights, v).transpose(1, 2).reshape(x.shape))


@_zoo.add(layer_norm=1, swiglu=1)
class ResidualGating(nn.Module):
    """The gated residual network of temporal fusion: ELU, GLU, norm of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.glu = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.glu(self.glu(self.fc2(F.elu(self.fc1(x)))), dim=-1))


@_zoo.add(layer_norm=1, swiglu=1)
class SpatialGating(nn.Module):
    """A gated branch whose other half is mixed along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(DIM, 64), nn.Linear(32, DIM), nn.LayerNorm(32)
        self.mix = nn.Linear(LENGTH, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x).chunk(2, dim=-1)
        v = self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(u) * v)


@_zoo.add(attention=1, rms_norm=2, swiglu=1, rope=2)
class GemmaLike(nn.Module):
    """Offsets in the norms' weights, scaled embeddings, a softcap, GELU by tanh, one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))
        self.q, self.kv, self.o = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, 2 * HEAD), nn.Linear(DIM, DIM)
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1 + weight.float())).type_as(x)

    def rotate(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2], device=x.device).float()
        angles = torch.outer(positions, 100.0 ** -torch.arange(0, 1, 2 / HEAD, device=x.device))
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)
        turned = torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), dim=-1)
        return (x * cos + turned * sin).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.tensor(DIM**0.5, dtype=x.dtype)
        y = self.norm(x, self.norm1)
        k, v = self.kv(y).split(HEAD, dim=-1)
        q, k, v = self.rotate(split_heads(self.q(y))), self.rotate(split_heads(k, 1)), split_heads(v, 1)
        k, v = k.repeat_interleave(HEADS, 1), v.repeat_interleave(HEADS, 1)
        scores = torch.matmul(q, k.mT) * HEAD**-0.5
        scores = torch.tanh(scores / 50.0) * 50.0
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().logical_not()
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores.float(), dim=-1).type_as(q)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        y = self.norm(x, self.norm2)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


@_zoo.add(swiglu=2, rms_norm=1)
class StateSpaceLike(nn.Module):
    """A gated recurrence: a short convolution, a scan by cumulative sums, the result gated and normed."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(DIM, 128), nn.Linear(64, DIM)
        self.conv, self.decay = nn.Conv1d(64, 64, 3, padding=2, groups=64), nn.Linear(DIM, 64)
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        h, z = self.in_proj(x).chunk(2, dim=-1)
        h = F.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        h = torch.cumsum(h * torch.sigmoid(self.decay(x)), dim=1)
        h = (h * F.silu(z)).float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.out_proj(self.weight * h.to(x.dtype))


@_zoo.add(attention=1, rms_norm=2)
class UnitLengthHeads(nn.Module):
    """Normed queries and keys with a learned temperature, as in diffusion UNets on one-dimensional positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(HEAD)), nn.Parameter(torch.ones(HEAD))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        q = F.rms_norm(q.float(), (HEAD,), self.q_scale.float(), 1e-6).to(q.dtype)
        k = F.rms_norm(k.float(), (HEAD,), self.k_scale.float(), 1e-6).to(k.dtype)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out(out.permute(0, 2, 1, 3).reshape(x.shape))


@_zoo.add(attention=1)
class ScoresWithSmear(nn.Module):
    """Long sums in the scores: a content term, a bias of each side and a bias of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.left, self.right = nn.Parameter(torch.randn(HEADS, HEAD)), nn.Parameter(torch.randn(HEADS, HEAD))
        self.distance = nn.Parameter(torch.randn(2 * LENGTH - 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x))
        steps = torch.arange(LENGTH)
        bias = self.distance[(steps[:, None] - steps[None, :]) + LENGTH - 1]
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) + torch.einsum("bhkd,hd->bhk", k, self.left)[:, :, None]
        scores = (scores + torch.einsum("bhqd,hd->bhq", q, self.right)[..., None] + bias) / HEAD**0.5
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v).transpose(1, 2).flatten(2)


@_zoo.add()
class KernelAttention(nn.Module):
    """Performer: random features of exponentials, no softmax over keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.register_buffer("features", torch.randn(HEAD, 12))

    def kernel(self, x: Tensor) -> Tensor:
        x = x * HEAD**-0.25
        return torch.exp(x @ self.features - x.pow(2).sum(-1, keepdim=True) / 2) + 1e-4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.kernel(q), self.kernel(k)
        total = torch.einsum("bhnf,bhf->bhn", q, k.sum(dim=-2)).reciprocal()
        out = torch.einsum("bhfd,bhnf,bhn->bhnd", torch.einsum("bhnf,bhnd->bhfd", k, v), q, total)
        return out.transpose(1, 2).flatten(2)
