"""Norms as research code spells them now and then, and what only resembles them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, Register

_EPS = 1e-5


class _Normed(nn.Module):
    """A core with a weight between two linear layers."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core
        self.proj, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.core(self.proj(x), self.weight))  # type: ignore[operator]
        return result


class _InFloat(_Normed):
    """The same, on float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(self.proj(x).float(), self.weight.float())  # type: ignore[operator]
        result: Tensor = self.out(y.to(x.dtype))
        return result


_norm = Register("unusual", _Normed)
_float_norm = Register("unusual", _InFloat)


def entries() -> list[Entry]:
    return [*_norm.entries, *_float_norm.entries]


@_float_norm.add(rms_norm=1)
def by_vector_norm(x: Tensor, w: Tensor) -> Tensor:
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / rms.clamp(min=1e-8) * w


@_float_norm.add()
def by_norm_and_eps(x: Tensor, w: Tensor) -> Tensor:
    """eps beside the root: no operator has it."""
    rms = x.norm(2, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return w * (x / (rms + 1e-8))


@_float_norm.add()
def partial_statistic(x: Tensor, w: Tensor) -> Tensor:
    """RMSNorm of the first quarter of the features, applied to all."""
    part = x[..., : x.shape[-1] // 4]
    return x * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + _EPS) * w


@_float_norm.add()
def length_with_one_scale(x: Tensor, w: Tensor) -> Tensor:
    """ScaleNorm: a unit length times one learned number."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=_EPS) * w[:1]


@_norm.add(rms_norm=1)
def root_weight_and_root_of_width(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, p=2.0, dim=-1, eps=1e-12) * (x.shape[-1] ** 0.5) * (w + 1)


@_norm.add(rms_norm=1)
def einsum_of_squares(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    mean = torch.einsum("...d,...d->...", h, h)[..., None] / h.shape[-1]
    return (h * torch.rsqrt(mean + _EPS)).to(x.dtype) * w


@_norm.add(rms_norm=1)
def squares_through_float(x: Tensor, w: Tensor) -> Tensor:
    ms = x.float().square().mean(dim=-1, keepdim=True)
    return (x * (ms + _EPS).rsqrt().to(x.dtype)) * w


@_norm.add(rms_norm=1)
def divided_in_place(x: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h.div(h.pow(2).mean(-1, keepdim=True).add(_EPS).sqrt())
    return h.to(x.dtype).mul(w)


@_norm.add(rms_norm=1)
def under_autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + _EPS)
        return (h * w.float()).to(x.dtype)


@_norm.add(rms_norm=1)
def with_weight_outside_autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast(device_type="cpu", enabled=False):
        h = x.to(torch.float32)
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + _EPS)).to(x.dtype)
    return w * h


@_norm.add(rms_norm=1)
def functional_of_parts(x: Tensor, w: Tensor) -> Tensor:
    return torch.mul(torch.mul(x, torch.rsqrt(torch.add(torch.mean(torch.mul(x, x), -1, True), _EPS))), w)


@_float_norm.add(layer_norm=1)
def by_moments_of_einsum(x: Tensor, w: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = x.var(-1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + _EPS) * w


@_float_norm.add(layer_norm=1)
def mean_of_squares_minus_square(x: Tensor, w: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    var = (x * x).mean(dim=-1, keepdim=True) - mean * mean
    return w * ((x - mean) / (var + _EPS).sqrt())


@_float_norm.add(layer_norm=1)
def var_mean_unpacked(x: Tensor, w: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    return torch.addcmul(torch.zeros_like(w), (x - mean) / torch.sqrt(var + _EPS), w)


@_float_norm.add(layer_norm=1)
def weight_in_statistic(x: Tensor, w: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (w * (centred.square().mean(-1, keepdim=True) + _EPS).rsqrt())


@_float_norm.add()
def whitened_over_rows(x: Tensor, w: Tensor) -> Tensor:
    """Statistics over the batch."""
    mean, var = x.mean(0, keepdim=True), x.var(0, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + _EPS) * w


@_float_norm.add()
def mean_absolute(x: Tensor, w: Tensor) -> Tensor:
    """A norm of absolute values."""
    return x / (x.abs().mean(-1, keepdim=True) + _EPS) * w
