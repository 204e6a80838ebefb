"""Attention in other layouts: latent heads, memories, pixels, windows, caches, crossed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import (
    BATCH,
    DIM,
    HEAD,
    HEADS,
    LENGTH,
    Register,
    SelfAttention,
    image,
    rows,
    tokens_and_more,
)

_plain = Register("attention")
_SCALE = HEAD**-0.5
CACHE = 16


def entries() -> list[Entry]:
    return _plain.entries


@_plain.add(attention=1)
class Latent(nn.Module):
    """Keys and values out of a compressed row, a rotary part that all heads share; v has another size."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, HEADS * 12, bias=False)
        self.down = nn.Linear(DIM, 16 + 4, bias=False)
        self.up = nn.Linear(16, HEADS * (8 + 6), bias=False)
        self.out = nn.Linear(HEADS * 6, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, 12).transpose(1, 2)
        latent, shared = self.down(x).split([16, 4], dim=-1)
        k, v = self.up(latent).view(batch, length, HEADS, 14).transpose(1, 2).split([8, 6], dim=-1)
        k = torch.cat((k, shared.unsqueeze(1).expand(-1, HEADS, -1, -1)), dim=-1)
        weights = (torch.matmul(q, k.transpose(2, 3)) * 12**-0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@_plain.add(inputs=rows, attention=1)
class Memory(nn.Module):
    """Rows read a learned memory that is keys and values at once."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM)
        self.memory = nn.Parameter(torch.randn(12, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.memory.t(), dim=-1) @ self.memory


@_plain.add(attention=1)
class MemoryOfSlots(nn.Module):
    """Learned keys and learned values, one head, three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(12, DIM))
        self.values = nn.Parameter(torch.randn(12, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(torch.matmul(x, self.keys.T) / DIM**0.5, dim=-1) @ self.values


@_plain.add(attention=1)
class Hopfield(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(12, DIM))
        self.value = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(0.5 * (x @ self.patterns.mT), -1) @ self.value(self.patterns)


@_plain.add(attention=1)
class OneHead(nn.Module):
    """Three dimensions, no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / DIM**0.5, dim=2), v)


@_plain.add(inputs=rows, attention=1)
class TwoDimensions(OneHead):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.mm(F.softmax(torch.mm(q, k.t()) / DIM**0.5, dim=1), v)


@_plain.add(attention=1)
def no_projections(x: Tensor) -> Tensor:
    """Keys, values and queries are one tensor."""
    return torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x


@_plain.add(attention=4)
class HeadByHead(nn.Module):
    """Every head is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(DIM, 3 * HEAD, bias=False) for _ in range(HEADS))
        self.register_buffer("tril", torch.tril(torch.ones(LENGTH, LENGTH)))

    def head(self, packed: Tensor) -> Tensor:
        q, k, v = packed.chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) * HEAD**-0.5
        scores = scores.masked_fill(self.tril[: q.shape[1], : q.shape[1]] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(head(x)) for head in self.heads], dim=-1)


@_plain.add(attention=1)
class Packed(nn.Module):
    """timm's ViT: one projection, permuted and unbound."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * HEAD**-0.5) @ k.transpose(-2, -1)
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, dim))


@_plain.add(inputs=tokens_and_more, attention=1)
class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in self.kv(context).chunk(2, -1))
        return ((q @ k.mT * _SCALE).softmax(-1) @ v).transpose(1, 2).flatten(2)


@_plain.add(inputs=tokens_and_more, attention=1)
def dot_product_of_decoder(x: Tensor, encoded: Tensor) -> Tensor:
    """Luong: the encoder's states are keys and values."""
    return torch.bmm(torch.bmm(x, encoded.transpose(1, 2)).softmax(2), encoded)


@_plain.add(attention=1)
class LearnedQueries(nn.Module):
    """Perceiver: a few latents read the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, DIM))
        self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q = self.latents.expand(x.shape[0], -1, -1)
        return torch.softmax(q @ self.k(x).mT / DIM**0.5, -1) @ self.v(x)


@_plain.add(inputs=image, attention=1)
class OverPixels(nn.Module):
    """The attention block of a diffusion UNet: 1x1 convolutions, two baddbmm-like products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(DIM, 3 * DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(x).reshape(batch * HEADS, 3 * HEAD, height * width).chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(HEAD))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return x + torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, height, width)


@_plain.add(inputs=image, attention=1)
class NonLocal(nn.Module):
    """SAGAN: queries by keys, transposed when it is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(DIM, 8, 1), nn.Conv2d(DIM, 8, 1), nn.Conv2d(DIM, DIM, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(2).permute(0, 2, 1)
        attention = torch.softmax(torch.bmm(q, self.k(x).flatten(2)), dim=-1)
        out = torch.bmm(self.v(x).flatten(2), attention.permute(0, 2, 1))
        return self.gamma * out.view_as(x) + x


@_plain.add(inputs=image, attention=2)
class Axial(nn.Module):
    """Along rows, then along columns."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))

    def along(self, x: Tensor, projection: nn.Module) -> Tensor:
        q, k, v = projection(x).chunk(3, -1)
        return torch.softmax(q @ k.mT / DIM**0.5, -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.along(x, self.projections[0])
        x = x.transpose(1, 2)
        return (x + self.along(x, self.projections[1])).permute(0, 3, 2, 1)


def _windows_input() -> Inputs:
    return (torch.randn(BATCH, 4, 4, DIM),), {}


@_plain.add(inputs=_windows_input, attention=1)
class ShiftedWindows(nn.Module):
    """Swin: rolled, cut into windows, with a mask that keeps the regions apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        region = torch.zeros(4, 4)
        region[3:] += 1
        region[:, 3:] += 2
        windows = region.view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
        mask = (windows[:, None, :] != windows[:, :, None]).float() * -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = torch.roll(x, (-1, -1), (1, 2))
        x = x.view(batch, 2, 2, 2, 2, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, DIM)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        attn = (q * _SCALE) @ k.transpose(-2, -1)
        attn = attn.view(batch, 4, HEADS, 4, 4) + self.mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, HEADS, 4, 4).softmax(-1)
        return (attn @ v).transpose(1, 2).reshape(batch, 4, 4, DIM)


def _with_position() -> Inputs:
    return (torch.randn(BATCH, 1, DIM), torch.tensor([7])), {}


class _WithCache(SelfAttention):
    def __init__(self) -> None:
        super().__init__(self.attend)
        self.register_buffer("k_cache", torch.randn(BATCH, HEADS, CACHE, HEAD))
        self.register_buffer("v_cache", torch.randn(BATCH, HEADS, CACHE, HEAD))
        self.register_buffer("causal", torch.tril(torch.ones(CACHE, CACHE, dtype=torch.bool)))
        self.position = torch.zeros(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, position: Tensor) -> Tensor:  # type: ignore[override]
        self.position = position
        return super().forward(x)


@_plain.add(inputs=_with_position, trains=False, attention=1)
class CacheByIndexPut(_WithCache):
    """gpt-fast: the new rows are put into the cache, the mask is a row of a table."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k_cache[:, :, self.position] = k
        self.v_cache[:, :, self.position] = v
        mask = self.causal[None, None, self.position]
        return F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask, dropout_p=0.0)


@_plain.add(inputs=_with_position, trains=False, attention=1)
class CacheByIndexCopy(_WithCache):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k_cache.index_copy_(2, self.position, k)
        self.v_cache.index_copy_(2, self.position, v)
        visible = torch.arange(CACHE, device=q.device) <= self.position
        scores = (q @ self.k_cache.mT * _SCALE).masked_fill(~visible[None, None, None, :], float("-inf"))
        return scores.softmax(-1) @ self.v_cache


def _with_past() -> Inputs:
    return (torch.randn(BATCH, 1, DIM), *(torch.randn(BATCH, HEADS, 7, HEAD) for _ in range(2))), {}


@_plain.add(inputs=_with_past, trains=False, attention=1)
class CacheByConcatenation(SelfAttention):
    def __init__(self) -> None:
        super().__init__(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.past = torch.cat((self.past[0], k), dim=-2), torch.cat((self.past[1], v), dim=-2)
        return torch.softmax(q @ self.past[0].mT * _SCALE, dim=-1) @ self.past[1]

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        self.past = past_k, past_v
        out = super().forward(x)
        return out, *self.past


@_plain.add(attention=1)
class ExtraKeys(SelfAttention):
    """Learned keys and values in front of the sequence's own."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.memory = nn.Parameter(torch.randn(2, HEADS, 3, HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mk, mv = (t.expand(q.shape[0], -1, -1, -1) for t in self.memory)
        k, v = torch.cat((mk, k), -2), torch.cat((mv, v), -2)
        return (torch.einsum("bhid,bhjd->bhij", q, k) * _SCALE).softmax(-1) @ v


@_plain.add(attention=1)
class RelativeShift(SelfAttention):
    """Transformer-XL: distances enter through a second product that is padded and shifted."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.r = nn.Parameter(torch.randn(HEADS, LENGTH, HEAD))
        self.u, self.v_bias = (nn.Parameter(torch.randn(HEADS, 1, HEAD)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        content = (q + self.u) @ k.mT
        distance = (q + self.v_bias) @ self.r.mT
        batch, heads, length, keys = distance.shape
        shifted = F.pad(distance, (1, 0)).view(batch, heads, keys + 1, length)[:, :, 1:].view_as(distance)
        return ((content + shifted) * _SCALE).softmax(-1) @ v


@_plain.add(attention=1, rms_norm=2)
class NormedHeads(SelfAttention):
    """Queries and keys are normalised head by head."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)


@_plain.add(attention=1)
class ReturnsWeights(SelfAttention):
    """The probabilities are a result as well, so that they have to exist."""

    def __init__(self) -> None:
        super().__init__(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.weights = (q @ k.mT * _SCALE).softmax(-1)
        return self.weights @ v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.weights
