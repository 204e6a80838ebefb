"""Rotary embeddings: the spellings that are recognised, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

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


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("rope", "width", "spelling"), SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(rope: Rope, width: int, spelling: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(Rotated(rope, width).to(dtype), tokens(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"rope": 1}
    assert captured.spellings == [spelling]
    assert_same_results(captured, training)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("rope", "width", "spelling"), WIDE_SPELLINGS.values(), ids=WIDE_SPELLINGS)
def test_spellings_in_float32(
    rope: Rope, width: int, spelling: str, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    module = Rotated(rope, width, table=torch.float32).to(dtype)
    captured = capture(module, tokens(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"rope": 1}
    assert captured.spellings[0].removesuffix(", in float32") == spelling
    (operator,) = captured.operators()
    assert operator.args[0].meta["example_value"].dtype == dtype  # the cast is the operator's
    assert_same_results(captured, training)


@pytest.mark.parametrize("rope", [full(rotate_half), upcast, torchtune], ids=["rotate_half", "upcast", "torchtune"])
def test_nothing_is_rounded_otherwise(rope: Rope) -> None:
    module = Rotated(rope, 4 if rope is torchtune else 8).bfloat16()
    captured = capture(module, tokens(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"rope": 1}
    before, after = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_tables_in_another_dtype(table: torch.dtype, heads_first: bool) -> None:
    """x in bfloat16 and tables in float32 give float32, and so do tables in bfloat16 with x in float32."""
    x_dtype = torch.bfloat16 if table == torch.float32 else torch.float32
    module = Rotated(full(rotate_half), table=table, heads_first=heads_first).to(x_dtype)
    captured = capture(module, tokens(x_dtype, training=True), training=True)
    assert captured.counts == {"rope": 1}
    assert captured.operators()[0].meta["example_value"].dtype == torch.float32
    assert_same_results(captured, training=True)


def test_gradients_of_the_tables() -> None:
    cos, sin = (torch.randn(LENGTH, DIM, requires_grad=True) for _ in range(2))
    x = torch.randn(2, HEADS, LENGTH, DIM, requires_grad=True)
    captured = capture(full(rotate_half), x, cos, sin, training=True)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured, training=True)


def test_under_autocast() -> None:
    def autocast(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return full(rotate_half)(F.linear(x, weight), cos, sin)

    table = torch.randn(LENGTH, DIM)
    captured = capture(autocast, torch.randn(2, LENGTH, DIM), torch.randn(DIM, DIM), table, table + 1)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured)


def test_q_and_k_are_two_sites_and_stacked_they_are_one() -> None:
    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return halves(q, cos, sin), halves(k, cos, sin)

    def as_one(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return halves(torch.cat([q, k], dim=1), cos, sin).split([3, 2], dim=1)

    q, k, table = torch.randn(2, 3, LENGTH, 8), torch.randn(2, 2, LENGTH, 8), torch.randn(LENGTH, 4)
    for function, count in ((both, 2), (as_one, 1)):
        captured = capture(function, q, k, table, table + 1)
        assert captured.counts == {"rope": count} and captured.refusals == []
        assert_same_results(captured)


def test_a_rotation_of_a_part_is_a_site_over_the_part() -> None:
    """Multi-head latent attention rotates the last elements, vision models rotate rows and columns apart."""

    def latent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        passed, rotated = x.split([8, 8], dim=-1)
        return torch.cat((passed, full(rotate_half)(rotated, cos, sin)), dim=-1)

    def axial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, columns = x.chunk(2, -1)
        return torch.cat([full(rotate_half)(rows, cos, sin), full(rotate_half)(columns, sin, cos)], dim=-1)

    x, table = torch.randn(2, 3, LENGTH, 16), torch.randn(LENGTH, 8)
    for function, count in ((latent, 1), (axial, 2)):
        captured = capture(function, x, table, table + 1)
        assert captured.counts == {"rope": count} and captured.refusals == []
        assert_same_results(captured)


def test_other_readers_do_not_matter() -> None:
    def read_elsewhere(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = rotate_half(x)
        straight = x * cos
        return straight + turned * sin, turned.exp(), straight.exp(), x.exp()

    table = torch.randn(LENGTH, 8)
    captured = capture(read_elsewhere, torch.randn(2, 3, LENGTH, 8), table, table + 1)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured)


def test_a_result_that_is_rounded_and_widened_stays_so() -> None:
    def rounded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return full(rotate_half)(x, cos, sin).bfloat16().float()

    table = torch.randn(LENGTH, 8)
    captured = capture(rounded, torch.randn(2, 3, LENGTH, 8), table, table + 1)
    assert captured.counts == {"rope": 1}
    before, after = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    assert torch.equal(before[0], after[0])


def test_export() -> None:
    module = Rotated(full(rotate_half))
    program = torch.export.export(module, (tokens(torch.float32),))
    from infuse.patterns.passes import rewrite
    from tests.patterns.capture import default_overload

    x = tokens(torch.float32)
    expected = program.module()(x)
    (record,) = rewrite(program.graph_module.graph, Settings(), default_overload, False)
    program.graph_module.recompile()
    assert (record.kind, record.status) == ("rope", "rewritten")
    torch.testing.assert_close(program.module()(x), expected)


PAIRS_APART = "the elements of x that meet cos and sin are not those of the pairs of a rotation"
OTHER_TABLES = "the two elements of a pair meet different cos or sin"


def unequal(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 3:], x[..., :3]), dim=-1) * sin


def other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., :4], -x[..., 4:]), dim=-1) * sin


def both_negative(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 4:], -x[..., :4]), dim=-1) * sin


def pairs_joined_as_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1) * sin


def same_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second, cos, sin = x[..., :4], x[..., 4:], cos[..., :4], sin[..., :4]
    return torch.cat([first * cos - second * sin, second * cos - first * sin], dim=-1)


def parts_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second, cos, sin = x[..., :4], x[..., 4:], cos[..., :4], sin[..., :4]
    return torch.cat([first * cos - second * sin, first * cos + second * sin], dim=-1)


def other_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., :4], x[..., 4:]
    return torch.cat([first * cos[..., :4] - second * sin[..., :4], second * cos[..., 2:6] + first * sin[..., :4]], -1)


def halves_of_tables_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., :4], x[..., 4:]
    upper = first * cos[..., 4:] - second * sin[..., 4:]
    return torch.cat([upper, second * cos[..., :4] + first * sin[..., :4]], -1)


def swapped_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.sin().to(x.dtype) + rotate_half(x) * cos.cos()[:, :]


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (unequal, PAIRS_APART),
        (other_order, PAIRS_APART),
        (both_negative, PAIRS_APART),
        (pairs_joined_as_halves, PAIRS_APART),
        (same_sign, PAIRS_APART),
        (parts_swapped, OTHER_TABLES),
        (other_tables, OTHER_TABLES),
        (halves_of_tables_swapped, OTHER_TABLES),
        (swapped_tables, "cos and sin have changed places"),
    ],
)
def test_what_resembles_a_rotation_is_refused(rope: Rope, reason: str) -> None:
    captured = capture(Rotated(rope), tokens(torch.float32))
    assert captured.counts == {} and captured.refusals == [reason]
    assert_same_results(captured)


def no_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., 4:], x[..., :4]), dim=-1) * sin


def other_tensor(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x.exp()) * sin


def scaled_in_between(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x * 2) * sin


def one_angle_for_all(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[..., :1] + rotate_half(x) * sin[..., :1]


def batch_of_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.stack([table, table + 1])[:, None, None] for table in (cos, sin))
    return x * cos + rotate_half(x) * sin


def third_term(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + rotate_half(x)) * sin


def along_the_sequence(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-2] // 2
    return x * cos + torch.cat((-x[:, :, half:], x[:, :, :half]), dim=-2) * sin


def sinusoidal(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x + torch.cat([sin[:, :4], cos[:, :4]], dim=-1)


def learned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x @ torch.cat([cos[:4], -sin[:4]])


def rolled_in_pairs_of_other_tensors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second, third, fourth = x.chunk(4, -1)
    c, s = cos[..., :2], sin[..., :2]
    return torch.cat([first * c - second * s, third * c + fourth * s], -1)


@pytest.mark.parametrize(
    "rope",
    [
        no_sign,
        other_tensor,
        scaled_in_between,
        one_angle_for_all,
        batch_of_tables,
        third_term,
        along_the_sequence,
        sinusoidal,
        learned,
        rolled_in_pairs_of_other_tensors,
    ],
)
def test_what_is_no_rotation_is_left_alone(rope: Rope) -> None:
    captured = capture(Rotated(rope), tokens(torch.float32))
    assert captured.counts == {} and captured.refusals == []


def test_a_write_in_between_is_refused() -> None:
    def written(x: Tensor, cos: Tensor, sin: Tensor, when: bool) -> Tensor:
        turned = rotate_half(x)
        if when:
            x.mul_(2)
        y = x * cos + turned * sin
        if not when:
            x.mul_(2)
        return y

    def table_written(x: Tensor, cos: Tensor, sin: Tensor, when: bool) -> Tensor:
        first, second = x.chunk(2, -1)
        upper = first * cos[..., :4] - second * sin[..., :4]
        if when:
            cos.mul_(2)
        return torch.cat([upper, second * cos[..., :4] + first * sin[..., :4]], -1)

    x, table = torch.randn(2, 3, LENGTH, 8), torch.randn(LENGTH, 8)
    for function in (written, table_written):
        captured = capture(function, x.clone(), table.clone(), table + 1, True)
        assert captured.counts == {} and len(captured.refusals) == 1 and "writes in place" in captured.refusals[0]
        assert_same_results(captured)
        assert capture(function, x.clone(), table.clone(), table + 1, False).counts == {"rope": 1}


def test_a_symbolic_head_dimension_is_refused() -> None:
    tensors = [torch.randn(2, 3, LENGTH, 8), torch.randn(LENGTH, 8), torch.randn(LENGTH, 8)]
    captured = capture(full(rotate_half), *tensors, dynamic=True)
    assert captured.counts == {} and captured.refusals == ["the size of the last dimension is symbolic"]


@pytest.mark.parametrize("cast", ["to", "type_as"])
def test_attention_reads_the_operator_through_a_cast_that_changes_nothing(cast: str) -> None:
    """In float32 `rotated.type_as(q)` is q's own dtype: an alias, whose input names the same value."""

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-2)
        return turned.type_as(x) if cast == "type_as" else turned.to(x.dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v)

    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    angles = torch.randn(5, 4)
    captured = capture(attention, q, k, v, angles.cos(), angles.sin())
    assert captured.counts == {"rope": 2, "attention": 1}
    operators = captured.operators()
    assert [node.args[:2] for node in operators if "attention" in str(node.target)] == [tuple(operators[:2])]
    assert_same_results(captured)
