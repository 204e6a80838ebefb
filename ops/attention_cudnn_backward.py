"""SDPA's backward in cuDNN, as it stands in compiled graphs: an operator that cannot be called.

sdpa_cudnn_backward has the arguments of aten::_scaled_dot_product_cudnn_attention_backward, which
infuse.lowering.cudnn_attention makes of it, over tensors that lie so that its gradients are right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops.registration import define, register_fake

define(
    "sdpa_cudnn_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor philox_seed, Tensor philox_offset, Tensor? attn_bias, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)"
)


def _results(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


register_fake("sdpa_cudnn_backward", _results)
