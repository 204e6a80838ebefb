"""The gradients of attention by cuDNN, through torch's operator, in layouts that nobody else's calls have.

torch keeps the graphs that it builds for cuDNN by the sizes and strides of q, k and v (MHAParams in
aten/src/ATen/native/cudnn/MHA.cpp, torch 2.11 and main of 2026). How dout and out lie in memory is built in, too, but
is no part of the key: the first call of a process decides, and later ones with another dout give gradients that have
nothing to do with the right ones, silently. Stock compile's dout is contiguous, eager code's often has its heads
inside. Here k has a stride of its own, and dout and out lie as q does: one key, one layout. This can go when torch's
key has all strides.

attention_cudnn_backward(dout, q, k, v, out, lse, mask, scale, is_causal) -> dq, dk, dv: as infuse::attention_bwd.
sdpa_cudnn_backward: the same as aten::_scaled_dot_product_cudnn_attention_backward. CUDA only.
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


def _order(tensor: Tensor) -> list[int]:
    """The dimensions from outer to inner."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def _laid_out(tensor: Tensor, order: Sequence[int], padding: int = 0) -> Tensor:
    """The tensor dense in this order of dimensions, elements of padding behind each index of the outermost one."""
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= tensor.shape[dim]
    strides[order[0]] += padding
    if all(size == 1 or old == new for size, old, new in zip(tensor.shape, tensor.stride(), strides)):
        return tensor.as_strided(tensor.shape, strides)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def with_own_key(dout: Tensor, q: Tensor, k: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dout, k and out in the layouts that the module's text names."""
    order = _order(q)
    return _laid_out(dout, order), _laid_out(k, _order(k), _PADDING), _laid_out(out, order)


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **scale: Any
) -> Any:
    """torch's operator, with layouts that are no other call's."""
    dout, padded, out = with_own_key(dout, q, k, out)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, padded, v, out, lse.contiguous(), *rest, **scale
    )


def _laid_out_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the layout that torch.empty_like gives the tensor's."""
    strides = torch.empty_like(tensor, device="meta").stride()
    if gradient.stride() == strides:
        return gradient
    return torch.empty_like(tensor).copy_(gradient)


def _sdpa_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **scale: Any) -> Any:
    found = _gradients(grad_out, query, key, value, *rest, **scale)
    return tuple(map(_laid_out_like, found, (query, key, value)))


def _sdpa_results(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Any, scale: float, is_causal: bool
) -> tuple[Tensor, ...]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the random state of dropout
    sizes = (None, None, q.shape[2], k.shape[2], 0.0, is_causal)
    rest = (lse.unsqueeze(-1), unused, unused, cudnn_bias(q, k, mask), *sizes)
    return tuple(heads_inside(gradient) for gradient in _gradients(dout, q, k, v, out, *rest, scale=scale))


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
implement("sdpa_cudnn_backward", _sdpa_backward, "CompositeExplicitAutograd")
register_fake("sdpa_cudnn_backward", _sdpa_results)
