"""One shard a process: tokens go in at the first, hidden states from each to the next, logits come back to all.

Generation uses torch.distributed's point-to-point calls. A schedule of torch.distributed.pipelining does not fit it:
its stages fix all shapes with their first step, where a prompt and a token differ, cut every argument along its first
dimension, where a mask may have one row for all, and leave the logits on the last rank, where the others need them to
choose the same token. There would be nothing to overlap either: a token needs the one before.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from infuse.models.shard import check_tiling
from infuse.models.sharded import ShardedGeneralModel


class PipelineEngine:
    """A `ShardChain` over processes: this one's shard, and the ranks of `group`, which hold the shards in order.

    `models` is this process's shard alone. Every rank makes it at the same time; raises ValueError on each when the
    ranks don't hold every layer once, in order, or differ in configuration, dtype or caches.
    """

    def __init__(self, model: ShardedGeneralModel, group: dist.ProcessGroup) -> None:
        mine = (model.shard, model.config, model.dtype, model.use_cache, model.max_generated_tokens)
        held: list[tuple[object, ...]] = [()] * dist.get_world_size(group)
        dist.all_gather_object(held, mine, group)
        check_tiling([shard for shard, *_ in held])  # type: ignore[misc]
        if any(other[1:] != mine[1:] for other in held):
            raise ValueError("PipelineEngine: got shards of different configurations, dtypes or caches, expected one")
        self.models = [model]
        self._group = group
        self._rank, self._last = dist.get_rank(group), dist.get_world_size(group) - 1

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None, curr_pos: int = 0
    ) -> Tensor:
        """Logits [B, S, vocab_size] fp32, the same bits on every rank, each of which gives the same arguments.

        See `ShardedGeneralModel.generate`. Wrong arguments are an error on each rank before any of them waits. All of
        a prompt's logits travel to every rank; a long one is better read in several calls.
        """
        model = self.models[0]
        model.check(tokens, mask, input_pos, curr_pos)
        hidden_state = None if self._rank == 0 else self._receive(*tokens.shape)
        hidden_state, logits = model.generate(
            tokens if self._rank == 0 else None, mask, input_pos, hidden_state, curr_pos
        )
        if self._last == 0:
            assert logits is not None
            return logits
        if hidden_state is not None:
            dist.send(hidden_state.contiguous(), group=self._group, group_dst=self._rank + 1)
        if logits is None:
            logits = torch.empty(*tokens.shape, model.config.vocab_size, device=model.device)
        dist.broadcast(logits, group=self._group, group_src=self._last)
        return logits

    def _receive(self, batch_size: int, length: int) -> Tensor:
        model = self.models[0]
        hidden_state = torch.empty(batch_size, length, model.config.embed_dim, dtype=model.dtype, device=model.device)
        dist.recv(hidden_state, group=self._group, group_src=self._rank - 1)
        return hidden_state
