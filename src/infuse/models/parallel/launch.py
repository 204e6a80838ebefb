"""A checkpoint opened over all processes of a torchrun job, ready to generate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from infuse.models.checkpoint import load_sharded_model
from infuse.models.hugging_face_config import load_model_config
from infuse.models.parallel.pipeline import PipelineEngine
from infuse.models.parallel.process_group import process_group
from infuse.models.shard import split_layers
from infuse.models.sharded import ShardedGeneralModel


@contextlib.contextmanager
def open_engine(
    folder: str | Path,
    *,
    num_shards: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_generated_tokens: int = 1024,
    compile_with: Callable[[nn.Module], None] | None = None,
    timeout_s: float = 60.0,
) -> Iterator[PipelineEngine]:
    """The decoder of a Hugging Face folder over num_shards processes; a context.

    Every process that torchrun started calls it with the same arguments and then `generate` with the same ones. Each
    reads the tensors of its own layers only. device, timeout_s: see `process_group`; dtype: None for the
    configuration's. compile_with: is given this process's decoder, such as `lambda m: m.compile(backend="infuse")`.
    Raises ValueError for another number of processes, PeerLostError when one is lost, and on every process what
    `load_sharded_model` raises on one.
    """
    _check_world_size(num_shards)
    with process_group(device, timeout_s=timeout_s) as peers:
        mesh = init_device_mesh(peers.device.type, (num_shards,), mesh_dim_names=("shard",))
        number = mesh.get_local_rank("shard")

        def load() -> ShardedGeneralModel:
            config = load_model_config(folder)
            shard = split_layers(Path(folder).resolve().name, config.num_layers, num_shards)[number]
            peers.describe(f"layers {shard.start_layer}-{shard.end_layer}")
            return load_sharded_model(
                folder, shard, device=peers.device, dtype=dtype, max_generated_tokens=max_generated_tokens
            )

        model = peers.agree(load)
        if compile_with is not None:
            compile_with(model.model)
        yield PipelineEngine(model, mesh.get_group("shard"))


def _check_world_size(num_shards: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_shards < 1 or started != num_shards:
        remedy = "torchrun --nproc-per-node is how many start"
        raise ValueError(f"open_engine: got {num_shards} shards and {started} processes, expected as many; {remedy}")
