"""The CUDA kernels of attention's gradients as an operator that writes into tensors it is given, and what they take.

attention_backward_out: dq, dk and dv from what the forward pass saved, see csrc/attention_backward. q [B, H, S, D],
k [B, H_kv, T, D], v [B, H_kv, T, Dv], out and dout [B, H, S, Dv]; dq, dk and dv like q, k and v; what all must be like
says infuse.ops.attention_operands. lse [B, H, S]: float32, contiguous, the natural logarithm of the sum of the
exponentials of a row's scores and sink, -inf where a row sees no key; such a row has no gradient. mask: with what
attention_tile_map says of it. seed: int64 [2] on the device, of the forward pass's dropout. The gradients of mask and
sinks are not the kernels'.

deterministic: the same bits whenever it is run. config: -1 lets the launcher choose, otherwise an index into its table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops.attention_operands import DTYPES as DTYPES
from infuse.ops.attention_operands import cannot_take, readable
from infuse.ops.registration import define

# The operators that the kernels serve.
OPERATORS = ("attention_bwd",)
BACKWARD = "attention_backward"  # of the table of configurations
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
    if mask is not None and mask.requires_grad:
        return "no kernel for the gradient of a mask"
    if masked_rows == "softmax" and mask is not None and mask.dtype != torch.bool:
        # The sum of a row of numbers like -3e38 cannot be told from its largest one.
        return "no kernel for rows in which every score is lowered to the same number"
    return cannot_take(q, k, v, mask, (scale, softcap, dropout_p), sinks, masked_rows, most_of_small=128)


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
    read = [readable(tensor) for tensor in (dout, q, k, v, out)]
    torch.ops.infuse.attention_backward_out(
        *(*read, lse.contiguous(), mask, tile_map, scale, is_causal, softcap, sinks, dropout_p, seed),
        *(deterministic, config, dq, dk, dv),
    )
