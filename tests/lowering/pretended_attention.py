"""The kernels of attention as the lowering sees them, computed by the formula on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops.attention import attention_bwd_ref, attention_fwd_ref


def forward_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tile_map: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    sinks: Tensor | None,
    nan: bool,
    dropout_p: float,
    seed: Tensor | None,
    config: int,
    splits: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """attention_forward_out, which demands a map for every mask."""
    assert (mask is None) == (tile_map is None)
    masked_rows = "nan" if nan else "zeros"
    flags: Any = (mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)
    found, sums = attention_fwd_ref(q, k, v, *flags)
    out.copy_(found)
    if lse is not None:
        lse.copy_(sums)


def backward_on_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    tile_map: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    deterministic: bool,
    config: int,
    *gradients: Tensor,
) -> None:
    """attention_backward_out, which demands a map for every mask."""
    assert (mask is None) == (tile_map is None)
    flags: Any = (mask, scale, is_causal, False, softcap, sinks, "zeros", dropout_p, seed)
    for gradient, found in zip(gradients, attention_bwd_ref(dout, q, k, v, out, lse, *flags)):
        gradient.copy_(found)


def sdpa_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """dq, dk and dv of SDPA, without autograd, which operators' implementations do not have."""
    batch, kv_heads, length, _ = k.shape
    shared = [tensor.repeat_interleave(q.shape[1] // kv_heads, 1) for tensor in (k, v)]
    scores = q @ shared[0].mT * scale
    p = torch.softmax(scores if bias is None else scores + bias, -1)
    dp = dout @ shared[1].mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dk, dv = ((of.mT @ by).view(batch, kv_heads, -1, length, by.shape[-1]).sum(2) for of, by in ((ds, q), (p, dout)))
    return ds @ shared[0], dk, dv
