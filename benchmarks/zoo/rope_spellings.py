"""Rotations in the spellings that people write them in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.entry import Entry
from zoo.spelled import HEAD, LENGTH, Register, SelfAttention

_EPS = 1e-5


class _Rotary(SelfAttention):
    """Attention whose queries and keys are rotated by a core."""

    def __init__(self, rotate: object) -> None:
        super().__init__(self.attend)
        self.rotate = rotate
        angles = torch.outer(torch.arange(LENGTH).float(), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.register_buffer("cos", angles.cos())  # [T, D / 2]
        self.register_buffer("sin", angles.sin())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.rotate(t, self.cos, self.sin) for t in (q, k))  # type: ignore[operator]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


_rope = Register("rope", _Rotary)


def entries() -> list[Entry]:
    return _rope.entries


# rotations: x [B, H, T, D], cos and sin [T, D / 2]; queries and keys are a site each


@_rope.add(attention=1, rope=2)
def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), dim=-1).to(x.dtype) for t in (cos, sin))
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@_rope.add(attention=1, rope=2)
def rotate_half_by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.repeat(1, 2)[None, None] for t in (cos, sin))
    left, right = x.float().chunk(2, dim=-1)
    return ((x.float() * cos) + (torch.cat((-right, left), dim=-1) * sin)).type_as(x)


@_rope.add(attention=1, rope=2)
def rotate_every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.repeat_interleave(2, dim=-1).to(x.dtype) for t in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos) + (turned * sin)


@_rope.add(attention=1, rope=2)
def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(cos.float(), sin.float())
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


@_rope.add(attention=1, rope=2)
def pairs_stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


@_rope.add(attention=1, rope=2)
def halves_joined(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@_rope.add(attention=1, rope=2)
def halves_turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The other direction: the sine's sign is turned."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


@_rope.add(attention=1, rope=2)
def part_of_a_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :4], x[..., 4:]
    cos, sin = (torch.cat((t[:, :2], t[:, :2]), -1).to(x.dtype) for t in (cos, sin))
    half = torch.cat((-turned[..., 2:], turned[..., :2]), -1)
    return torch.cat((turned * cos + half * sin, rest), dim=-1)


@_rope.add(attention=1, rope=2)
def angles_in_the_graph(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2]).float(), 10.0 ** -torch.arange(0, 1, 2 / HEAD))
    angles = torch.cat((angles, angles), dim=-1)
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat((-right, left), dim=-1) * angles.sin().to(x.dtype)


@_rope.add(attention=1, rope=2, rms_norm=2)
def norm_then_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = F.rms_norm(x, (HEAD,))
    cos, sin = (torch.cat((t, t), dim=-1).to(x.dtype) for t in (cos, sin))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
