"""Norms, gated units, rotations and masks as research code spells them now and then, and what only resembles them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, HEAD, Plain, Register, SelfAttention, image

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


class _Widened(nn.Module):
    """One projection to twice the width, a core that divides it, another projection."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core, self.wide, self.narrow = core, nn.Linear(DIM, 96, bias=False), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.narrow(self.core(self.wide(x)))  # type: ignore[operator]
        return result


class _TwoProjections(nn.Module):
    def __init__(self, core: object) -> None:
        super().__init__()
        self.core, self.a, self.b, self.c = core, nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.core(self.a(x), self.b(x)))  # type: ignore[operator]
        return result


class _Turned(SelfAttention):
    """Attention whose queries and keys [B, H, T, D] a core rotates."""

    def __init__(self, rotate: object) -> None:
        super().__init__(self.attend)
        self.rotate = rotate
        self.register_buffer("inv_freq", 100.0 ** -torch.arange(0, 1, 2 / HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rotate(q, self.inv_freq), self.rotate(k, self.inv_freq)  # type: ignore[operator]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


_norm, _float_norm = Register("unusual", _Normed), Register("unusual", _InFloat)
_packed, _gate = Register("unusual", _Widened), Register("unusual", _TwoProjections)
_rope, _attention, _plain = Register("unusual", _Turned), Register("unusual", SelfAttention), Register("unusual", Plain)


def entries() -> list[Entry]:
    registers = (_norm, _float_norm, _packed, _gate, _rope, _attention, _plain)
    return [entry for register in registers for entry in register.entries]


# Norms


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


# Gated units


@_packed.add(swiglu=1)
def unflattened(x: Tensor) -> Tensor:
    gate, up = x.unflatten(-1, (2, -1)).unbind(-2)
    return F.silu(gate) * up


@_packed.add(swiglu=1)
def viewed_and_indexed(x: Tensor) -> Tensor:
    halves = x.view(*x.shape[:-1], 2, x.shape[-1] // 2)
    return halves[..., 1, :] * F.gelu(halves[..., 0, :])


@_packed.add(swiglu=1)
def narrowed(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x.narrow(-1, half, half) * torch.sigmoid(x.narrow(-1, 0, half))


@_packed.add(swiglu=1)
def tensor_split(x: Tensor) -> Tensor:
    a, b = torch.tensor_split(x, 2, dim=-1)
    return F.relu(a).pow(2) * b


@_packed.add(swiglu=1)
def activation_in_place(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    a = F.silu(a.clone(), inplace=True)
    return a.mul_(b)


@_packed.add(swiglu=1)
def written_out(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a / (1 + torch.exp(-a)) * b


@_packed.add(swiglu=1)
def glu_of_swapped_halves(x: Tensor) -> Tensor:
    return F.glu(torch.cat(x.chunk(2, -1)[::-1], dim=-1), dim=-1)


@_packed.add()
def bilinear(x: Tensor) -> Tensor:
    """No activation."""
    a, b = x.chunk(2, dim=-1)
    return a * b


@_gate.add(swiglu=1)
def erf_written_out(a: Tensor, b: Tensor) -> Tensor:
    return b * (0.5 * a * (1.0 + torch.erf(a / math.sqrt(2.0))))


@_gate.add(swiglu=1)
def laplace_of_float(a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(a.float()) * b.float()).to(a.dtype)


@_gate.add(swiglu=1)
def scaled_and_limited(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.clamp(max=7.0), b.clamp(min=-7.0, max=7.0)
    return (b + 1) * (a * torch.sigmoid(1.702 * a))


@_gate.add(swiglu=1)
def residual_between(a: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(a) * b + b


@_gate.add()
def highway(a: Tensor, b: Tensor) -> Tensor:
    """Carry and transform gates of one sigmoid: a mixture of two values, and no gated MLP."""
    t = torch.sigmoid(a)
    return t * b + (1 - t)


@_gate.add(swiglu=1)
def torch_calls(a: Tensor, b: Tensor) -> Tensor:
    return torch.multiply(torch.nn.functional.hardswish(a), b)


@_gate.add()
def sum_of_activations(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) + F.silu(b)


@_plain.add(inputs=image, swiglu=1)
class ChannelGate(nn.Module):
    """A 1 x 1 convolution's halves along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in, self.project_out = nn.Conv2d(DIM, 2 * DIM, 1, bias=False), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.project_in(x).chunk(2, dim=1)
        return self.project_out(F.gelu(x1) * x2)


# Rotations


@_rope.add(attention=1, rope=2)
def by_index_of_positions(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2], device=x.device).float()[:, None] * inv_freq.float()
    table = torch.cat((angles, angles), -1)
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


@_rope.add(attention=1, rope=2)
def halves_written_apart(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], dim=-1)


@_rope.add(attention=1, rope=2)
def written_into_empty(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


@_rope.add(attention=1, rope=2)
def matrices_of_two(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    turns = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).unflatten(-1, (2, 2))
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


@_rope.add(attention=1, rope=2)
def signs_and_rolled(x: Tensor, inv_freq: Tensor) -> Tensor:
    """The turned half by roll and a vector of signs."""
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float()).repeat(1, 2)
    half = x.shape[-1] // 2
    sign = torch.cat((-torch.ones(half), torch.ones(half))).to(x)
    return x * angles.cos().to(x.dtype) + torch.roll(x, half, dims=-1) * sign * angles.sin().to(x.dtype)


@_rope.add(attention=1, rope=2)
def scaled_tables(x: Tensor, inv_freq: Tensor) -> Tensor:
    """YaRN: interpolated frequencies, tables times a factor."""
    ramp = torch.linspace(0, 1, inv_freq.shape[0], device=x.device).clamp(0, 1)
    inv_freq = inv_freq.float() / 4 * (1 - ramp) + inv_freq.float() * ramp
    freqs = torch.outer(torch.arange(x.shape[2], device=x.device, dtype=torch.float32), inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = (emb.cos() * 1.1386).to(x.dtype), (emb.sin() * 1.1386).to(x.dtype)
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


@_rope.add(attention=1, rope=4)
def rows_and_columns(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Each half of a head by its own axis."""
    at = torch.arange(x.shape[2], device=x.device)

    def turn(y: Tensor, positions: Tensor) -> Tensor:
        angles = positions.float()[:, None] * inv_freq.float()[: y.shape[-1] // 2]
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        y1, y2 = y.chunk(2, -1)
        return (y * cos + torch.cat((-y2, y1), -1) * sin).to(y.dtype)

    a, b = x.chunk(2, dim=-1)
    return torch.cat((turn(a, at // 3), turn(b, at % 3)), dim=-1)


@_rope.add(attention=1)
def added_sinusoid(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Positions added, nothing turned."""
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    return x + torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype)


@_rope.add(attention=1)
def turned_by_data(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Looks like a rotation, but the second half has the wrong sign."""
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), inv_freq.float())
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos - a * sin), -1)


# Masks


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


@_attention.add(attention=1)
def one_minus_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[-2]
    mask = torch.tril(torch.ones(t, t, device=q.device, dtype=q.dtype))
    return (_scores(q, k) - 1e4 * (1 - mask)).softmax(-1) @ v


@_attention.add(attention=1)
def zeros_and_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[-2]
    keep = torch.tril(torch.ones(t, t, dtype=torch.bool, device=q.device))
    bias = torch.zeros(t, t, dtype=q.dtype, device=q.device).masked_fill_(keep.logical_not(), float("-inf"))
    return F.softmax(_scores(q, k) + bias, dim=-1) @ v


@_attention.add(attention=1)
def multiplied_then_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2's first code: scores times the mask, minus a large number times its complement."""
    t = q.shape[-2]
    b = torch.tril(torch.ones(t, t, device=q.device)).view(1, 1, t, t).to(q.dtype)
    w = _scores(q, k)
    w = w * b - 1e4 * (1 - b)
    return F.softmax(w, dim=-1) @ v


@_attention.add(attention=1)
def chunks_with_a_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A position sees its own chunk of two and the one before, causally."""
    at = torch.arange(q.shape[-2], device=q.device)
    chunk = at // 2
    seen = (chunk[:, None] - chunk[None, :] <= 1) & (at[:, None] >= at[None, :])
    return _scores(q, k).masked_fill(~seen, float("-inf")).softmax(-1) @ v


@_attention.add(attention=1)
def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first three tokens see each other, the rest is causal."""
    at = torch.arange(q.shape[-2], device=q.device)
    seen = (at[None, :] <= at[:, None]) | (at[None, :] < 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@_attention.add(attention=1)
def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2], device=q.device)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance % 2 == 0)
    return torch.where(seen, _scores(q, k), torch.tensor(-1e9, dtype=q.dtype)).softmax(-1) @ v


@_attention.add(attention=1)
def band_of_triangles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[-2]
    band = torch.ones(t, t, device=q.device).triu(-2).tril(2)
    return _scores(q, k).masked_fill(band == 0, torch.finfo(q.dtype).min).softmax(-1) @ v


@_attention.add(attention=1)
def filled_by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[-2]
    scores = _scores(q, k)
    hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1).expand_as(scores)
    scores[hidden] = float("-inf")
    return scores.softmax(dim=-1) @ v


@_attention.add(attention=1)
def exclusive_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


@_attention.add(attention=1)
def log_softmax_then_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(_scores(q, k), dim=-1).exp() @ v


@_attention.add(attention=1)
def scaled_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens first: einsum over a head axis in the middle."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    weights = torch.einsum("ibhd,jbhd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(3)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).permute(1, 2, 0, 3)


@_attention.add(attention=1)
def inner_product_by_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A product written as a broadcast and a sum, on both sides."""
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


@_attention.add(attention=1, random=True)
def dropped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whole keys dropped in training by a mask of random numbers."""
    mask = (torch.rand(q.shape[0], 1, 1, k.shape[-2], device=q.device) < 0.1).to(q.dtype)
    return (_scores(q, k) + mask * -1e12).softmax(-1) @ v


@_attention.add(attention=1)
def softmax_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One more in the denominator, by exponentials."""
    weights = torch.exp(_scores(q, k))
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


@_attention.add()
def normalised_by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Squared relu over the length instead of a softmax."""
    return (F.relu(_scores(q, k)) ** 2 / k.shape[-2]) @ v


@_attention.add()
def entmax_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The top scores only, after the softmax, renormalised."""
    weights = _scores(q, k).softmax(-1)
    kept = weights * (weights >= weights.topk(3, dim=-1).values[..., -1:])
    return (kept / kept.sum(-1, keepdim=True)) @ v


@_attention.add()
def difference_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Differential attention: one map minus another."""
    q1, q2 = q.chunk(2, -1)
    k1, k2 = k.chunk(2, -1)
    return (_scores(q1, k1).softmax(-1) - 0.5 * _scores(q2, k2).softmax(-1)) @ v
