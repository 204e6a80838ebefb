"""Training on several ranks with their own part of each batch: weights, gradients and optimiser states cut by FSDP2.

The recommended way to compile is layer by layer, as `compile_layers` does: FSDP gathers and frees a layer's weights in
hooks around it, which a compiler can't see into, so a whole compiled model falls apart there anyway, at as many graphs
as layers; compiled by layers all have one graph, which is compiled once. What a norm loses in both is the sum at the
end of the layer before it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from infuse.models.decoder import ShardTransformerDecoder


def shard_data_parallel(
    decoder: ShardTransformerDecoder,
    mesh: DeviceMesh,
    *,
    precision: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Cuts a decoder's weights over a mesh of one dimension, in place: each layer by itself, the rest together.

    Each rank then calls it with its own rows of a batch; a mean loss over equally many tokens on every rank gives the
    gradients of the whole batch. precision: which dtype weights are gathered, gradients summed and outputs given in;
    None for the weights' own. reshard_after_forward: gather a layer again for its backward instead of keeping it.
    Composes with tensor parallel, which comes first: `parallelize(decoder, config, mesh["tensor"])`, then this with
    mesh["data"]. All ranks must start from the same weights, such as a checkpoint's.
    """
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for layer in decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(decoder, reshard_after_forward=False, **options)  # its backward comes at once


def compile_layers(decoder: nn.Module, **options: Any) -> None:
    """Compiles each of a decoder's layers by itself; options: as for torch.compile, such as backend="infuse"."""
    for layer in decoder.get_submodule("layers").children():
        layer.compile(fullgraph=True, **options)
