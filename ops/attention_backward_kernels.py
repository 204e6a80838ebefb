"""The CUDA kernels of attention's gradients as an operator that writes into tensors it is given, and what they take.

attention_backward_out: dq, dk and dv from what the forward pass saved, see csrc/attention_backward. q [B, H, S, D],
k [B, H_kv, T, D], v [B, H_kv, T, Dv], out and dout [B, H, S, Dv]: bfloat16 or float16, head dims multiples of 8 up to
256, the last dimension contiguous, every row aligned to 16 bytes; dq, dk and dv like q, k and v. lse [B, H, S]: float32,
contiguous, the natural logarithm of the sum of the exponentials of a row's scores and sink, -inf where a row sees no
key; such a row has no gradient. mask: bool, float32 or q's dtype, its last dimension contiguous, with what
attention_tile_map says of it. seed: int64 [2] on the device, of the forward pass's dropout. The gradients of mask and
sinks are not the kernels'.

deterministic: the same bits whenever it is run. config: -1 lets the launcher choose, otherwise an index into its table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.registration import define

DTYPES = (torch.bfloat16, torch.float16)
BACKWARD = "attention_backward"  # of the table of configurations
_ALIGNMENT = 16
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # 100 KB an SM
define(
    "attention_backward_out(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
    "Tensor? tile_map, float scale, bool is_causal, float softcap, Tensor? sinks, float dropout_p, Tensor? seed, "
    "bool deterministic, int config, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()"
)


def can_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: object,
    softcap: object = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: object = 0.0,
) -> str:
    """Why the kernels cannot compute these gradients, "" when they can. Reads shapes, strides and dtypes only."""
    if q.dtype not in DTYPES:
        return f"no kernel for {q.dtype}"
    if not all(isinstance(value, (int, float)) for value in (scale, softcap, dropout_p)):
        return "scale, softcap or dropout_p is symbolic"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if reason := _cannot_read(name, tensor):
            return reason
    if library.capability(q.device) in _SMALL_SHARED_MEMORY and max(q.shape[-1], v.shape[-1]) > 128:
        return "no kernel for a head_dim above 128 on a device with so little shared memory"
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
    if masked_rows == "softmax" and mask.dtype != torch.bool:
        # The sum of a row of numbers like -3e38 cannot be told from its largest one.
        return "no kernel for rows in which every score is lowered to the same number"
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return f"no kernel for a mask in {mask.dtype}"
    if mask.dim() == 0 or mask.shape[-1] != k.shape[2] or mask.stride(-1) != 1:
        return "no kernel for a mask that is broadcast over keys"
    return ""


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not begin at multiples of 16 bytes or its elements lie apart."""
    size = tensor.element_size()
    places = [tensor.data_ptr(), *(stride * size for stride in tensor.stride()[:-1])]
    fits = tensor.stride(-1) == 1 and all(place % _ALIGNMENT == 0 for place in places)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    tile_map: Tensor | None,
    sinks: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
    config: int = -1,
) -> None:
    """Write dq, dk and dv. What is read is copied first where the kernels cannot read it as it lies in memory."""
    read = [_readable(tensor) for tensor in (dout, q, k, v, out)]
    torch.ops.infuse.attention_backward_out(
        *(*read, lse.contiguous(), mask, tile_map, scale, is_causal, softcap, sinks, dropout_p, seed),
        *(deterministic, config, dq, dk, dv),
    )
