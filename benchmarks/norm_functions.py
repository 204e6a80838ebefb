"""Norms as models spell them, each with its reference in the dtype of the inputs throughout (fp64 when checking)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


def hugging_face(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's norm in transformers: statistics in fp32, cast, then the weight."""
    dtype = x.dtype
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(variance + EPS)
    return weight * normed.to(dtype)


def torchtune(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's norm in torchtune: all of it in fp32, the cast last."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight=weight, eps=EPS).to(x.dtype)


def builtin(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight=weight, eps=EPS)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return hugging_face(total, weight), total


def add_norm_exact(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return exact(total, weight), total


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return layer_norm(total, weight, bias), total


def gate_first(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Mamba-2's norm in transformers."""
    wide = x.float() * F.silu(gate.float())
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def gate_first_exact(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return exact(x * F.silu(gate), weight)


def gate_last(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Gated DeltaNet's norm in flash-linear-attention."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight
    return (normed * F.silu(gate.float())).to(x.dtype)


def gate_last_exact(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return exact(x, weight) * F.silu(gate)


def heads(packed: Tensor, weight: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """q and k [tokens, heads, head_dim] inside a packed projection [tokens, (q + k + v heads) * head_dim]."""
    split = packed.unflatten(-1, (num_heads + 2 * num_kv_heads, weight.shape[-1]))
    return split[:, :num_heads], split[:, num_heads : num_heads + num_kv_heads]


def qk_norm(packed: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3's norms of queries and keys, 32 and 8 heads."""
    q, k = heads(packed, q_weight, 32, 8)
    return hugging_face(q, q_weight), hugging_face(k, k_weight)


def qk_norm_exact(packed: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    q, k = heads(packed, q_weight, 32, 8)
    return exact(q, q_weight), exact(k, k_weight)


# --- between what surrounds them in a model -------------------------------------------------------------------------


def pointwise_context(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(hugging_face(x * 2 + residual, weight)) + 1


def pointwise_context_torchtune(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(torchtune(x * 2 + residual, weight)) + 1


def pointwise_context_exact(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(exact(x * 2 + residual, weight)) + 1


def residual_chain(x: Tensor, residual: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two residual adds with a norm each, a cheap branch between them instead of a layer's projections."""
    total = residual + x
    total = total + F.silu(torchtune(total, first))
    return torchtune(total, second), total


def residual_chain_exact(x: Tensor, residual: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    total = total + F.silu(exact(total, first))
    return exact(total, second), total


def after_projection(x: Tensor, bias: Tensor, projection: Tensor, weight: Tensor) -> Tensor:
    return torchtune(torch.addmm(bias, x, projection), weight)


def after_projection_exact(x: Tensor, bias: Tensor, projection: Tensor, weight: Tensor) -> Tensor:
    return exact(torch.addmm(bias, x, projection), weight)


def before_projection(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    return hugging_face(x, weight) @ projection


def before_projection_exact(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    return exact(x, weight) @ projection


def between_projections(x: Tensor, residual: Tensor, projection: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder layer's middle: output projection, residual add and norm, the next projection."""
    normed, total = add_norm(x @ projection, residual, weight)
    return normed @ projection, total


def between_projections_exact(x: Tensor, residual: Tensor, projection: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    normed, total = add_norm_exact(x @ projection, residual, weight)
    return normed @ projection, total
