"""Image generators, written anew in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, Register, image

_zoo = Register("image")
SIDE = 4
PATCHES = SIDE * SIDE


def entries() -> list[Entry]:
    return _zoo.entries


def patches_and_vector() -> Inputs:
    return (torch.randn(BATCH, PATCHES, DIM), torch.randn(BATCH, DIM)), {}


def patches_and_words() -> Inputs:
    return (torch.randn(BATCH, PATCHES, DIM), torch.randn(BATCH, 5, DIM)), {}


@_zoo.add(inputs=patches_and_words, attention=2, layer_norm=3, swiglu=1)
class LatentDiffusion(nn.Module):
    """CompVis: heads folded into rows, an einsum over them, a packed gate whose second half is activated."""

    class CrossAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
            self.to_out = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.0))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            context = x if context is None else context
            q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
            b = x.shape[0]
            q, k, v = (
                t.reshape(b, t.shape[1], HEADS, -1).permute(0, 2, 1, 3).reshape(b * HEADS, t.shape[1], -1)
                for t in (q, k, v)
            )
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * HEAD**-0.5
            out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
            out = out.reshape(b, HEADS, out.shape[1], -1).permute(0, 2, 1, 3).reshape(b, out.shape[1], -1)
            return self.to_out(out)

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = self.CrossAttention(), self.CrossAttention()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(DIM) for _ in range(3))
        self.proj, self.out = nn.Linear(DIM, 128), nn.Linear(64, DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        y, gate = self.proj(self.norm3(x)).chunk(2, dim=-1)
        return self.out(y * F.gelu(gate)) + x


@_zoo.add(inputs=image, attention=1)
class UNetAttention(nn.Module):
    """diffusers' first processor: group norm, head to batch, baddbmm into nothing, the residual rescaled."""

    def __init__(self) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(4, DIM)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        b, c, h, w = x.shape
        x = x.view(b, c, h * w).transpose(1, 2)
        x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            p(x).reshape(b, -1, HEADS, c // HEADS).permute(0, 2, 1, 3).reshape(b * HEADS, -1, c // HEADS)
            for p in (self.to_q, self.to_k, self.to_v)
        )
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=(c // HEADS) ** -0.5)
        x = torch.bmm(scores.softmax(dim=-1).to(q.dtype), v)
        x = x.reshape(b, HEADS, -1, c // HEADS).permute(0, 2, 1, 3).reshape(b, -1, c)
        x = self.to_out(x).transpose(-1, -2).reshape(b, c, h, w)
        return (x + residual) / math.sqrt(2.0)


@_zoo.add(inputs=image, attention=1)
class GuidedDiffusion(nn.Module):
    """OpenAI's diffusion models: channels first, queries and keys each scaled by a fourth root, softmax in float."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, DIM), nn.Conv1d(DIM, 3 * DIM, 1)
        self.proj_out = nn.Conv1d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        length = qkv.shape[-1]
        q, k, v = qkv.reshape(b * HEADS, 3 * HEAD, length).split(HEAD, dim=1)
        scale = 1 / math.sqrt(math.sqrt(HEAD))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, length)
        return (x + self.proj_out(h)).reshape(b, c, *spatial)


@_zoo.add(inputs=image, attention=1)
class QuantisedAutoencoder(nn.Module):
    """Taming's block: keys by queries in a product of maps, the probabilities turned for the second product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, DIM, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(DIM, DIM, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        weights = torch.bmm(q, k) * (int(c) ** (-0.5))
        weights = F.softmax(weights, dim=2)
        v = v.reshape(b, c, h * w)
        weights = weights.permute(0, 2, 1)
        return x + self.proj_out(torch.bmm(v, weights).reshape(b, c, h, w))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


@_zoo.add(inputs=patches_and_vector, attention=1, layer_norm=2, rms_norm=2)
class DiffusionTransformer(nn.Module):
    """SiT with normed queries and keys: six vectors of the condition, norms without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD, eps=1e-6), nn.RMSNorm(HEAD, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(approximate="tanh"), nn.Linear(64, DIM))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))

    def attn(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=0.0)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift_m, scale_m))


class _FluxNorm(nn.Module):
    """Statistic in float, cast, then the scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        return (x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6)).to(dtype=dtype) * self.scale


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs times 2 x 2 matrices, [..., T, D / 2, 2, 2]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]).reshape(*x.shape).type_as(x)


def _turns(positions: Tensor, dim: int) -> Tensor:
    omega = 1.0 / (100 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    out = torch.einsum("...n,d->...nd", positions.float(), omega)
    out = torch.stack([out.cos(), -out.sin(), out.sin(), out.cos()], dim=-1)
    return out.reshape(*out.shape[:-1], 2, 2).float()


@_zoo.add(inputs=patches_and_vector, attention=1, layer_norm=1, rms_norm=2, rope=2)
class SingleStream(nn.Module):
    """Flux' single block: one projection for attention and network, rotations as matrices of two by two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(DIM, 3 * DIM + 64), nn.Linear(DIM + 64, DIM)
        self.query_norm, self.key_norm = _FluxNorm(HEAD), _FluxNorm(HEAD)
        self.pre_norm = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.lin = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        turns = _turns(torch.arange(x.shape[1], device=x.device)[None], HEAD).unsqueeze(1)
        shift, scale, gate = self.lin(F.silu(vec))[:, None, :].chunk(3, dim=-1)
        x_mod = (1 + scale) * self.pre_norm(x) + shift
        qkv, mlp = torch.split(self.linear1(x_mod), [3 * DIM, 64], dim=-1)
        b, n, _ = x.shape
        q, k, v = qkv.view(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q).to(v), self.key_norm(k).to(v)
        attn = F.scaled_dot_product_attention(_turned(q, turns), _turned(k, turns), v)
        attn = attn.permute(0, 2, 1, 3).reshape(b, n, DIM)
        return x + gate * self.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), 2))


@_zoo.add(inputs=patches_and_words, attention=1, layer_norm=2, rms_norm=4)
class JointStreams(nn.Module):
    """SD3.5: two streams with projections of their own, one attention over both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_x, self.qkv_c = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)
        self.out_x, self.out_c = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norms = nn.ModuleList(_FluxNorm(HEAD) for _ in range(4))
        self.ln_x, self.ln_c = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))

    def split(self, qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.reshape(qkv.shape[0], qkv.shape[1], 3, -1, HEAD).movedim(2, 0)
        return q_norm(q), k_norm(k), v

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        words = context.shape[1]
        ctx = self.split(self.qkv_c(self.ln_c(context)), self.norms[0], self.norms[1])
        own = self.split(self.qkv_x(self.ln_x(x)), self.norms[2], self.norms[3])
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(ctx, own))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2).reshape(x.shape[0], -1, DIM)
        return x + self.out_x(out[:, words:]), context + self.out_c(out[:, :words])
