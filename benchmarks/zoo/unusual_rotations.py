"""Rotary embeddings as research code spells them now and then, and what only resembles them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.entry import Entry
from zoo.spelled import HEAD, Register, SelfAttention


class _Turned(SelfAttention):
    """Attention whose queries and keys [B, H, T, D] a core rotates."""

    def __init__(self, rotate: object) -> None:
        super().__init__(self.attend)
        self.rotate = rotate
        self.register_buffer("inv_freq", 100.0 ** -torch.arange(0, 1, 2 / HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rotate(q, self.inv_freq), self.rotate(k, self.inv_freq)  # type: ignore[operator]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


_rope = Register("unusual", _Turned)


def entries() -> list[Entry]:
    return _rope.entries


@_rope.add(attention=1, rope=2)
def by_index_of_positions(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2], device=x.device).float()[:, None] * inv_freq.float()
    table = torch.cat((angles, angles), -1)
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


@_rope.add(attention=1, rope=2)
def halves_written_apart(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], dim=-1)


@_rope.add(attention=1, rope=2)
def written_into_empty(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


@_rope.add(attention=1, rope=2)
def matrices_of_two(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    turns = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).unflatten(-1, (2, 2))
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


@_rope.add(attention=1, rope=2)
def signs_and_rolled(x: Tensor, inv_freq: Tensor) -> Tensor:
    """The turned half by roll and a vector of signs."""
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float()).repeat(1, 2)
    half = x.shape[-1] // 2
    sign = torch.cat((-torch.ones(half), torch.ones(half))).to(x)
    return x * angles.cos().to(x.dtype) + torch.roll(x, half, dims=-1) * sign * angles.sin().to(x.dtype)


@_rope.add(attention=1, rope=2)
def scaled_tables(x: Tensor, inv_freq: Tensor) -> Tensor:
    """YaRN: interpolated frequencies, tables times a factor."""
    ramp = torch.linspace(0, 1, inv_freq.shape[0], device=x.device).clamp(0, 1)
    inv_freq = inv_freq.float() / 4 * (1 - ramp) + inv_freq.float() * ramp
    freqs = torch.outer(torch.arange(x.shape[2], device=x.device, dtype=torch.float32), inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = (emb.cos() * 1.1386).to(x.dtype), (emb.sin() * 1.1386).to(x.dtype)
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


@_rope.add(attention=1, rope=4)
def rows_and_columns(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Each half of a head by its own axis."""
    at = torch.arange(x.shape[2], device=x.device)

    def turn(y: Tensor, positions: Tensor) -> Tensor:
        angles = positions.float()[:, None] * inv_freq.float()[: y.shape[-1] // 2]
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        y1, y2 = y.chunk(2, -1)
        return (y * cos + torch.cat((-y2, y1), -1) * sin).to(y.dtype)

    a, b = x.chunk(2, dim=-1)
    return torch.cat((turn(a, at // 3), turn(b, at % 3)), dim=-1)


@_rope.add(attention=1)
def added_sinusoid(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Positions added, nothing turned."""
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    return x + torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype)


@_rope.add(attention=1)
def turned_by_data(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Looks like a rotation, but the second half has the wrong sign."""
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos - a * sin), -1)
