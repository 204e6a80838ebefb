"""Decoders over processes whose weights follow from their names, so that every way to cut them is the same model."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from implementations import optional
from model_shapes import Shape
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

MODEL_ID = "benchmark"
CHUNK = 256  # the logits of more tokens at a time are large


def config_of(shape: Shape, max_seq_len: int) -> Any:
    return optional("infuse.models.config").ModelConfig(
        vocab_size=shape.vocab_size,
        embed_dim=shape.dim,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.dim // shape.heads,
        max_seq_len=max_seq_len,
        intermediate_dim=shape.hidden,
        num_layers=shape.layers,
        rope_base=500_000.0,
        torch_dtype=shape.dtype,
    )


@torch.no_grad()
def fill(decoder: nn.Module, config: Any, shard: Any) -> None:
    """Gives each parameter, or this rank's part of it, values drawn for its name: activations stay of about one."""
    for entry in optional("infuse.models.checkpoint_layout").entries(decoder, config, shard):
        seed = zlib.crc32(entry.name.encode())
        generator = torch.Generator(entry.local.device).manual_seed(seed)
        whole = torch.randn(entry.parameter.shape, generator=generator, device=entry.local.device)
        is_norm = whole.dim() == 1
        whole = 1 + 0.2 * whole if is_norm else whole * whole.shape[-1] ** -0.5
        entry.local.copy_(entry.from_checkpoint(whole[entry.part] if entry.part else whole))


def engine(
    config: Any,
    cut: tuple[int, int],
    mesh: DeviceMesh | None,
    device: torch.device,
    length: int,
    dtype: torch.dtype | None = None,
) -> Any:
    """Something that generates: cut is (shards, ways of tensor parallel), over the mesh's dimensions shard and tensor;
    without a mesh one process. Its caches hold `length` tokens whatever the prompt. dtype: None for the config's."""
    shards, ways = cut
    sharded, shard_of = optional("infuse.models.sharded"), optional("infuse.models.shard")
    tensor_parallel = optional("infuse.models.parallel.tensor_parallel")
    number = 0 if mesh is None else mesh.get_local_rank("shard")
    shard = shard_of.split_layers(MODEL_ID, config.num_layers, shards)[number]
    options: dict[str, Any] = {"max_generated_tokens": length - chunk_of(length), "dtype": dtype}
    if mesh is None or ways == 1:
        model = sharded.ShardedGeneralModel(config, shard, device, **options)
        fill(model.model, config, shard)
    else:
        model = tensor_parallel.parallel_model(config, shard, mesh["tensor"], device, **options)
        fill(model.model, config, shard)
        tensor_parallel.keep_local_weights(model.model, mesh["tensor"])
    if mesh is None:
        return sharded.ShardChain([model])
    group: dist.ProcessGroup = mesh.get_group("shard")
    return optional("infuse.models.parallel.pipeline").PipelineEngine(model, group)


def tokens_of(vocab_size: int, batch: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(7)
    return torch.randint(vocab_size, (batch, length), generator=generator).to(device)


def chunk_of(length: int) -> int:
    """How many tokens of a prompt that fills half of caches of that length are read at a time."""
    return min(CHUNK, length // 2)


def read_prompt(chain: Any, prompt: Tensor, chunk: int) -> None:
    for start in range(0, prompt.shape[1], chunk):
        chain.generate(prompt[:, start : start + chunk], curr_pos=start)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute the reference in: wide beside `dtype`, and quick enough for billions of weights."""
    return torch.float64 if dtype == torch.float32 else torch.float32
