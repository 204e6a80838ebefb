"""The map of a mask's tiles, computed once in a graph for all layers and heads that share the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.lowering import inductor


def tile_map(mask: Any, queries: Any, keys: Any) -> Any:
    """The IR node of infuse::attention_tile_map for a mask; queries, keys: the sizes of the scores."""
    realized = inductor.in_memory(inductor.inline(_narrow, inductor.in_memory(mask)))
    layout = realized.get_layout()
    place = (
        realized.get_name(),
        *(tuple(map(str, sizes)) for sizes in (layout.size, layout.stride)),
        str(layout.offset),
    )
    made: dict[object, Any] = inductor.kept_for_graph("attention_tile_maps")
    key = (place, str(queries), str(keys))
    if key not in made:
        (made[key],) = inductor.call_operator(torch.ops.infuse.attention_tile_map.default, realized, queries, keys)
    return made[key]


def _narrow(mask: Tensor) -> Tensor:
    """The mask without copies of itself along batch and heads."""
    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask
