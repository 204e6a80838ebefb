"""Norms, gated units and rotations in the spellings that people write them in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, HEAD, LENGTH, Plain, Register, SelfAttention, image

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


class _Gated(nn.Module):
    """Two projections, a core, a third."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48, bias=False), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.core(self.gate(x), self.up(x)))  # type: ignore[operator]
        return result


class _PackedGate(nn.Module):
    """One projection, a core that divides it, another projection."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core
        self.packed, self.down = nn.Linear(DIM, 96), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.core(self.packed(x)))  # type: ignore[operator]
        return result


class _Rotary(SelfAttention):
    """Attention whose queries and keys are rotated by a core."""

    def __init__(self, rotate: object) -> None:
        super().__init__(self.attend)
        self.rotate = rotate
        angles = torch.outer(torch.arange(LENGTH).float(), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.register_buffer("cos", angles.cos())  # [T, D / 2]
        self.register_buffer("sin", angles.sin())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.rotate(t, self.cos, self.sin) for t in (q, k))  # type: ignore[operator]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


_norm, _gate = Register("norm", _Weighted), Register("gate", _Gated)
_in_float = Register("norm", _WeightedInFloat)
_packed, _rope, _plain = Register("gate", _PackedGate), Register("rope", _Rotary), Register("norm", Plain)


def entries() -> list[Entry]:
    return [entry for register in (_norm, _in_float, _plain, _gate, _packed, _rope) for entry in register.entries]


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


# gates


@_gate.add(swiglu=1)
def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@_gate.add(swiglu=1)
def up_times_silu(gate: Tensor, up: Tensor) -> Tensor:
    return up * nn.SiLU()(gate)


@_gate.add(swiglu=1)
def silu_of_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


@_gate.add(swiglu=1)
def silu_in_float(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.float()).to(gate.dtype) * up


@_gate.add(swiglu=1)
def product_in_float(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@_gate.add(swiglu=1)
def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@_gate.add(swiglu=1)
def gelu_erf(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.gelu(gate)


@_gate.add(swiglu=1)
def gelu_new(gate: Tensor, up: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


@_gate.add(swiglu=1)
def gelu_of_erf(gate: Tensor, up: Tensor) -> Tensor:
    return gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0))) * up


@_gate.add(swiglu=1)
def quick_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate) * up


@_gate.add(swiglu=1)
def sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate) * up


@_gate.add(swiglu=1)
def relu(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate) * up


@_gate.add(swiglu=1)
def relu_squared(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate).square() * up


@_gate.add(swiglu=1)
def tanh(gate: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(gate) * up


@_gate.add(swiglu=1)
def mish(gate: Tensor, up: Tensor) -> Tensor:
    return F.mish(gate) * up


@_gate.add(swiglu=1)
def sigmoid_by_silu(gate: Tensor, up: Tensor) -> Tensor:
    """A gate over an activated branch."""
    return torch.sigmoid(gate) * F.silu(up)


@_gate.add(swiglu=1)
def residual(gate: Tensor, up: Tensor) -> Tensor:
    return up + torch.sigmoid(gate) * up.sin()


@_gate.add(swiglu=1, rms_norm=1)
def norm_of_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.rms_norm(F.silu(gate) * up, (48,))


@_gate.add(swiglu=1)
def clamped_oai(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss: clamped, and one is added to the other branch."""
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@_packed.add(swiglu=1)
def chunked(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


@_packed.add(swiglu=1)
def chunked_gate_second(y: Tensor) -> Tensor:
    up, gate = y.chunk(2, dim=-1)
    return up * F.gelu(gate)


@_packed.add(swiglu=1)
def split_by_size(y: Tensor) -> Tensor:
    gate, up = torch.split(y, 48, dim=-1)
    return up * F.silu(gate)


@_packed.add(swiglu=1)
def sliced(y: Tensor) -> Tensor:
    half = y.shape[-1] // 2
    return F.silu(y[..., :half]) * y[..., half:]


@_packed.add(swiglu=1)
def interleaved(y: Tensor) -> Tensor:
    return F.silu(y[..., ::2]) * y[..., 1::2]


@_packed.add(swiglu=1)
def reshaped(y: Tensor) -> Tensor:
    gate, up = y.unflatten(-1, (2, 48)).unbind(-2)
    return F.silu(gate) * up


@_packed.add(swiglu=1)
def glu_call(y: Tensor) -> Tensor:
    return F.glu(y, dim=-1)


@_gate.add(wrap=False, swiglu=1)
class ExpertsInOneProduct(nn.Module):
    """Every expert sees every token: batched products and a gate, then a router's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.gate_up = nn.Parameter(torch.randn(4, DIM, 32) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 16, DIM) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        gate, up = torch.bmm(flat.expand(4, -1, -1), self.gate_up).chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), self.down)
        weights = self.router(flat).softmax(-1)
        return (out * weights.t()[:, :, None]).sum(0).view_as(x)


@_gate.add(wrap=False, swiglu=1)
class LowRankUpdates(nn.Module):
    """LoRA beside both projections."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)
        self.a, self.b = nn.Linear(DIM, 4, bias=False), nn.Linear(4, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x) + 2.0 * self.b(self.a(x))
        return self.down(F.silu(gate) * self.up(x))


# rotations: x [B, H, T, D], cos and sin [T, D / 2]; queries and keys are a site each


@_rope.add(attention=1, rope=2)
def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), dim=-1).to(x.dtype) for t in (cos, sin))
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@_rope.add(attention=1, rope=2)
def rotate_half_by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.repeat(1, 2)[None, None] for t in (cos, sin))
    left, right = x.float().chunk(2, dim=-1)
    return ((x.float() * cos) + (torch.cat((-right, left), dim=-1) * sin)).type_as(x)


@_rope.add(attention=1, rope=2)
def rotate_every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.repeat_interleave(2, dim=-1).to(x.dtype) for t in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos) + (turned * sin)


@_rope.add(attention=1, rope=2)
def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(cos.float(), sin.float())
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


@_rope.add(attention=1, rope=2)
def pairs_stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


@_rope.add(attention=1, rope=2)
def halves_joined(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@_rope.add(attention=1, rope=2)
def halves_turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The other direction: the sine's sign is turned."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


@_rope.add(attention=1, rope=2)
def part_of_a_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :4], x[..., 4:]
    cos, sin = (torch.cat((t[:, :2], t[:, :2]), -1).to(x.dtype) for t in (cos, sin))
    half = torch.cat((-turned[..., 2:], turned[..., :2]), -1)
    return torch.cat((turned * cos + half * sin, rest), dim=-1)


@_rope.add(attention=1, rope=2)
def angles_in_the_graph(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2]).float(), 10.0 ** -torch.arange(0, 1, 2 / HEAD))
    angles = torch.cat((angles, angles), dim=-1)
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat((-right, left), dim=-1) * angles.sin().to(x.dtype)


@_rope.add(attention=1, rope=2, rms_norm=2)
def norm_then_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = F.rms_norm(x, (HEAD,))
    cos, sin = (torch.cat((t, t), dim=-1).to(x.dtype) for t in (cos, sin))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
