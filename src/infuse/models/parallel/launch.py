"""A checkpoint opened over all processes of a torchrun job, ready to generate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from infuse.models.checkpoint import check_checkpoint, load_sharded_model, load_weights
from infuse.models.hugging_face_config import load_model_config
from infuse.models.parallel.pipeline import PipelineEngine
from infuse.models.parallel.process_group import Peers, process_group
from infuse.models.parallel.tensor_parallel import keep_local_weights, parallel_model
from infuse.models.shard import split_layers
from infuse.models.sharded import ShardedGeneralModel


@contextlib.contextmanager
def open_engine(
    folder: str | Path,
    *,
    num_shards: int,
    tensor_parallel: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_generated_tokens: int = 1024,
    compile_with: Callable[[nn.Module], None] | None = None,
    timeout_s: float = 60.0,
) -> Iterator[PipelineEngine]:
    """The decoder of a Hugging Face folder over num_shards x tensor_parallel processes; a context.

    Every process that torchrun started calls it with the same arguments and then `generate` with the same ones. Ranks
    that follow each other hold the parts of one shard; each reads its own layers' tensors, and of these its own parts.
    device, timeout_s: see `process_group`; dtype: None for the configuration's. compile_with: is given this process's
    decoder, such as `lambda decoder: decoder.compile(backend="infuse")`.
    Raises ValueError for another number of processes and for heads that don't divide, PeerLostError when a process is
    lost, and on every process what `load_sharded_model` raises on one.
    """
    _check_world_size(num_shards, tensor_parallel)
    with process_group(device, timeout_s=timeout_s) as peers:
        names = ("shard", "tensor")
        mesh = init_device_mesh(peers.device.type, (num_shards, tensor_parallel), mesh_dim_names=names)
        options = {"dtype": dtype, "max_generated_tokens": max_generated_tokens}
        model = peers.agree(lambda: _load(folder, mesh, peers, options))
        if compile_with is not None:
            compile_with(model.model)
        yield PipelineEngine(model, mesh.get_group("shard"))


def _load(folder: str | Path, mesh: DeviceMesh, peers: Peers, options: dict[str, Any]) -> ShardedGeneralModel:
    """This process's part of the model. Talks to nobody."""
    config = load_model_config(folder)
    shards = split_layers(Path(folder).resolve().name, config.num_layers, mesh.size(0))
    shard = shards[mesh.get_local_rank("shard")]
    layers = f"layers {shard.start_layer}-{shard.end_layer}"
    if mesh.size(1) == 1:
        peers.describe(layers)
        return load_sharded_model(folder, shard, device=peers.device, **options)
    peers.describe(f"part {mesh.get_local_rank('tensor') + 1} of {mesh.size(1)} of {layers}")
    check_checkpoint(folder, shard)  # before there is memory for a weight
    model = parallel_model(config, shard, mesh["tensor"], peers.device, **options)
    load_weights(model, folder)
    keep_local_weights(model.model, mesh["tensor"])
    return model


def _check_world_size(num_shards: int, tensor_parallel: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if min(num_shards, tensor_parallel) < 1 or started != num_shards * tensor_parallel:
        got = f"got {num_shards} shards, tensor_parallel={tensor_parallel} and {started} processes"
        remedy = "torchrun --nproc-per-node is how many start on a machine"
        raise ValueError(f"open_engine: {got}, expected as many processes as shards times tensor_parallel; {remedy}")
