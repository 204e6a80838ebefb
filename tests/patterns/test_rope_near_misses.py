"""What resembles a rotary embedding and is none, or not provably."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.patterns.capture import assert_same_results, capture
from tests.patterns.rope_spellings import (
    LENGTH,
    Rope,
    Rotated,
    full,
    rotate_half,
    tokens,
)

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
