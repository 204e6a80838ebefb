"""Which layers of a decoder one process holds, and whether several such ranges make a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """The layers start_layer to end_layer, both included, of a decoder of n_layers; model_id names the model.

    Raises ValueError for a range that is empty or not inside the model.
    """

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_layer <= self.end_layer < self.n_layers:
            got = f"got start_layer={self.start_layer}, end_layer={self.end_layer}, n_layers={self.n_layers}"
            raise ValueError(f"Shard: {got}, expected 0 <= start_layer <= end_layer < n_layers (the end is included)")

    @property
    def is_first_layer(self) -> bool:
        """Whether the model begins here: this shard takes tokens."""
        return self.start_layer == 0

    @property
    def is_last_layer(self) -> bool:
        """Whether the model ends here: this shard gives logits."""
        return self.end_layer == self.n_layers - 1

    @property
    def num_layers(self) -> int:
        """How many layers this shard holds."""
        return self.end_layer - self.start_layer + 1


def whole_model(model_id: str, n_layers: int) -> Shard:
    """The one shard that holds every layer."""
    return Shard(model_id, 0, n_layers - 1, n_layers)


def split_layers(model_id: str, n_layers: int, num_shards: int) -> list[Shard]:
    """Shards as even as they go, the longer ones first.

    Raises ValueError when there are fewer layers than shards.
    """
    if not 1 <= num_shards <= n_layers:
        raise ValueError(f"split_layers: got {num_shards} shards, expected 1 to {n_layers}, the model's layers")
    length, longer = divmod(n_layers, num_shards)
    starts = [index * length + min(index, longer) for index in range(num_shards + 1)]
    return [Shard(model_id, start, end - 1, n_layers) for start, end in itertools.pairwise(starts)]


def check_tiling(shards: Sequence[Shard]) -> None:
    """Raises ValueError unless these shards, in this order, hold every layer of one model exactly once."""
    if not shards:
        raise ValueError("shards: got none, expected shards that hold every layer once")
    models = {(shard.model_id, shard.n_layers) for shard in shards}
    if len(models) > 1:
        raise ValueError(f"shards: got parts of {len(models)} models {sorted(models)}, expected parts of one")
    ranges = ", ".join(f"{shard.start_layer}-{shard.end_layer}" for shard in shards)
    expected = f"expected layers 0-{shards[0].n_layers - 1} in order, each once"
    next_layer = 0
    for shard in shards:
        if shard.start_layer != next_layer:
            what = "are missing" if shard.start_layer > next_layer else "come twice or out of order"
            first, last = sorted((shard.start_layer, next_layer))
            raise ValueError(f"shards: got layers {ranges}, {expected}; layers {first}-{last - 1} {what}")
        next_layer = shard.end_layer + 1
    if next_layer != shards[0].n_layers:
        last_layer = shards[0].n_layers - 1
        raise ValueError(f"shards: got layers {ranges}, {expected}; layers {next_layer}-{last_layer} are missing")
