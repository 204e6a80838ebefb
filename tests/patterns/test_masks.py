"""What masks are proven to be, and that near misses are not taken for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.mask_claims import Claim, all_claims, claims

Maker = Callable[[Tensor], Tensor]


def square(x: Tensor, value: float | bool = True) -> Tensor:
    """[S, S] of a constant for x [B, S]."""
    dtype = torch.bool if isinstance(value, bool) else torch.float32
    return torch.full((x.shape[1], x.shape[1]), value, dtype=dtype)


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]


def columns(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None, :]


def filled(x: Tensor) -> Tensor:
    mask = square(x, 0.0)
    mask.masked_fill_(columns(x) > rows(x), -math.inf)
    return mask.clone()


def ones_except_above(x: Tensor) -> Tensor:
    mask = square(x, 0.0)
    mask[columns(x) > rows(x)] = torch.finfo(torch.float32).min
    return mask + 0.0


def from_empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], x.shape[1]).fill_(-math.inf).triu_(1)


def packed(x: Tensor) -> Tensor:
    """As published models compute it when they allow for packed sequences: positions with gaps start a new sequence."""
    positions = (torch.arange(x.shape[1]) + 0)[None].expand(x.shape[0], -1)
    sequences = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(x.shape[0])[:, None, None, None]
    q = torch.arange(x.shape[1])[None, None, :, None]
    k = torch.arange(x.shape[1])[None, None, None, :]
    same = sequences[b, q] == sequences[b, k]
    return (q.new_ones((), dtype=torch.bool) & same & (positions[b, k] <= positions[b, q])).expand(
        x.shape[0], -1, -1, -1
    )


CAUSAL: dict[str, Maker] = {
    "tril of ones": lambda x: square(x).tril(),
    "tril of float ones, bool": lambda x: torch.ones(x.shape[1], x.shape[1]).tril().bool(),
    "tril == 1": lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1])) == 1,
    "not triu": lambda x: ~torch.triu(square(x), diagonal=1),
    "logical_not of triu": lambda x: square(x).triu(1).logical_not(),
    "triu of -inf": lambda x: torch.triu(torch.full((x.shape[1], x.shape[1]), -math.inf), diagonal=1),
    "triu of full_like": lambda x: torch.full_like(square(x, 0.0), -math.inf).triu(1),
    "log of tril": lambda x: torch.log(torch.tril(torch.ones(x.shape[1], x.shape[1]))),
    "indices": lambda x: columns(x) <= rows(x),
    "indices, >=": lambda x: rows(x) >= columns(x),
    "indices, not >": lambda x: ~(columns(x) > rows(x)),
    "indices, < i + 1": lambda x: columns(x) < rows(x) + 1,
    "difference": lambda x: columns(x) - rows(x) <= 0,
    "twice the difference": lambda x: 2 * columns(x) - 2 * rows(x) <= 1,
    "four dimensions": lambda x: (columns(x) <= rows(x))[None, None].expand(x.shape[0], 1, -1, -1),
    "int32": lambda x: columns(x).int() <= rows(x).int(),
    "cumsum of ones": lambda x: torch.ones_like(columns(x)).cumsum(-1) <= torch.ones_like(rows(x)).cumsum(0),
    "where": lambda x: torch.where(columns(x) <= rows(x), 0.0, -math.inf),
    "where, branches and condition swapped": lambda x: torch.where(
        columns(x) > rows(x), torch.finfo(torch.float32).min, 0.0
    ),
    "masked_fill": lambda x: square(x, 0.0).masked_fill(square(x).triu(1), -math.inf),
    "masked_fill of not": lambda x: square(x, 0.0).masked_fill(~square(x).tril(), torch.finfo(torch.float32).min),
    "(1 - m) * lowest": lambda x: (1.0 - square(x).tril().float()) * torch.finfo(torch.float32).min,
    "(1 - m) * -1e4 in half": lambda x: (1.0 - square(x).tril().half()) * -1e4,
    "lowest of float32 in bfloat16": lambda x: (
        torch.finfo(torch.float32).min * (1.0 - square(x, 1.0).tril())
    ).bfloat16(),
    "sum of two": lambda x: (
        square(x, -math.inf).triu(1) + torch.where(columns(x) <= rows(x), 0.0, torch.finfo(torch.float32).min)
    ),
    "two conditions": lambda x: (columns(x) <= rows(x)) & (columns(x) <= rows(x) + 3),
    "either of two": lambda x: (columns(x) <= rows(x)) | (columns(x) < rows(x) - 1),
    "with the diagonal": lambda x: (columns(x) < rows(x)) | torch.eye(x.shape[1], dtype=torch.bool),
    "transposed, and transposed": lambda x: square(x).triu().mT,
    "transposed comparison": lambda x: (rows(x) <= columns(x)).t(),
    "cut out of a larger one": lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[: x.shape[1], : x.shape[1]],
    "narrow": lambda x: torch.ones(64, 64).tril().narrow(0, 0, x.shape[1]).narrow(1, 0, x.shape[1]).bool(),
    "gathered": lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[torch.arange(x.shape[1]), : x.shape[1]],
    "index_select": lambda x: (
        torch.ones(64, 64).tril().index_select(0, torch.arange(x.shape[1]))[:, : x.shape[1]].bool()
    ),
    "select": lambda x: torch.ones(2, 64, 64).tril()[1, : x.shape[1], : x.shape[1]].bool(),
    "shifted on both sides": lambda x: torch.arange(3, x.shape[1] + 3) <= torch.arange(3, 3 + x.shape[1])[:, None],
    "pad": lambda x: F.pad(square(x)[:, 1:], (1, 0), value=True).tril(),
    "cat": lambda x: torch.cat([columns(x)[:, :1] <= rows(x), columns(x)[:, 1:] <= rows(x)], 1),
    "window as wide as the keys": lambda x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - x.shape[1]),
    "masked_fill_": filled,
    "setitem": ones_except_above,
    "empty, fill_, triu_": from_empty,
    "packed sequences": packed,
}


def claims_about(makers: dict[str, Maker], x: Tensor, dynamic: bool) -> dict[str, Claim]:
    """All makers in one graph: also that what they share is remembered rightly."""

    def make(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(maker(x) for maker in makers.values())

    return dict(zip(makers, all_claims(make, x, dynamic=dynamic)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_causal_masks_are_proven(dynamic: bool) -> None:
    found = claims_about(CAUSAL, torch.zeros(2, 7), dynamic)
    assert [name for name, claim in found.items() if not claim.facts.is_causal] == []
    assert [name for name, claim in found.items() if claim.facts.empty_rows is not False] == []


@pytest.mark.parametrize("spelling", ["where", "masked_fill_", "setitem", "empty, fill_, triu_"])
def test_causal_masks_are_proven_alone(spelling: str) -> None:
    assert claims(CAUSAL[spelling], torch.zeros(2, 7)).facts.is_causal


def zeroed_later(x: Tensor) -> Tensor:
    mask = square(x).tril()
    mask[0] = False
    return mask & True


def opened_later(x: Tensor) -> Tensor:
    mask = square(x, -math.inf).triu(1)
    mask[:, :2] = 0.0
    return mask * 1.0


def changed_through_a_view(x: Tensor) -> Tensor:
    mask = square(x).tril()
    mask[:, 0].fill_(False)
    return mask & True


def changed_by_an_unknown_write(x: Tensor) -> Tensor:
    mask = square(x, -math.inf).triu(1)
    mask.mul_(0.5).add_(x[0, 0])
    return mask * 1.0


NOT_CAUSAL: dict[str, Maker] = {
    "tril(1)": lambda x: square(x).tril(1),
    "tril(-1)": lambda x: square(x).tril(-1),
    "triu": lambda x: square(x).triu(),
    "triu(0) of -inf": lambda x: square(x, -math.inf).triu(0),
    "triu(2) of -inf": lambda x: square(x, -math.inf).triu(2),
    "tril of -inf": lambda x: square(x, -math.inf).tril(-1),
    "j < i": lambda x: columns(x) < rows(x),
    "j <= i + 1": lambda x: columns(x) <= rows(x) + 1,
    "j <= i - 1": lambda x: columns(x) <= rows(x) - 1,
    "i <= j": lambda x: rows(x) <= columns(x),
    "j == i": lambda x: rows(x) == columns(x),
    "j <= 2 i": lambda x: columns(x) <= 2 * rows(x),
    "2 j <= i": lambda x: 2 * columns(x) <= rows(x),
    "j <= i * i": lambda x: columns(x) <= rows(x) * rows(x),
    "j <= 6 - i": lambda x: columns(x) <= 6 - rows(x),
    "transposed": lambda x: square(x).tril().mT,
    "where, branches swapped": lambda x: torch.where(columns(x) <= rows(x), -math.inf, 0.0),
    "where, +inf": lambda x: torch.where(columns(x) <= rows(x), 0.0, math.inf),
    "c = -1": lambda x: torch.where(columns(x) <= rows(x), 0.0, -1.0),
    "c = -100": lambda x: (1.0 - square(x).tril().float()) * -100.0,
    "1 instead of 0": lambda x: torch.where(columns(x) <= rows(x), 1.0, -math.inf),
    "a bias beside": lambda x: square(x, -math.inf).triu(1) + x[:1],
    "nan": lambda x: torch.where(columns(x) <= rows(x), 0.0, math.nan),
    "0 * -inf": lambda x: square(x).triu(1).float() * -math.inf,
    "float mask cast to bool": lambda x: square(x, -math.inf).triu(1).bool(),
    "sliding": lambda x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - 3),
    "sliding, float": lambda x: torch.where((columns(x) <= rows(x)) & (rows(x) - columns(x) < 2), 0.0, -math.inf),
    "prefix": lambda x: (columns(x) <= rows(x)) | (columns(x) < 3),
    "columns from 1": lambda x: torch.arange(1, x.shape[1] + 1)[None] <= rows(x),
    "cut with an offset": lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[1 : x.shape[1] + 1, : x.shape[1]],
    "every second row": lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[: 2 * x.shape[1] : 2, : x.shape[1]],
    "gathered from 2": lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[
        2 + torch.arange(x.shape[1]), : x.shape[1]
    ],
    "gathered backwards": lambda x: square(x).tril()[torch.arange(x.shape[1]) - x.shape[1]],
    "gathered by data": lambda x: square(x).tril()[x[0].long()],
    "batch dependent": lambda x: (columns(x) <= rows(x))[None] & (x > 0)[:, :, None],
    "per head": lambda x: columns(x) <= rows(x) + torch.arange(3)[:, None, None],
    "padded keys": lambda x: (columns(x) <= rows(x)) & (x > 0)[:, None, :],
    "unsigned": lambda x: (columns(x).to(torch.uint8) - rows(x).to(torch.uint8)) <= 0,
    "rounded indices": lambda x: columns(x).half() * 4096 <= rows(x).half() * 4096 + 1,
    "reshaped": lambda x: square(x).tril().reshape(-1, 1, x.shape[1]).transpose(0, 2).reshape(x.shape[1], -1),
    "rolled": lambda x: square(x).tril().roll(1, 0),
    "flipped": lambda x: square(x).triu().flip(0),
    "random": lambda x: torch.rand(x.shape[1], x.shape[1]).tril() > 0,
    "cumsum of a mask": lambda x: (columns(x) <= rows(x)).cumsum(0) > 1,
    "cumsum of data": lambda x: x[:1].long().cumsum(-1) <= rows(x),
    "cat of the wrong halves": lambda x: torch.cat([columns(x)[:, :3] <= rows(x), columns(x)[:, :4] <= rows(x)], 1),
    "row set later": zeroed_later,
    "columns set later": opened_later,
    "written through a view": changed_through_a_view,
    "written otherwise": changed_by_an_unknown_write,
}


DATA = torch.tensor([[1.0, 2, 0, 1, 3, 0, 5], [1.0, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("dynamic", [False, True])
def test_near_misses_are_not_taken_for_causal(dynamic: bool) -> None:
    found = claims_about(NOT_CAUSAL, DATA, dynamic)
    assert [name for name, claim in found.items() if claim.facts.is_causal or claim.facts.all_true] == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_write_before_the_reading_counts_and_one_after_it_does_not(dynamic: bool) -> None:
    def before(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = square(x).tril()
        read = mask & True
        mask.fill_(True)
        return read, mask

    def after(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = square(x).tril()
        read = mask & True
        mask.fill_(True)
        return mask & True, read

    assert claims(before, torch.zeros(2, 7), dynamic=dynamic).facts.is_causal
    assert claims(after, torch.zeros(2, 7), dynamic=dynamic).facts.all_true


STRUCTURES: dict[str, tuple[Maker, str]] = {
    "all true": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), "all true"),
    "zeros": (lambda x: torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1]), "all true"),
    "zeros times lowest": (lambda x: (1.0 - square(x, 1.0)) * torch.finfo(torch.float32).min, "all true"),
    "q >= 0": (lambda x: (rows(x) >= 0).expand(-1, x.shape[1]), "all true"),
    "offset by the length": (lambda x: columns(x) < rows(x) + x.shape[1], "all true"),
    "window": (lambda x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - 3), "sliding window 3"),
    "window by triu": (lambda x: square(x).tril().triu(-2), "sliding window 3"),
    "window by xor": (lambda x: square(x).tril() ^ square(x).tril(-3), "sliding window 3"),
    "both sides": (lambda x: (columns(x) - rows(x)).abs() <= 2, "keys from -2 to 2 beside the query"),
    "operator abs": (lambda x: abs(columns(x) - rows(x)) <= 2, "keys from -2 to 2 beside the query"),
    "offset": (lambda x: columns(x) <= rows(x) + 1, "causal with offset"),
    "chunks": (lambda x: (columns(x) <= rows(x)) & (columns(x) // 4 == rows(x) // 4), "causal, chunks of 4"),
    "shifted chunks": (lambda x: (columns(x) <= rows(x)) & ((columns(x) + 1) // 4 == (rows(x) + 1) // 4), "causal"),
    "padding": (lambda x: (x > 0)[:, None, None, :], "padding"),
    "padding, float": (lambda x: (1.0 - (x > 0).float())[:, None, None] * torch.finfo(torch.float32).min, "padding"),
    "causal and padding": (lambda x: (columns(x) <= rows(x)) & (x > 0)[:, None, None], "causal, padding"),
    "both, float": (
        lambda x: (
            torch.where(columns(x) <= rows(x), 0.0, torch.finfo(torch.float32).min)
            + (1.0 - (x > 0).float())[:, None, None] * torch.finfo(torch.float32).min
        ),
        "causal, padding",
    ),
    "causal bias": (lambda x: torch.where(columns(x) <= rows(x), x[:1], -math.inf), "causal"),
    "an input": (lambda x: x[None] > 0, ""),
    "queries": (lambda x: (x > 0)[:, :, None], ""),
    "prefix": (lambda x: (columns(x) <= rows(x)) | (columns(x) < 3), ""),
}


@pytest.mark.parametrize("dynamic", [False, True])
def test_structures_beside_causal(dynamic: bool) -> None:
    found = claims_about({name: maker for name, (maker, _) in STRUCTURES.items()}, DATA, dynamic)
    structures = {name: claim.facts.structure for name, claim in found.items()}
    assert structures == {name: structure for name, (_, structure) in STRUCTURES.items()}


def from_position(x: Tensor, start: Tensor) -> Tensor:
    return torch.arange(64)[None] <= torch.arange(x.shape[1])[:, None] + start


def from_positions(x: Tensor, start: Tensor) -> Tensor:
    return torch.arange(64)[None] <= (torch.arange(x.shape[1]) + start)[:, None]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", [from_position, from_positions])
def test_a_cache_position_is_an_offset_that_is_not_known(make: Callable[..., Tensor], dynamic: bool) -> None:
    facts = claims(make, torch.zeros(2, 7), torch.tensor(3), dynamic=dynamic).facts
    assert facts.structure == "causal with offset" and facts.exact
    assert facts.empty_rows is None


def test_positions_that_are_an_input_are_not_known() -> None:
    def make(positions: Tensor) -> Tensor:
        return torch.ones(64, 64, dtype=torch.bool).tril()[positions]

    assert claims(make, torch.arange(7)).facts.structure == ""
    assert claims(lambda positions: torch.arange(64)[None] <= positions[:, None], torch.arange(7)).facts.upper is None


def test_a_buffer_is_not_known() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())

        def forward(self, x: Tensor) -> Tensor:
            return self.mask[: x.shape[1], : x.shape[1]] & True  # type: ignore[index]

    assert claims(Model(), torch.zeros(2, 7)).facts.structure == ""


@pytest.mark.parametrize(("queries", "keys", "empty"), [(4, 9, False), (9, 4, False), (4, 4, False)])
def test_rows_of_rectangular_masks(queries: int, keys: int, empty: bool) -> None:
    def upper_left(x: Tensor) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril()

    def lower_right(x: Tensor) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    facts = claims(upper_left, torch.zeros(1)).facts
    assert facts.is_causal and facts.empty_rows is empty
    facts = claims(lower_right, torch.zeros(1)).facts
    assert facts.is_causal == (queries == keys)
    assert facts.empty_rows is (None if queries > keys else False)


def test_a_window_over_fewer_keys_than_queries_leaves_rows_empty() -> None:
    def make(x: Tensor) -> Tensor:
        i, j = torch.arange(9)[:, None], torch.arange(4)[None]
        return (j <= i) & (j > i - 3)

    assert claims(make, torch.zeros(1)).facts.empty_rows is None


def test_the_lower_right_corner_of_a_dynamic_cache() -> None:
    def make(x: Tensor, y: Tensor) -> Tensor:
        total = x.shape[1] + y.shape[1]
        return torch.ones(total, total, dtype=torch.bool).tril()[y.shape[1] :]

    claim = claims(make, torch.zeros(1, 5), torch.zeros(1, 9), dynamic=True)
    assert claim.facts.structure == "causal with offset" and claim.facts.exact and claim.facts.empty_rows is False
    claim.check(claim.inputs_of(6, 4))
