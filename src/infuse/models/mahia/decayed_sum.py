"""The state that MetaAttentionKernel carries along a sequence: a sum whose past decays, without a loop over positions.

Within chunks and from chunk to chunk the decays are small lower triangular matrices, so that all is products of
matrices; Mamba-2 arranges its scan in the same two levels (arXiv 2405.21060).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.models.mahia.full_precision import outside_autocast, widened


def decayed_sum(values: Tensor, log_decay: Tensor, chunk_size: int = 64) -> Tensor:
    """y[t] = exp(log_decay[t]) * y[t - 1] + values[t], with y[-1] = 0.

    values [..., L, D], log_decay [..., L], at most 0 -> [..., L, D] in the dtype of `values`. Half precision is
    computed in float32, under autocast too. Memory besides the result: L * chunk_size + (L / chunk_size)^2 numbers a
    sequence.
    """
    with outside_autocast(values.device):
        return _decayed_sum(widened(values), widened(log_decay), chunk_size).to(values.dtype)


def _decayed_sum(values: Tensor, log_decay: Tensor, chunk_size: int) -> Tensor:
    length = values.shape[-2]
    chunk = min(chunk_size, length)
    padding = -length % chunk
    x = F.pad(values, (0, 0, 0, padding)).unflatten(-2, (-1, chunk))  # [..., N, C, D]
    within = F.pad(log_decay, (0, padding)).unflatten(-1, (-1, chunk)).cumsum(-1)  # [..., N, C]
    local = _decays(within, within, diagonal=0) @ x
    until = within[..., -1].cumsum(-1)  # the decay from the start to each chunk's end, [..., N]
    carried = _decays(until - within[..., -1], until, diagonal=-1) @ local[..., -1, :]  # into each chunk, [..., N, D]
    total = local + within.exp().unsqueeze(-1) * carried.unsqueeze(-2)
    result: Tensor = total.flatten(-3, -2)[..., :length, :]
    return result


def _decays(later: Tensor, earlier: Tensor, diagonal: int) -> Tensor:
    """exp(later[t] - earlier[s]) for s <= t + diagonal, else 0: [..., T, T]."""
    difference = later.unsqueeze(-1) - earlier.unsqueeze(-2)
    size = difference.shape[-1]
    past = torch.ones(size, size, dtype=torch.bool, device=later.device).tril(diagonal)
    return difference.masked_fill(~past, float("-inf")).exp()
