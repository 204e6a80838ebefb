"""Random programs that make masks: whatever is said of one has to be true of it, for other sizes too."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.mask_claims import Claim, all_claims

PROGRAMS = 24
FILLS = (-math.inf, -1e4, -1e9, torch.finfo(torch.float32).min, -1.0, 0.0, math.inf)


_numbers = random.Random()


@torch._dynamo.assume_constant_result  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
def below(limit: int) -> int:
    """A random number that is a constant to the graph."""
    return _numbers.randrange(limit)


def one_of(items: Sequence[Any]) -> Any:
    return items[below(len(items))]


@dataclass(frozen=True)
class Sizes:
    """x [1, S] and y [1, T] give the sizes; start [] is an offset."""

    x: Tensor
    y: Tensor
    start: Tensor

    @property
    def rows(self) -> int:
        return self.x.shape[1]

    @property
    def columns(self) -> int:
        return self.y.shape[1]


def positions(sizes: Sizes, length: int) -> Tensor:
    """[length] integers: usually 0, 1, 2, ..."""
    offset = one_of([0, 0, 0, 1, -1, 3])
    kind = below(8)
    if kind == 0:
        return torch.arange(offset, length + offset)
    if kind == 1:
        return torch.ones(length, dtype=torch.int64).cumsum(0) - 1 + offset
    if kind == 2:
        return torch.arange(64)[abs(offset) : length + abs(offset)]
    if kind == 3:
        return torch.arange(length, dtype=torch.int32) + offset
    if kind == 4:
        return torch.arange(64)[torch.arange(length)] + offset
    if kind == 5:
        return torch.arange(0, 2 * length, 2)
    if kind == 6:
        return torch.cat([torch.arange(2), torch.arange(2, length)])
    return torch.arange(length) + offset


def changed(sizes: Sizes, index: Tensor) -> Tensor:
    steps: Sequence[Callable[[Tensor], Tensor]] = (
        *[lambda t: t] * 8,
        lambda t: t * 2,
        lambda t: t + 1,
        lambda t: t - 2,
        lambda t: t // 3,
        lambda t: t % 4,
        lambda t: -t,
        lambda t: t + sizes.start,
        lambda t: t + sizes.rows,
        lambda t: t.clamp(min=1),
        lambda t: torch.minimum(t, torch.full_like(t, 4)),
    )
    return one_of(steps)(index)


def condition(sizes: Sizes) -> Tensor:
    """[S, T] of truth values."""
    if below(10) < 3:
        ones = torch.ones(sizes.rows, sizes.columns, dtype=torch.bool)
        diagonal = one_of([0, 0, 1, -1, 2])
        return one_of([ones.tril(diagonal), ones.triu(diagonal), ~ones.triu(diagonal + 1), ones])
    i = changed(sizes, positions(sizes, sizes.rows))[:, None]
    j = changed(sizes, positions(sizes, sizes.columns))[None]
    shift = one_of([0, 0, 1, -1, 3])
    comparisons: Sequence[Callable[[], Tensor]] = (
        *[lambda: j <= i + shift] * 4,
        lambda: j < i + shift,
        lambda: j > i - 3,
        lambda: i >= j,
        lambda: (i - j) < 3,
        lambda: (i - j).abs() <= 2,
        lambda: ~(j > i),
        lambda: j // 4 == i // 4,
        lambda: (j == i) | (j < i),
        lambda: (j != i) & (i + 0 * j >= 0),
        lambda: (j < 4) & (i > -9),
        lambda: (sizes.y > 0) & (i > -9),
        lambda: (sizes.x > 0).mT & (j > -9),
        lambda: torch.eq(i, j),
    )
    return one_of(comparisons)()


def written(sizes: Sizes, mask: Tensor) -> Tensor:
    """A write in place, before the mask is read."""
    mask = mask.clone()
    other = condition(sizes)
    fill = one_of([True, False])
    kind = below(8)
    if kind == 0:
        mask.masked_fill_(other, fill)
    elif kind == 1:
        mask[:, one_of([0, 1, -1])] = fill
    elif kind == 2:
        mask[one_of([0, -1]), 1:] = fill
    elif kind == 3:
        mask[other] = fill
    elif kind == 4:
        mask &= other
    elif kind == 5:
        mask.fill_diagonal_(fill)
    elif kind == 6:
        mask[:2].fill_(fill)
    else:
        mask.tril_(one_of([0, 1]))
    return mask & True


def reshaped(sizes: Sizes, mask: Tensor) -> Tensor:
    steps: Sequence[Callable[[Tensor], Tensor]] = (
        lambda t: t[None, None],
        lambda t: t.mT.contiguous().mT,
        lambda t: t.unsqueeze(0).expand(2, 1, -1, -1)[1:, 0],
        lambda t: F.pad(t, (1, 0), value=one_of([True, False]))[:, :-1],
        lambda t: F.pad(t, (0, 2))[:, 1:-1],
        lambda t: torch.cat([t[:2], t[2:]]),
        lambda t: torch.cat([t[:, 1:], t[:, :1]], 1),
        lambda t: t[torch.arange(t.shape[0])],
        lambda t: t[torch.arange(t.shape[0]) - 1],
        lambda t: t.flip(0),
        lambda t: torch.stack([t, ~t])[0],
        lambda t: t.roll(1, 1),
    )
    return one_of(steps)(mask)


def combined(sizes: Sizes, mask: Tensor) -> Tensor:
    other = condition(sizes)
    steps: Sequence[Callable[[], Tensor]] = (
        *[lambda: mask & other] * 3,
        lambda: mask | other,
        lambda: mask ^ other,
        lambda: torch.where(other, mask, ~mask),
        lambda: mask.logical_and(other.logical_not()),
        lambda: mask == other,
        lambda: mask * other,
        lambda: mask.masked_fill(other, False),
    )
    return one_of(steps)()


def as_float(sizes: Sizes, mask: Tensor) -> Tensor:
    fill = one_of(FILLS[:4] if below(10) < 7 else FILLS)
    dtype = one_of([torch.float32, torch.float32, torch.bfloat16])
    steps: Sequence[Callable[[], Tensor]] = (
        lambda: torch.where(mask, 0.0, fill),
        lambda: torch.where(~mask, fill, 0.0).to(dtype),
        lambda: torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, max(fill, torch.finfo(dtype).min)),
        lambda: torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf),
        lambda: (1.0 - mask.to(dtype)) * one_of([-1e4, -1e9, -2.0]),
        lambda: torch.log(mask.float()),
        lambda: torch.where(mask, 0.0, fill) + torch.where(condition(sizes), 0.0, -math.inf),
        lambda: torch.where(mask, sizes.y, fill),
        lambda: torch.full(mask.shape, fill).masked_fill(mask, 0.0),
        lambda: torch.triu(torch.full(mask.shape, fill), 1) + 0.0 * mask,
        lambda: (mask.float() - 1.0) * 1e9,
    )
    return one_of(steps)()


def make(sizes: Sizes) -> Tensor:
    mask = condition(sizes)
    for _ in range(one_of([0, 1, 1, 2])):
        mask = one_of([combined, combined, combined, written])(sizes, mask)
    if below(4) < 1:
        mask = reshaped(sizes, mask)
    return as_float(sizes, mask) if below(10) < 4 else mask


def claims_of(seed: int, rows: int, columns: int, dynamic: bool) -> list[Claim]:
    def programs(x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        return tuple(make(Sizes(x, y, start)) for _ in range(PROGRAMS))

    _numbers.seed(seed)
    inputs = [torch.randint(0, 3, (1, size)).float() for size in (rows, columns)]
    return all_claims(programs, *inputs, torch.tensor(2), dynamic=dynamic)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (5, 8), (8, 5)])
@pytest.mark.parametrize("seed", range(2))
def test_claims_are_true(seed: int, rows: int, columns: int) -> None:
    found = [claim.facts for claim in claims_of(10 * seed + rows, rows, columns, dynamic=False)]
    assert sum(bool(facts.structure) for facts in found) >= 3


@pytest.mark.parametrize("seed", range(4))
def test_claims_are_true_of_all_sizes(seed: int) -> None:
    square = seed % 2 == 0
    claims = claims_of(1000 + seed, 6, 6 if square else 9, dynamic=True)
    assert sum(bool(claim.facts.structure) for claim in claims) >= 3
    for sizes in ((5,), (11,), (4,)) if square else ((4, 11), (9, 5), (7, 7)):
        if claims[0].allows(*sizes):
            for claim in claims:
                claim.check(claim.inputs_of(*sizes))
