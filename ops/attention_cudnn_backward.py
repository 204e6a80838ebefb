"""The gradients of attention by cuDNN, through torch's operator, in layouts that nobody else's calls have.

torch keeps the graphs that it builds for cuDNN by the sizes and strides of q, k and v (MHAParams in
aten/src/ATen/native/cudnn/MHA.cpp, torch 2.11 and main of 2026). How dout and out lie in memory is built in, too, but
is no part of the key: the first call of a process decides, and later ones with another dout give gradients that have
nothing to do with the right ones, silently. Stock compile's dout is contiguous, eager code's often has its heads
inside. Here k has a stride of its own, and dout and out lie as q does: one key, one layout. This can go when torch's
key has all strides.

attention_cudnn_backward(dout, q, k, v, out, lse, mask, scale, is_causal) -> dq, dk, dv: as infuse::attention_bwd, CUDA
only.
sdpa_cudnn_backward stands in compiled graphs for aten::_scaled_dot_product_cudnn_attention_backward, whose arguments it
has. It cannot be called: infuse.lowering.cudnn_attention makes of it torch's operator over tensors that lie so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infuse.ops.attention import empty_heads_inside, heads_inside
from infuse.ops.registration import define, implement, register_fake

_PADDING = 8  # elements: rows still begin at multiples of 16 bytes
define(
    "attention_cudnn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
    "float scale, bool is_causal) -> (Tensor, Tensor, Tensor)"
)
define(
    "sdpa_cudnn_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor philox_seed, Tensor philox_offset, Tensor? attn_bias, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)"
)


def order_of(strides: Sequence[int]) -> list[int]:
    """The dimensions from outer to inner."""
    return sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))


def strides_in(order: Sequence[int], sizes: Sequence[Any], *, is_key: bool = False) -> list[Any]:
    """Dense in this order of dimensions; of k with padding behind each index of the outermost one. Sizes may be
    symbolic."""
    strides: list[Any] = [0] * len(sizes)
    step: Any = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= sizes[dim]
    strides[order[0]] += _PADDING if is_key else 0
    return strides


def _laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    if all(size == 1 or old == new for size, old, new in zip(tensor.shape, tensor.stride(), strides)):
        return tensor.as_strided(tensor.shape, strides)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def with_own_key(dout: Tensor, q: Tensor, k: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dout, k and out in the layouts that the module's text names."""
    like_q = strides_in(order_of(q.stride()), q.shape)
    own = strides_in(order_of(k.stride()), k.shape, is_key=True)
    return _laid_out(dout, like_q), _laid_out(k, own), _laid_out(out, like_q)


def _sdpa_results(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Any, scale: float, is_causal: bool
) -> tuple[Tensor, ...]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the random state of dropout
    sizes = (None, None, q.shape[2], k.shape[2], 0.0, is_causal)
    rest = (lse.unsqueeze(-1).contiguous(), unused, unused, cudnn_bias(q, k, mask), *sizes)
    dout, padded, out = with_own_key(dout, q, k, out)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(dout, q, padded, v, out, *rest, scale=scale)
    return tuple(map(heads_inside, found))


def _backward_results(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(empty_heads_inside(tensor, tensor.shape[3]) for tensor in (q, k, v))


def cudnn_bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as torch's operators for cuDNN take it: numbers in q's dtype, [B, H, S, T]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf"))
    return mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])


implement("attention_cudnn_backward", _backward, "CompositeExplicitAutograd")
register_fake("attention_cudnn_backward", _backward_results)
register_fake("sdpa_cudnn_backward", _sdpa_results)
