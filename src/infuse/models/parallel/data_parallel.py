"""Training on several ranks with their own part of each batch: weights, gradients and optimiser states cut by FSDP2.

The recommended way to compile is piece by piece, as `compile_pieces` does: each layer, and the last norm, head and loss
together. FSDP gathers and frees a layer's weights in hooks around it, which a compiler can't see into, so a whole
compiled model falls apart there anyway, in as many graphs as layers; compiled by layers all have one graph, which is
compiled once. What a layer's first norm loses in both is the sum at the end of the layer before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from infuse.models.decoder import ShardTransformerDecoder
from infuse.models.parallel.pipeline_training import Loss, cross_entropy


class DecoderWithLoss(nn.Module):
    """tokens, targets [B, S] int64 -> the mean loss of a decoder that has all layers.

    As one module, so that FSDP keeps the head's weight gathered for the loss: a compiler sees both together then, and
    need not have the logits in memory. Its parameters are the decoder's, under `decoder.`.
    Raises ValueError for a decoder that is only a shard.
    """

    def __init__(self, decoder: ShardTransformerDecoder, loss: Loss = cross_entropy) -> None:
        super().__init__()
        if not (decoder.shard.is_first_layer and decoder.shard.is_last_layer):
            raise ValueError(f"DecoderWithLoss: got {decoder.shard}, expected a decoder with all layers")
        self.decoder = decoder
        self._loss = loss
        self._end: Callable[[Tensor, Tensor], Tensor] = self.end

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h: Tensor = self.decoder.tok_embeddings(tokens)
        for layer in self.decoder.layers:
            h = layer(h)
        return self._end(h, targets)

    def end(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss from what the last layer gives."""
        return self._loss(self.decoder.unembed(h), targets)

    def compile_pieces(self, **options: Any) -> None:
        """Compiles each layer and the end by themselves; options: as for torch.compile, such as backend="infuse"."""
        for layer in self.decoder.layers:
            layer.compile(fullgraph=True, **options)
        self._end = torch.compile(self.end, fullgraph=True, **options)


def shard_data_parallel(
    model: DecoderWithLoss,
    mesh: DeviceMesh,
    *,
    precision: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Cuts a model's weights over a mesh of one dimension, in place: each layer by itself, the rest together.

    Each rank then calls it with its own rows of a batch; the mean over equally many tokens on every rank gives the
    gradients of the whole batch. precision: which dtype weights are gathered, gradients summed and outputs given in;
    None for the weights' own. reshard_after_forward: gather a layer again for its backward instead of keeping it.
    Composes with tensor parallel, which comes first: `parallelize(decoder, config, mesh["tensor"])`, then this with
    mesh["data"]. All ranks must start from the same weights, such as a checkpoint's.
    """
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for layer in model.decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # its backward comes at once
