"""Norms in the spellings that people write them in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, Plain, Register, image

_EPS = 1e-5


class _Weighted(nn.Module):
    """A norm with a weight and a bias between two linear layers."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core
        self.proj = nn.Linear(DIM, DIM)
        self.weight, self.bias = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.core(self.proj(x), self.weight, self.bias))  # type: ignore[operator]
        return result


class _WeightedInFloat(_Weighted):
    """The same, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        result: Tensor = self.out(self.core(h.float(), self.weight.float(), self.bias.float()).to(x.dtype))  # type: ignore[operator]
        return result


_norm, _in_float = Register("norm", _Weighted), Register("norm", _WeightedInFloat)
_plain = Register("norm", Plain)


def entries() -> list[Entry]:
    return [*_norm.entries, *_in_float.entries, *_plain.entries]


@_norm.add(rms_norm=1)
def hugging_face(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + _EPS)
    return w * h.to(x.dtype)


@_norm.add(rms_norm=1)
def weight_before_cast(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt((h * h).mean(dim=-1, keepdim=True) + _EPS) * w).type_as(x)


@_norm.add(rms_norm=1)
def weight_and_offset(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + _EPS)
    return (h * (1.0 + w.float())).type_as(x)


@_in_float.add(rms_norm=1)
def over_square_root(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + _EPS) * w


@_in_float.add(rms_norm=1)
def to_minus_one_half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + _EPS) ** -0.5 * w


@_in_float.add(rms_norm=1)
def power_call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.pow(torch.mean(torch.square(x), -1, True) + _EPS, -0.5))


@_in_float.add(rms_norm=1)
def sum_over_size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + _EPS) * w


@_in_float.add(rms_norm=1)
def clamped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * x.pow(2).mean(-1, keepdim=True).clamp(min=_EPS).rsqrt() * w


@_in_float.add(rms_norm=1)
def clamped_by_maximum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = torch.mean(x * x, dim=-1, keepdim=True)
    return x / torch.maximum(mean, torch.full_like(mean, _EPS)).sqrt() * w


@_in_float.add(rms_norm=1)
def reciprocal_of_root(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    inverse = 1.0 / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + _EPS)
    return x * inverse * w


@_in_float.add(rms_norm=1)
def without_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS)


@_in_float.add(rms_norm=1)
def scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS)))


@_in_float.add(rms_norm=1)
def with_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS)) + b


@_in_float.add(rms_norm=1)
def unsqueezed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1) + _EPS)[..., None] * w


@_in_float.add(rms_norm=1)
def negative_axis_by_number(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(x.dim() - 1, keepdim=True) + _EPS) * w


@_in_float.add(rms_norm=1)
def euclidean_length(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The length by a call, times n ** -0.5; eps outside the root."""
    return x / (x.norm(2, dim=-1, keepdim=True) * DIM**-0.5 + _EPS) * w


@_in_float.add(rms_norm=1)
def normalize_times_root(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """lucidrains: F.normalize times the root of the size."""
    return F.normalize(x, dim=-1) * DIM**0.5 * w


@_norm.add(rms_norm=1)
def statistic_in_own_dtype(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS) * w


@_norm.add(layer_norm=1)
def layer_statistic_in_own_dtype(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + _EPS) + b


@_norm.add(rms_norm=1)
def call_of_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (DIM,), w, _EPS)


@_norm.add(rms_norm=1)
def call_in_float(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (DIM,), w.float(), _EPS).to(x.dtype)


@_norm.add(rms_norm=2)
def residual_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x + F.rms_norm(x, (DIM,), w, _EPS)
    return h + F.rms_norm(h, (DIM,), b, _EPS)


@_norm.add(rms_norm=1, swiglu=1)
def gate_then_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x * F.silu(x @ torch.eye(DIM, dtype=x.dtype))
    return F.rms_norm(h, (DIM,), w, _EPS)


@_norm.add(rms_norm=1, swiglu=1)
def norm_then_gate(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = x @ torch.eye(DIM, dtype=x.dtype)
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + _EPS)
    return (w * h.to(x.dtype)) * F.silu(z)


@_norm.add(layer_norm=1)
def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,), w, b, _EPS)


@_norm.add(layer_norm=1)
def layer_without_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,), w, None, _EPS)


@_norm.add(layer_norm=1)
def layer_without_weights(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,))


@_in_float.add(layer_norm=1)
def layer_of_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + _EPS) * w + b


@_in_float.add(layer_norm=1)
def layer_of_squares(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return w * ((x - u) / torch.sqrt(s + _EPS)) + b


@_norm.add(layer_norm=1)
def layer_centred_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + _EPS)
    return (w.float() * h).to(x.dtype)


@_in_float.add(layer_norm=1)
def layer_of_var_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + _EPS) * w + b


@_in_float.add(layer_norm=1)
def layer_of_unbiased_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The Annotated Transformer: n - 1 in the deviation, eps outside the root."""
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + _EPS) + b


@_in_float.add(layer_norm=1)
def layer_of_moments(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - mean.pow(2) + _EPS) * w + b


@_norm.add(layer_norm=1)
def layer_plus_one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,)) * (1 + w) + b


@_norm.add(layer_norm=2)
def layer_post_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.layer_norm(x + F.relu(x), (DIM,), w, b, _EPS)
    return F.layer_norm(h + F.relu(h), (DIM,), w, b, _EPS)


@_plain.add(layer_norm=1)
def layer_over_two_dims(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-2:])


@_plain.add(inputs=image, wrap=False, layer_norm=1)
class ChannelsLast(nn.Module):
    """ConvNeXt: permuted, normalised, permuted back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(DIM), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
