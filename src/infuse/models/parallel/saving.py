"""A checkpoint written by several processes, each its own shard's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from infuse.models.checkpoint_writing import Written, new_folder, tensors_of, write_index, write_shard
from infuse.models.config import ModelConfig
from infuse.models.decoder import ShardTransformerDecoder
from infuse.models.parallel.process_group import Peers
from infuse.models.shard import check_tiling


def save_over_ranks(
    decoder: ShardTransformerDecoder,
    config: ModelConfig,
    folder: str | Path,
    peers: Peers,
    *,
    shards: dist.ProcessGroup | None = None,
) -> None:
    """Writes the checkpoint that `load_sharded_model`, `open_engine` and Hugging Face read; every rank calls it.

    decoder: this rank's shard. shards: the group over which the shards lie, in order; None when each rank has all
    layers. Weights that are cut over ranks, by tensor parallel or FSDP2, are gathered a tensor at a time, and the first
    of these ranks writes. The folder must be one that all ranks see.
    Raises on every rank: ValueError when the shards don't hold every layer once, FileExistsError (ValueError on the
    others) when a checkpoint is there already, what writing raises.
    """
    number = 0 if shards is None else dist.get_rank(shards)
    held: list[Any] = [None] * peers.world_size
    dist.all_gather_object(held, (number, decoder.shard))
    numbers = [place for place, _ in held]
    writers = [numbers.index(place) for place in sorted(set(numbers))]
    peers.agree(lambda: check_tiling([held[rank][1] for rank in writers]))
    path = peers.agree(lambda: new_folder(folder) if peers.rank == 0 else Path(folder))
    tensors = tensors_of(decoder, config, decoder.shard)
    is_writer = peers.rank == writers[number]
    mine = peers.agree(lambda: write_shard(tensors, path, number, len(writers)) if is_writer else None)
    found: list[Written | None] = [None] * peers.world_size
    dist.all_gather_object(found, mine)
    parts = [part for rank in writers if (part := found[rank]) is not None]
    dtype = next(decoder.parameters()).dtype
    model_id = decoder.shard.model_id
    peers.agree(lambda: write_index(path, config, model_id, dtype, parts) if peers.rank == 0 else None)
