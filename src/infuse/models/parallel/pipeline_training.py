"""Training of shards in a pipeline, a process each: the schedules of torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from infuse.models.config import ModelConfig, has_tied_head
from infuse.models.decoder import ShardTransformerDecoder

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [b, S, V], targets [b, S]) -> the mean loss of a micro-batch."""
SCHEDULES: dict[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PipelineTraining:
    """This process's shard as a stage of a pipeline, whose ranks are those of `group` in order.

    schedule: "1f1b", which holds the activations of as many micro-batches as there are stages, or "gpipe", which holds
    all of them. A tied head that is a shard's own weight starts as the first shard's embedding, and gets its gradients
    too. decoder: on the device to train on; compiled, if so, before or after.
    Raises ValueError for an unknown schedule, and for 1f1b with fewer micro-batches than stages.
    """

    def __init__(
        self,
        decoder: ShardTransformerDecoder,
        config: ModelConfig,
        group: dist.ProcessGroup,
        *,
        num_microbatches: int,
        schedule: str = "1f1b",
        loss: Loss = cross_entropy,
    ) -> None:
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        least = self._size if schedule == "1f1b" else 1
        if schedule not in SCHEDULES or num_microbatches < least:
            expected = f"expected one of {', '.join(SCHEDULES)} and at least {least}"
            got = f"got schedule={schedule!r} and num_microbatches={num_microbatches}"
            raise ValueError(f"PipelineTraining: {got}, {expected}")
        self.decoder = decoder
        self._config, self._group, self._loss = config, group, loss
        self._num_microbatches, self._schedule = num_microbatches, SCHEDULES[schedule]
        self._schedules: dict[tuple[int, int], Any] = {}
        weight = next(decoder.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._tied = self._tied_weight()
        if self._tied is not None:
            other = self._exchanged(self._tied.detach())
            if decoder.shard.is_last_layer:
                self._tied.data.copy_(other)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """The mean loss of a batch, the same on every rank; its gradients are left in the parameters.

        tokens, targets: [B, S] int64, the same on every rank. B a multiple of num_microbatches, else ValueError.
        """
        batch_size, length = tokens.shape
        if batch_size % self._num_microbatches:
            got = f"got {batch_size} rows and num_microbatches={self._num_microbatches}"
            raise ValueError(f"PipelineTraining: {got}, expected the rows to be a multiple")
        self.decoder.zero_grad(set_to_none=True)  # the schedule scales what it finds there
        schedule = self._of_shape(batch_size // self._num_microbatches, length)
        losses: list[Tensor] = []
        first, last = self.decoder.shard.is_first_layer, self.decoder.shard.is_last_layer
        inputs = (tokens.to(self._device).contiguous(),) if first else ()
        labels = {"target": targets.to(self._device), "losses": losses, "return_outputs": False} if last else {}
        schedule.step(*inputs, **labels)
        if self._tied is not None:
            assert self._tied.grad is not None
            self._tied.grad += self._exchanged(self._tied.grad)
        mean = torch.stack(losses).mean().detach().float() if last else torch.zeros((), device=self._device)
        dist.broadcast(mean, group=self._group, group_src=self._size - 1)
        return mean.item()

    def _of_shape(self, batch_size: int, length: int) -> Any:
        """The schedule of micro-batches of that shape; its stage has buffers of one shape only."""
        key = (batch_size, length)
        if key not in self._schedules:
            hidden = torch.empty(*key, self._config.embed_dim, dtype=self._dtype, device="meta", requires_grad=True)
            shard = self.decoder.shard
            inputs = torch.empty(key, dtype=torch.int64, device="meta") if shard.is_first_layer else hidden
            logits = torch.empty(*key, self._config.vocab_size, device="meta", requires_grad=True)
            output = logits if shard.is_last_layer else hidden
            stage = PipelineStage(
                self.decoder, self._rank, self._size, self._device, (inputs,), (output,), group=self._group
            )
            self._schedules[key] = self._schedule(stage, self._num_microbatches, loss_fn=self._loss)
        return self._schedules[key]

    def _tied_weight(self) -> nn.Parameter | None:
        """The embedding on the first rank, the head on the last, when they are one weight in two places."""
        shard = self.decoder.shard
        at_an_end = shard.is_first_layer or shard.is_last_layer
        if self._size == 1 or not at_an_end or not has_tied_head(self._config, shard.model_id):
            return None
        name = "tok_embeddings.weight" if shard.is_first_layer else "output.weight"
        weight: nn.Parameter = self.decoder.get_parameter(name)
        return weight

    def _exchanged(self, tensor: Tensor) -> Tensor:
        """What the other end of the pipeline has."""
        other, peer = torch.empty_like(tensor), self._size - 1 - self._rank
        calls = [
            dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        return other
