"""The kernels of attention as operators that allocate their results, as training needs them: forwards with the
log-sum-exp, and backwards.

attention_forward(q, k, v, ...) -> out, lse; attention_backward(dout, q, k, v, out, lse, ...) -> dq, dk, dv. Shapes and
arguments as of infuse::attention_fwd and infuse::attention_bwd; tile_map: what infuse::attention_tile_map found in the
mask, None without one; nan_for_masked_rows: what a row gives that sees no key, zeros otherwise. The results' heads lie
inside, as [B, S, H, D] in memory. CUDA only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import attention_backward_kernels, attention_kernels  # noqa: F401, defines what is called
from infuse.ops.attention import empty_heads_inside
from infuse.ops.attention_operands import readable
from infuse.ops.registration import define, implement, register_fake

_FLAGS = (
    "Tensor? mask, Tensor? tile_map, float scale, bool is_causal, float softcap, Tensor? sinks, "
    "bool nan_for_masked_rows, float dropout_p, Tensor? seed"
)
define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_FLAGS}, int config) -> (Tensor, Tensor)")
define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_FLAGS.replace('bool nan_for_masked_rows, ', '')}, bool deterministic, int config) -> (Tensor, Tensor, Tensor)"
)


def _forward_results(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_heads_inside(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_results(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_heads_inside(tensor, tensor.shape[3]) for tensor in (q, k, v))
    return dq, dk, dv


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tile_map: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    sinks: Tensor | None,
    nan_for_masked_rows: bool,
    dropout_p: float,
    seed: Tensor | None,
    config: int,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_results(q, k, v)
    q, k, v = (readable(tensor) for tensor in (q, k, v))
    flags = (scale, is_causal, softcap, sinks, nan_for_masked_rows, dropout_p, seed, config, 0)
    torch.ops.infuse.attention_forward_out(q, k, v, mask, tile_map, *flags, out, lse)
    return out, lse


def _backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    results = _backward_results(dout, q, k, v)
    dout, q, k, v, out = (readable(tensor) for tensor in (dout, q, k, v, out))
    flags = (scale, is_causal, softcap, sinks, dropout_p, seed, deterministic, config)
    torch.ops.infuse.attention_backward_out(dout, q, k, v, out, lse.contiguous(), mask, tile_map, *flags, *results)
    return results


implement("attention_forward", _forward, "CompositeExplicitAutograd")
implement("attention_backward", _backward, "CompositeExplicitAutograd")
register_fake("attention_forward", _forward_results)
register_fake("attention_backward", _backward_results)
