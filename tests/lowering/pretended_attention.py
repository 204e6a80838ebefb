"""The kernels of attention as the lowering sees them, computed by the formula on the CPU."""

from __future__ import annotations

from typing import Any

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
