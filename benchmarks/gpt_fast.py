"""A Llama as gpt-fast's authors write one: a compact decoder that is nothing but what torch.compile likes.

q, k and v come from one projection; the caches are written by indexing with the positions; the mask is the rows of a
causal matrix at those positions; keys and values are repeated for the query heads that share them. The tables of the
rotation are kept in the model's dtype.
"""

from __future__ import annotations

import torch
from model_shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_BASE = 500_000.0
EPS = 1e-5


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + EPS)
        return normed.type_as(x) * self.weight


class Cache(nn.Module):
    """Keys and values [batch, kv_heads, length, head_dim]."""

    keys: Tensor
    values: Tensor

    def __init__(self, batch: int, shape: Shape, length: int) -> None:
        super().__init__()
        size = (batch, shape.kv_heads, length, shape.head_dim)
        self.register_buffer("keys", torch.randn(size, dtype=shape.dtype))
        self.register_buffer("values", torch.randn(size, dtype=shape.dtype))

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        return self.keys, self.values


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sizes = [shape.dim, shape.kv_dim, shape.kv_dim]
        self.head_dim, self.shared = shape.head_dim, shape.heads // shape.kv_heads
        self.attention_norm, self.mlp_norm = Norm(shape.dim), Norm(shape.dim)
        self.wqkv = nn.Linear(shape.dim, sum(self.sizes), bias=False)
        self.wo = nn.Linear(shape.dim, shape.dim, bias=False)
        self.w1, self.w3 = (nn.Linear(shape.dim, shape.hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(shape.hidden, shape.dim, bias=False)
        self.cache: Cache | None = None

    def forward(self, x: Tensor, table: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), table, mask, positions)
        y = self.mlp_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))

    def attend(self, x: Tensor, table: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (part.view(batch, length, -1, self.head_dim) for part in self.wqkv(x).split(self.sizes, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, table), rotate(k, table), v))
        if self.cache is not None:
            k, v = self.cache.update(positions, k, v)
        k, v = (part.repeat_interleave(self.shared, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        projected: Tensor = self.wo(y.transpose(1, 2).contiguous().view(batch, length, dim))
        return projected


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Pairs of neighbours turned. x: [batch, length, heads, head_dim]; table: [length, head_dim / 2, (cos, sin)]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = table[..., 0], table[..., 1]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(3).type_as(x)


class Transformer(nn.Module):
    """tokens [batch, length] at positions [length] -> logits [batch, length, vocab_size]."""

    table: Tensor
    causal: Tensor

    def __init__(self, shape: Shape, max_seq_len: int) -> None:
        super().__init__()
        self.shape, self.max_seq_len = shape, max_seq_len
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.dim)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(torch.arange(max_seq_len), ROPE_BASE**-half)
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], -1))
        self.register_buffer("causal", torch.ones(max_seq_len, max_seq_len, dtype=torch.bool).tril())

    def set_up_caches(self, batch: int) -> None:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.cache = Cache(batch, self.shape, self.max_seq_len)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        mask = self.causal[None, None, positions]
        table = self.table[positions]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, table, mask, positions)
        logits: Tensor = self.output(self.norm(x))
        return logits
