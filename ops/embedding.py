"""Embedding whose gradient is summed without a table of float32.

    y[...] = weight[indices[...]]
    dweight[v] = sum of dy[i] over all i with indices[i] = v

Shapes: weight [V, D]; indices [...], integers from 0 to V - 1; y [..., D]. Dtypes: any float; the sums are float32 for
narrower ones, rounded once. Rows of dy at `padding_idx` count nothing; -1 is none.

torch's formula adds dy into [V, D] of float32 and rounds that. Of the V rows at most as many change as there are
indices: here those are added up among themselves, and the rest of dweight is written once, in its own dtype. For 4,096
tokens and Llama 3's 128,256 x 4,096 in bfloat16 that is 1.2 GB of memory traffic instead of 5.3 GB, and no 2.1 GB at
the peak.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.registration import register_differentiable

ARGUMENTS = "Tensor weight, Tensor indices, int padding_idx=-1"


def _check(weight: Tensor, indices: Tensor) -> None:
    checks.floating("embedding", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"infuse::embedding: weight: got {weight.dim()} dimensions, expected 2 [V, D]")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"infuse::embedding: indices: got {indices.dtype}, expected int64 or int32")


def embedding_ref(weight: Tensor, indices: Tensor, padding_idx: int = -1) -> Tensor:
    """The formula in plain torch. Returns y [..., D]."""
    _check(weight, indices)
    return F.embedding(indices, weight, None if padding_idx < 0 else padding_idx)


def embedding_bwd_ref(dy: Tensor, indices: Tensor, rows: int, padding_idx: int = -1) -> Tensor:
    """dweight [rows, D] in dy's dtype."""
    indices, dy = indices.reshape(-1), dy.reshape(-1, dy.shape[-1])
    wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
    if padding_idx >= 0:
        wide = wide.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    places = torch.arange(indices.shape[0], device=indices.device)
    # Of equal indices one stands for all: whichever was written last.
    standing = torch.zeros(rows, dtype=torch.int64, device=indices.device).index_put((indices,), places)[indices]
    sums = torch.zeros_like(wide).index_add(0, standing, wide)
    # Equal indices write equal sums.
    return dy.new_zeros(rows, dy.shape[-1]).index_put((indices,), sums[standing].to(dy.dtype))


def embedding_fake(weight: Tensor, indices: Tensor, padding_idx: int = -1) -> Tensor:
    _check(weight, indices)
    return weight.new_empty((*indices.shape, weight.shape[1]))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows, ctx.padding_idx = weight.shape[0], padding_idx
        return torch.ops.infuse.embedding(weight, indices, padding_idx)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return embedding_bwd_ref(dy, indices, ctx.rows, ctx.padding_idx), None, None


register_differentiable(
    "embedding",
    ARGUMENTS,
    "Tensor",
    implementation=embedding_ref,
    inline=embedding_ref,
    fake=embedding_fake,
    autograd=_Embedding.apply,
)
