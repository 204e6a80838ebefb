"""Parameters that are cut over the ranks of a mesh, as DTensors: which part of the whole a process holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_cut(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def held(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, cut or whole: the same memory."""
    part: Tensor = tensor.to_local() if is_cut(tensor) else tensor
    return part


def gathered(tensor: Any) -> Tensor:
    """The whole of it, cut or not. Every rank that holds a part must call it."""
    whole: Tensor = tensor.full_tensor() if is_cut(tensor) else tensor
    return whole


def own_part(tensor: Any) -> tuple[slice, ...]:
    """What this rank holds of each dimension of a DTensor, cut as torch.chunk cuts, one mesh dimension after another.

    Raises NotImplementedError for a placement that is neither whole nor cut in that way.
    """
    bounds = [(0, size) for size in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise NotImplementedError(f"checkpoint: got a parameter placed as {placement}, expected Shard or Replicate")
        start, stop = bounds[placement.dim]
        length = -(-(stop - start) // tensor.device_mesh.size(mesh_dim))
        rank = tensor.device_mesh.get_local_rank(mesh_dim)
        begin = min(start + rank * length, stop)
        bounds[placement.dim] = (begin, min(begin + length, stop))
    return tuple(slice(*bound) for bound in bounds)
