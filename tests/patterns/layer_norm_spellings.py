"""Ways to write LayerNorm that become one operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

D = 16
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def called(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w, b)


def called_in_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.layer_norm(x, [D], weight=w, bias=b, eps=1e-6)


def called_with_a_number(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-6)


def called_with_the_node_of_a_size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + 1, x.size()[2:], w, b, 1e-6)


def called_with_weight_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w, None, 1e-5)


def called_with_bias_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), bias=b)


def called_without_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def called_then_scaled_and_shifted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,)) * w + b


def called_then_shifted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return b + F.layer_norm(x, (D,), eps=1e-6)


def called_in_float32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (D,), w.float(), b.float()).type_as(x)


def olmo(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.to(dtype=torch.float32), (D,), None, None, eps=1e-5).to(x.dtype)


def nemotron(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w + 1, b, 1e-5)


CALLS = (
    called,
    called_in_torch,
    called_with_a_number,
    called_with_the_node_of_a_size,
    called_with_weight_alone,
    called_with_bias_alone,
    called_without_affine,
    called_then_scaled_and_shifted,
    called_then_shifted,
    called_in_float32,
    olmo,
    nemotron,
)


def mean_and_rsqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.mean(-1, keepdim=True)
    return (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b).to(x.dtype)


def bert_in_tensorflow_style(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    u = h.mean(-1, keepdim=True)
    s = (h - u).pow(2).mean(-1, keepdim=True)
    h = (h - u) / torch.sqrt(s + 1e-12)
    return w * h.to(x.dtype) + b


def biased_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean, var = h.mean(dim=-1, keepdim=True), h.var(dim=-1, keepdim=True, unbiased=False)
    return ((h - mean) / (var + 1e-5).sqrt() * w + b).to(x.dtype)


def variance_with_correction(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    var = torch.var(h, -1, correction=0, keepdim=True)
    return ((h - torch.mean(h, -1, keepdim=True)) * (var + 1e-5) ** -0.5).to(x.dtype) * w + b


def variance_by_position(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    r = 1.0 / torch.sqrt(torch.var(h, -1, False, True) + 1e-5)
    return (h.sub(h.mean(-1, True)) * r).type_as(x) * w + b


def joint_mean_and_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    var, mean = torch.var_mean(h, dim=-1, correction=0, keepdim=True)
    return torch.addcmul(b.float(), (h - mean) * torch.rsqrt(var + 1e-5), w.float()).to(x.dtype)


def weight_multiplied_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean, var = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
    return (w * (h - mean) / torch.sqrt(var + 1e-6) + b).to(x.dtype)


def unit_offset(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.mean(-1, keepdim=True)
    return (d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5) * (1 + w.float()) + b.float()).to(x.dtype)


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    h = w.to(torch.float32) * h
    return h.to(x.dtype)


def mean_by_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.sum(-1, keepdim=True) / x.shape[-1]
    var = torch.square(d).sum(-1, keepdim=True) / x.size(-1)
    return (d * torch.rsqrt(var + 1e-5)).to(x.dtype) * w + b


def narrow_x_beside_wide_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.float().mean(-1, keepdim=True)
    var = x.float().var(-1, keepdim=True, correction=0)
    return w * ((x - mean) * torch.rsqrt(var + 1e-5)).to(x.dtype) + b


def reduced_dimension(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.mean(-1)[..., None]
    return (d * torch.rsqrt(h.var(-1, unbiased=False) + 1e-5).unsqueeze(-1)).to(x.dtype) * w + b


def biased_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return ((h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True, unbiased=False)).to(x.dtype) * w + b


def one_pass_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    var = (h * h).mean(-1, keepdim=True) - mean**2
    return ((h - mean) * torch.rsqrt(var + 1e-5)).to(x.dtype) * w + b


BY_HAND = (
    mean_and_rsqrt,
    bert_in_tensorflow_style,
    biased_variance,
    variance_with_correction,
    variance_by_position,
    joint_mean_and_variance,
    weight_multiplied_first,
    unit_offset,
    cohere,
    mean_by_sum,
    narrow_x_beside_wide_statistics,
    reduced_dimension,
    biased_deviation,
    one_pass_variance,
)
SPELLINGS = CALLS + BY_HAND


def tensors(
    dtype: torch.dtype = torch.float32, training: bool = False, affine: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 3, D], w [D] and b [D]"""
    x, w, b = torch.randn(2, 3, D) + 0.5, torch.randn(D) * 0.3 + 1, torch.randn(D)
    wide = affine or dtype
    return tuple(t.requires_grad_(training) for t in (x.to(dtype), w.to(wide), b.to(wide)))  # type: ignore[return-value]
