"""Rotary embeddings as models spell them: each function of x [.., T, D], cos and sin is one site."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

HEADS, DIM, LENGTH = 3, 8, 5
Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rotated(nn.Module):
    """A projection to heads, and what is done with them. width: of cos and sin, [T, width] or [B, 1, T, width].

    heads_first: x is [B, H, T, D], otherwise [B, T, H, D], with cos and sin [T, 1, width]. table: their dtype if it is
    not x's.
    """

    def __init__(
        self, rope: Rope, width: int = DIM, *, heads_first: bool = True, table: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.rope, self.heads_first, self.table = rope, heads_first, table
        self.proj = nn.Linear(DIM, HEADS * DIM, bias=False)
        angles = torch.randn(LENGTH, width)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        heads = self.proj(x).view(*x.shape[:-1], HEADS, DIM)
        cos, sin = (table.to(self.table or x.dtype) for table in (self.cos, self.sin))
        if self.heads_first:
            return self.rope(heads.transpose(1, 2), cos, sin)
        return self.rope(heads, cos[:, None], sin[:, None])


def tokens(dtype: torch.dtype, training: bool = False) -> Tensor:
    return torch.randn(2, LENGTH, DIM, dtype=dtype, requires_grad=training)


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def chunked(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second * -1, first], -1)


def split(x: Tensor) -> Tensor:
    first, second = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.cat([torch.neg(second), first], dim=-1)


def unbound(x: Tensor) -> Tensor:
    first, second = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).unbind(dim=-2)
    return torch.cat((-second, first), dim=-1)


def stacked_halves(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((-second, first), dim=-2).flatten(-2)


def narrowed(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.concat((-x.narrow(-1, half, half), x.narrow(-1, 0, half)), dim=3)


def reshaped_pairs(x: Tensor) -> Tensor:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).reshape(x.shape)


def full(rotate: Callable[[Tensor], Tensor]) -> Rope:
    """x * cos + rotate(x) * sin."""
    return lambda x, cos, sin: x * cos + rotate(x) * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def halves_other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([cos * first + (-second) * sin, sin * first + cos * second], dim=-1)


def halves_minus_sin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second * (-sin) + first * cos, first * sin + second * cos), 3)


def halves_of_full_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    upper = first * cos[..., :half] - second * sin[..., :half]
    return torch.cat([upper, second * cos[..., half:] + first * sin[..., half:]], dim=-1)


def halves_of_one_half_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    upper = first * cos[..., :half] - second * sin[..., :half]
    return torch.cat([upper, second * cos[..., :half] + first * sin[..., :half]], dim=-1)


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -2).flatten(-2)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even = pairs[..., 0] * cos - pairs[..., 1] * sin
    odd = pairs[..., 1] * cos + pairs[..., 0] * sin
    return torch.stack([even, odd], -1).flatten(3)


def interleaved_strided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).reshape(x.shape)


def torchtune(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cache = torch.stack([cos, sin], dim=-1)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    even = pairs[..., 0] * cache[..., 0] - pairs[..., 1] * cache[..., 1]
    odd = pairs[..., 1] * cache[..., 0] + pairs[..., 0] * cache[..., 1]
    return torch.stack([even, odd], -1).flatten(3).type_as(x)


def upcast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos.float() + rotate_half(wide) * sin.float()).to(x.dtype)


def cast_before_join(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)], -1)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    rotated, passed = x[..., :rotary], x[..., rotary:]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, passed), dim=-1)


def partial_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, passed = x.float().split([4, 4], dim=-1)
    return torch.cat([full(rotate_every_two)(rotated, cos, sin), passed], -1).type_as(x)


def partial_three(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    first, second, passed = x[..., :rotary], x[..., rotary : 2 * rotary], x[..., 2 * rotary :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)


def deinterleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def deinterleaved_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return full(rotate_half)(x.view(b, h, t, d // 2, 2).transpose(4, 3).reshape(b, h, t, d), cos, sin)


def inverse(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos + second * sin, first * (-sin) + second * cos], 3)


def inverse_full(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos - rotate_half(x) * sin


def turned_the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    freqs = torch.complex(cos, sin)
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * freqs).flatten(3).type_as(x)


def complex_polar(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    freqs = torch.polar(torch.ones_like(cos), sin)
    numbers = torch.view_as_complex(x.float().contiguous().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(freqs * numbers).reshape(x.shape).to(x.dtype)


def complex_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1).type_as(x)


def scaled_by_one(x: Tensor, cos: Tensor, sin: Tensor, scale: float = 1) -> Tensor:
    """With parts before and behind that may be empty."""
    before, middle, behind = x[..., :0], x[..., 0:8], x[..., 8:]
    turned = middle * cos * scale + reshaped_pairs(middle) * sin * scale
    return torch.cat((before, turned, behind), dim=-1)


def pairs_stay_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads are merged with the positions when the pairs are joined."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin
    return torch.stack([even, odd], -1).reshape(x.shape[0], -1, x.shape[-1])


HALVES, PAIRS = "x * cos + rotated * sin", "x1 * cos - x2 * sin"
SPELLINGS: dict[str, tuple[Rope, int, str]] = {
    "rotate_half": (full(rotate_half), 8, f"halves, {HALVES}"),
    "chunked": (full(chunked), 8, f"halves, {HALVES}"),
    "split": (full(split), 8, f"halves, {HALVES}"),
    "unbound": (full(unbound), 8, f"halves, {HALVES}"),
    "stacked halves": (full(stacked_halves), 8, f"halves, {HALVES}"),
    "narrowed": (full(narrowed), 8, f"halves, {HALVES}"),
    "sin first": (lambda x, cos, sin: sin * rotate_half(x) + cos * x, 8, f"halves, {HALVES}"),
    "minus a turn back": (lambda x, cos, sin: x * cos - -rotate_half(x) * sin, 8, f"halves, {HALVES}"),
    "rotate_every_two": (full(rotate_every_two), 8, f"interleaved, {HALVES}"),
    "reshaped pairs": (full(reshaped_pairs), 8, f"interleaved, {HALVES}"),
    "halves": (halves, 4, f"halves, {PAIRS}"),
    "halves, other order": (halves_other_order, 4, f"halves, {PAIRS}"),
    "halves, minus sin": (halves_minus_sin, 4, f"halves, {PAIRS}"),
    "halves of full tables": (halves_of_full_tables, 8, f"halves, {PAIRS}"),
    "halves of one half table": (halves_of_one_half_table, 8, f"halves, {PAIRS}"),
    "stacked": (stacked, 4, f"halves, {PAIRS}"),
    "interleaved": (interleaved, 4, f"interleaved, {PAIRS}"),
    "interleaved, strided": (interleaved_strided, 4, f"interleaved, {PAIRS}"),
    "scaled by one": (scaled_by_one, 8, f"interleaved, {HALVES}"),
    "pairs stay apart": (pairs_stay_apart, 4, f"interleaved, {PAIRS}"),
    "partial": (partial, 4, f"halves, {HALVES}, 4 of 8 elements"),
    "partial, three parts": (partial_three, 2, f"halves, {PAIRS}, 4 of 8 elements"),
    "de-interleaved": (deinterleaved, 4, f"halves, {PAIRS}"),
    "de-interleaved first": (deinterleaved_first, 8, f"halves, {HALVES}"),
    "inverse": (inverse, 4, f"halves, {PAIRS}, inverse"),
    "turned the other way": (turned_the_other_way, 8, f"halves, {HALVES}, inverse"),
    "inverse, full": (inverse_full, 8, f"halves, {HALVES}, inverse"),
}
# Their products are in float32 whatever x is.
WIDE_SPELLINGS: dict[str, tuple[Rope, int, str]] = {
    "torchtune": (torchtune, 4, f"interleaved, {PAIRS}"),
    "upcast": (upcast, 8, f"halves, {HALVES}"),
    "cast before joining": (cast_before_join, 4, f"halves, {PAIRS}"),
    "partial, split": (partial_split, 4, f"interleaved, {HALVES}, 4 of 8 elements"),
    "complex": (complex_numbers, 4, "interleaved, complex"),
    "complex, polar": (complex_polar, 4, "interleaved, complex"),
    "complex parts": (complex_parts, 4, "halves, complex"),
}
