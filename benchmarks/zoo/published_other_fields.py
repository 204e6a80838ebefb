"""Blocks of published models of images, speech, proteins and graphs, in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, image, split_heads, tokens_and_more

_zoo = Register("published")


def entries() -> list[Entry]:
    return _zoo.entries


@_zoo.add(attention=1, layer_norm=2)
class OpenAiWhisper(nn.Module):
    """Queries and keys scaled by a fourth root each, keys turned before the product, scores in float."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(3))
        self.key = nn.Linear(DIM, DIM, bias=False)
        self.attn_ln, self.mlp_ln = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), (DIM,), self.attn_ln.weight.float(), self.attn_ln.bias.float()).type(x.dtype)
        scale = HEAD**-0.25
        q = self.query(y).view(*y.shape[:2], HEADS, -1).permute(0, 2, 1, 3) * scale
        k = self.key(y).view(*y.shape[:2], HEADS, -1).permute(0, 2, 3, 1) * scale
        v = self.value(y).view(*y.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
        w = F.softmax((q @ k).float(), dim=-1).to(q.dtype)
        x = x + self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))
        return x + self.mlp(self.mlp_ln(x))


def _joint() -> Inputs:
    return (torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, 4, DIM), torch.randn(BATCH, DIM)), {}


@_zoo.add(inputs=_joint, attention=1, layer_norm=2, rms_norm=4, rope=2)
class JointDiffusion(nn.Module):
    """Two streams with one attention: modulated norms, RMS norms of queries and keys, rotated pairs by a 2x2 table."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.modulation = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(HEAD)) for _ in range(4))
        angles = torch.outer(torch.arange(LENGTH + 4).float(), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def normed(self, x: Tensor, scale: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(torch.mean(h**2, dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * scale

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos, self.sin
        return torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1).flatten(-2).type_as(x)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        parts, gates = [], []
        for i, stream in enumerate((text, x)):
            shift, scale, gate = self.modulation[i](F.silu(condition))[:, None].chunk(3, dim=-1)
            h = (1 + scale) * F.layer_norm(stream, (DIM,), eps=1e-6) + shift
            q, k, v = self.qkv[i](h).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
            parts.append((self.normed(q, self.scales[2 * i]), self.normed(k, self.scales[2 * i + 1]), v))
            gates.append(gate)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts))
        out = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v).transpose(1, 2).flatten(2)
        return x + gates[1] * self.out[1](out[:, 4:]), text + gates[0] * self.out[0](out[:, :4])


def _pairs() -> Inputs:
    return (torch.randn(LENGTH, LENGTH, DIM), torch.ones(LENGTH, LENGTH)), {}


@_zoo.add(inputs=_pairs, attention=1, layer_norm=1, swiglu=1)
class TriangleAttention(nn.Module):
    """AlphaFold: a bias of the pairs themselves, a mask as a large negative number, a sigmoid gate over the result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(DIM), nn.Linear(DIM, HEADS, bias=False)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
        triangle = self.bias(x).permute(2, 0, 1).unsqueeze(-4)
        q, k, v = split_heads(self.q(x)) / math.sqrt(HEAD), split_heads(self.k(x)), split_heads(self.v(x))
        a = torch.matmul(q, k.transpose(-1, -2))
        a = a + mask_bias
        a = a + triangle
        o = torch.matmul(torch.softmax(a, dim=-1), v).transpose(-2, -3).flatten(-2)
        return self.out(o * torch.sigmoid(self.gate(x)))


@_zoo.add(inputs=tokens_and_more, attention=2, layer_norm=5, swiglu=1)
class PerceiverStep(nn.Module):
    """Latents read the input, then each other; GEGLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(5))
        self.q, self.kv, self.out = (
            nn.Linear(DIM, DIM, bias=False),
            nn.Linear(DIM, 2 * DIM, bias=False),
            nn.Linear(DIM, DIM),
        )
        self.packed, self.down = nn.Linear(DIM, 128), nn.Linear(64, DIM)
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)
        q, k, v = (t.reshape(t.shape[0], t.shape[1], HEADS, HEAD).permute(0, 2, 1, 3).flatten(0, 1) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * HEAD**-0.5
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return self.out(out.unflatten(0, (-1, HEADS)).permute(0, 2, 1, 3).flatten(2))

    def forward(self, latents: Tensor, data: Tensor) -> Tensor:
        x = latents + self.attend(self.norms[0](latents), self.norms[1](data))
        h, gates = self.packed(self.norms[2](x)).chunk(2, dim=-1)
        x = x + self.down(h * F.gelu(gates))
        y = self.norms[3](x)
        return self.norms[4](x + self.mha(y, y, y, need_weights=False)[0])


@_zoo.add(inputs=image, attention=1)
class AutoencoderAttention(nn.Module):
    """The middle of a latent-diffusion autoencoder: one head over pixels by two batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, DIM)
        self.q, self.k, self.v, self.out = (nn.Conv2d(DIM, DIM, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        b, c, height, width = x.shape
        q = self.q(h).reshape(b, c, height * width).permute(0, 2, 1)
        k = self.k(h).reshape(b, c, height * width)
        v = self.v(h).reshape(b, c, height * width)
        w = torch.bmm(q, k) * int(c) ** (-0.5)
        w = F.softmax(w, dim=2).permute(0, 2, 1)
        return x + self.out(torch.bmm(v, w).reshape(b, c, height, width))


@_zoo.add(attention=1, layer_norm=1)
class PoolingHead(nn.Module):
    """A learned query reads the sequence through torch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.probe, self.norm = nn.Parameter(torch.randn(1, 1, DIM)), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.repeat(x.shape[0], 1, 1)
        return self.norm(self.attention(probe, x, x)[0])[:, 0]


def _sequence_first() -> Inputs:
    return (torch.randn(LENGTH, BATCH, DIM),), {}


@_zoo.add(inputs=_sequence_first, attention=1, layer_norm=2)
class OpenAiClip(nn.Module):
    """Sequence first, torch's attention with a causal mask, quick GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(DIM, HEADS), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.c_fc, self.c_proj = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        self.register_buffer("attn_mask", torch.full((LENGTH, LENGTH), float("-inf")).triu_(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        mask = self.attn_mask.to(dtype=x.dtype)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        h = self.c_fc(self.ln_2(x))
        return x + self.c_proj(h * torch.sigmoid(1.702 * h))


@_zoo.add(attention=1, layer_norm=2)
class GraphBias(nn.Module):
    """Graphormer: a bias looked up by distance in a graph, heads in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.bias = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Embedding(4, HEADS)
        self.norm1, self.norm2, self.fc = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.register_buffer("distance", torch.randint(0, 4, (LENGTH, LENGTH)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(b, n, HEADS, HEAD).transpose(1, 2).reshape(b * HEADS, n, HEAD) for t in (q, k, v))
        scores = torch.bmm(q * HEAD**-0.5, k.transpose(1, 2)).view(b, HEADS, n, n)
        scores = scores + self.bias(self.distance).permute(2, 0, 1)
        weights = F.softmax(scores.view(b * HEADS, n, n), dim=-1)
        out = torch.bmm(weights, v).view(b, HEADS, n, HEAD).transpose(1, 2).reshape(b, n, DIM)
        x = x + self.out(out)
        return x + F.relu(self.fc(self.norm2(x)))


@_zoo.add()
class GraphAttention(nn.Module):
    """GAT: the scores are sums of two projections, not products."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.left, self.right = nn.Linear(DIM, DIM), nn.Linear(DIM, 1), nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        return F.elu(scores.softmax(-1) @ h)


@_zoo.add(inputs=image)
class MobileBlock(nn.Module):
    """Depthwise convolution, squeeze and excitation with a hard sigmoid, hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.BatchNorm2d(DIM)
        self.squeeze, self.excite, self.out = nn.Conv2d(DIM, 8, 1), nn.Conv2d(8, DIM, 1), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.norm(self.conv(x)))
        weights = F.hardsigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        return x + self.out(h * weights)
