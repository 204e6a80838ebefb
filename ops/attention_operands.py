"""What all kernels of attention demand of their operands, and how to meet it where tensors lie in memory otherwise.

q, k, v bfloat16 or float16, head dims multiples of 8 up to 256, the last dimension contiguous, every row aligned to 16
bytes; a mask bool, float32 or of q's dtype, its last dimension contiguous; sinks float32 or of q's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import library

DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # 100 KB an SM


def cannot_take(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    numbers: tuple[object, ...],
    sinks: Tensor | None,
    masked_rows: str,
    *,
    most_of_small: int,
) -> str:
    """Why no kernel takes these, "" when one may. Reads shapes, strides and dtypes only.

    numbers: scale and others that must be known while compiling. most_of_small: the largest head_dim on a device with
    little shared memory.
    """
    if q.dtype not in DTYPES:
        return f"no kernel for {q.dtype}"
    if not all(isinstance(value, (int, float)) for value in numbers):
        return "scale, softcap or dropout_p is symbolic"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if reason := _cannot_read(name, tensor):
            return reason
    if library.capability(q.device) in _SMALL_SHARED_MEMORY and max(q.shape[-1], v.shape[-1]) > most_of_small:
        return f"no kernel for a head_dim above {most_of_small} on a device with so little shared memory"
    if sinks is not None and sinks.dtype not in (q.dtype, torch.float32):
        return f"no kernel for sinks in {sinks.dtype}"
    return "" if mask is None else _cannot_mask(q, k, mask, masked_rows)


def _cannot_read(name: str, tensor: Tensor) -> str:
    head_dim = tensor.shape[-1]
    if not isinstance(head_dim, int) or head_dim % 8 or not 0 < head_dim <= 256:
        return f"no kernel for a head_dim of {head_dim} ({name})"
    if tensor.stride(-1) != 1:
        return f"no kernel for a last dimension of stride {tensor.stride(-1)} ({name})"
    odd = [stride for stride in tensor.stride()[:-1] if isinstance(stride, int) and stride % 8]
    return f"no kernel for rows of {name} that begin {odd[0]} elements apart" if odd else ""


def _cannot_mask(q: Tensor, k: Tensor, mask: Tensor, masked_rows: str) -> str:
    if masked_rows == "mean":
        return "no kernel for the mean of all values in masked rows"
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return f"no kernel for a mask in {mask.dtype}"
    if mask.dim() == 0 or mask.shape[-1] != k.shape[2] or mask.stride(-1) != 1:
        return "no kernel for a mask that is broadcast over keys"
    return ""


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not begin at multiples of 16 bytes or its elements lie apart.

    Addresses cannot be seen while compiling.
    """
    places = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1])]
    fits = tensor.stride(-1) == 1 and all(place % _ALIGNMENT == 0 for place in places)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
