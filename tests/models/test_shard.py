"""Ranges of layers: which are one, how a model is cut into them, which do not make a model."""

from __future__ import annotations

import pytest

from infuse.models.shard import Shard, check_tiling, split_layers, whole_model


def ranges(shards: list[Shard]) -> list[tuple[int, int]]:
    return [(shard.start_layer, shard.end_layer) for shard in shards]


@pytest.mark.parametrize(
    ("n_layers", "num_shards", "expected"),
    [(3, 1, [(0, 2)]), (3, 2, [(0, 1), (2, 2)]), (3, 3, [(0, 0), (1, 1), (2, 2)]), (8, 3, [(0, 2), (3, 5), (6, 7)])],
)
def test_split_gives_even_ranges_that_tile(n_layers: int, num_shards: int, expected: list[tuple[int, int]]) -> None:
    shards = split_layers("m", n_layers, num_shards)
    assert ranges(shards) == expected
    check_tiling(shards)
    assert [shard.is_first_layer for shard in shards] == [index == 0 for index in range(num_shards)]
    assert [shard.is_last_layer for shard in shards] == [index == num_shards - 1 for index in range(num_shards)]
    assert sum(shard.num_layers for shard in shards) == n_layers


@pytest.mark.parametrize("num_shards", [0, 4, -1])
def test_more_shards_than_layers_are_refused(num_shards: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_shards} shards, expected 1 to 3"):
        split_layers("m", 3, num_shards)


@pytest.mark.parametrize(("start", "end", "layers"), [(-1, 0, 3), (2, 1, 3), (0, 3, 3), (0, 0, 0)])
def test_a_range_outside_the_model_is_refused(start: int, end: int, layers: int) -> None:
    with pytest.raises(ValueError, match=f"got start_layer={start}, end_layer={end}, n_layers={layers}"):
        Shard("m", start, end, layers)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "got none"),
        ([Shard("m", 0, 0, 3), Shard("m", 2, 2, 3)], "got layers 0-0, 2-2.*layers 1-1 are missing"),
        ([Shard("m", 1, 2, 3)], "layers 0-0 are missing"),
        ([Shard("m", 0, 1, 3)], "layers 2-2 are missing"),
        ([Shard("m", 0, 1, 3), Shard("m", 1, 2, 3)], "layers 1-1 come twice or out of order"),
        ([Shard("m", 1, 2, 3), Shard("m", 0, 0, 3)], "layers 0-0 are missing"),
        ([whole_model("m", 3), whole_model("m", 3)], "layers 0-2 come twice"),
        ([Shard("m", 0, 0, 2), Shard("other", 1, 1, 2)], "got parts of 2 models"),
    ],
)
def test_shards_that_do_not_tile_are_refused(shards: list[Shard], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tiling(shards)
