"""What a mask does to each tile of 64 queries by 64 keys, computed once for all heads and layers that share the mask.

    attention_tile_map(mask, queries, keys) -> uint8 [Bm, Hm, ceil(queries / 64), ceil(keys / 64)]

mask: bool (True attends) or float (added to scores), at most four dimensions, broadcastable to [B, H, queries, keys]
with all keys; Bm and Hm are its own first sizes, 1 for those it lacks.
0: no row of the tile sees a key, so the tile can be skipped. 1: the mask must be applied. 2: the mask changes nothing.
Keys and queries beyond the last do not count. An additive mask shows a key above -1e30, since masks are often filled
with the smallest number of their dtype; but where a row of the 64 has nothing else, any number above -inf counts in
that block of rows, as the softmax of such a row is that of its filling.

On CUDA the kernels of csrc/attention compute it; they need a contiguous last dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops.registration import register

TILE = 64
HIDDEN, MASKED, OPEN = 0, 1, 2
_FILLED = -1e30


def tile_map_fake(mask: Tensor, queries: int, keys: int) -> Tensor:
    batch, heads = _four_dims(mask).shape[:2]
    return mask.new_empty((batch, heads, -(-queries // TILE), -(-keys // TILE)), dtype=torch.uint8)


def tile_map_ref(mask: Tensor, queries: int, keys: int) -> Tensor:
    """By the definition, in plain torch."""
    mask = _four_dims(mask)
    full = mask.expand(*mask.shape[:2], queries, keys)
    if full.dtype == torch.bool:
        sees, changed = _any_of_tile(full), _any_of_tile(~full)
    else:
        high = ~(full <= _FILLED)
        rows_see = F.pad(high.any(-1), (0, -queries % TILE), value=True).unflatten(-1, (-1, TILE)).all(-1)
        sees = torch.where(rows_see[..., None], _any_of_tile(high), _any_of_tile(full != float("-inf")))
        changed = _any_of_tile(full != 0)
    return torch.where(sees, torch.where(changed, MASKED, OPEN), HIDDEN).to(torch.uint8)


def _four_dims(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _any_of_tile(full: Tensor) -> Tensor:
    """[..., queries, keys] -> [..., ceil(queries / 64), ceil(keys / 64)]"""
    queries, keys = full.shape[-2:]
    padded = F.pad(full, (0, -keys % TILE, 0, -queries % TILE))
    tiles: Tensor = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    return tiles.any(-1).any(-2)


register(
    "attention_tile_map",
    "Tensor mask, SymInt queries, SymInt keys",
    "Tensor",
    implementation=tile_map_ref,
    fake=tile_map_fake,
)
