"""Whole blocks that people write by hand, and models that look like them and hold nothing to fuse."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, image, rows, tokens_and_more

_block, _negative = Register("block"), Register("negative")


def entries() -> list[Entry]:
    return [*_block.entries, *_negative.entries]


class _Attention(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        result: Tensor = self.out((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return result


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


@_block.add(attention=1, layer_norm=2)
class VisionBlock(nn.Module):
    """ViT with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = _Attention(), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((DIM,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


def _conditioned() -> Inputs:
    return (torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, DIM)), {}


@_block.add(inputs=_conditioned, attention=1, layer_norm=2)
class DiffusionBlock(nn.Module):
    """DiT: norms without weights, shifted, scaled and gated by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.modulation = _Attention(), nn.Linear(DIM, 6 * DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(approximate="tanh"), nn.Linear(64, DIM))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h)
        h = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


@_block.add(attention=1, rms_norm=2, swiglu=1)
class LlamaLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = _Attention(), _Norm(), _Norm()
        self.w1, self.w2, self.w3 = nn.Linear(DIM, 48), nn.Linear(48, DIM), nn.Linear(DIM, 48)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.norm1(x))
        y = self.norm2(h)
        return h + self.w2(F.silu(self.w1(y)) * self.w3(y))


@_block.add(attention=1, layer_norm=1, swiglu=1)
class ParallelBlock(nn.Module):
    """PaLM: one norm, one projection in for attention and gate, one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.fused = nn.Linear(DIM, DIM + 2 * HEAD + 96, bias=False)
        self.attention_out, self.mlp_out = nn.Linear(DIM, DIM, bias=False), nn.Linear(48, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, y = self.fused(self.norm(x)).split([DIM, HEAD, HEAD, 96], dim=-1)
        q = q.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) * HEAD**-0.5
        scores = torch.einsum("bhid,bjd->bhij", q, k)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max).softmax(-1)
        out = torch.einsum("bhij,bjd->bhid", weights, v).transpose(1, 2).flatten(2)
        up, gate = y.chunk(2, dim=-1)
        return x + self.attention_out(out) + self.mlp_out(F.silu(gate) * up)


@_block.add(attention=1, rms_norm=4, swiglu=1)
class SandwichBlock(nn.Module):
    """Norms before and after each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norms = _Attention(), nn.ModuleList(_Norm() for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        h = self.norms[2](x)
        return x + self.norms[3](self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h)))


@_block.add(attention=1, layer_norm=2)
class PostNormBlock(nn.Module):
    """DeepNorm: the residual is scaled, the norm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = _Attention(), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x * 1.5 + self.attention(x))
        return self.norm2(x * 1.5 + self.down(F.relu(self.up(x))))


@_block.add(inputs=image, attention=1)
class UNetBlock(nn.Module):
    """Group norms, convolutions, attention over pixels; the group norms are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, DIM), nn.GroupNorm(4, DIM)
        self.conv, self.attention = nn.Conv2d(DIM, DIM, 3, padding=1), _Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(F.silu(self.norm1(x)))
        h = self.norm2(x).flatten(2).transpose(1, 2)
        return x + self.attention(h).transpose(1, 2).reshape(x.shape)


@_block.add(inputs=tokens_and_more, attention=2, layer_norm=3, swiglu=1)
class ConditionedBlock(nn.Module):
    """Stable Diffusion: self attention, cross attention, GEGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norms = _Attention(), nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.q, self.kv, self.out = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.packed, self.down = nn.Linear(DIM, 96), nn.Linear(48, DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        q = self.q(self.norms[1](x)).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in self.kv(context).chunk(2, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h, gate = self.packed(self.norms[2](x)).chunk(2, dim=-1)
        return x + self.down(h * F.gelu(gate))


@_block.add(attention=2, layer_norm=1, swiglu=2)
class ModalityFusion(nn.Module):
    """Two branches, a memory that is read, and gates between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = _Attention(), nn.LayerNorm(DIM)
        self.memory = nn.Parameter(torch.randn(8, DIM))
        self.query, self.gate, self.mix, self.value = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.attention(x))
        read = torch.softmax(self.query(h) @ self.memory.T, dim=-1) @ self.memory
        h = h + torch.sigmoid(self.gate(h)) * read
        return torch.sigmoid(self.mix(h)) * F.silu(self.value(h))


@_block.add(attention=1, swiglu=1)
class GatedAttention(nn.Module):
    """The attention's result is gated by a sigmoid of a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate, self.out = _Attention(), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attention(x) * torch.sigmoid(self.gate(x)))


@_block.add(attention=2)
class Checkpointed(nn.Module):
    """Two attentions, the second one recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Attention(), _Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        again: Tensor = torch.utils.checkpoint.checkpoint(self.second, x, use_reentrant=False)
        return x + again


@_block.add(attention=2, rms_norm=1)
class Interrupted(nn.Module):
    """A graph break between two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = _Attention(), _Attention(), _Norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        torch._dynamo.graph_break()
        return x + self.second(self.norm(x))


@_block.add(attention=1, rms_norm=1, swiglu=1)
class Autocast(nn.Module):
    """The block under autocast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = _Attention(), nn.RMSNorm(DIM)
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return self.block(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.block(x)

    def block(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.attention(x))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


# models that hold nothing


@_negative.add(inputs=rows)
class Router(nn.Module):
    """The best two of four experts, their weights renormalised."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.Parameter(torch.randn(4, DIM, DIM) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return (torch.einsum("td,tkde->tke", x, self.experts[chosen]) * weights[..., None]).sum(1)


@_negative.add(inputs=rows)
class SoftMixture(nn.Module):
    """All experts, mixed by a router in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.Parameter(torch.randn(4, DIM, DIM) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("td,edf->tef", x, self.experts)
        return torch.einsum("te,tef->tf", self.router(x).softmax(-1), out)


@_negative.add()
class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        total = 1 / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        return (q @ (k.mT @ v)) * total


@_negative.add()
class EfficientAttention(nn.Module):
    """Softmaxes over features and over positions, no scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).softmax(-1), self.k(x).softmax(-2)
        return q @ (k.mT @ self.v(x))


@_negative.add()
class Recurrent(nn.Module):
    """RWKV's token mixing, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.r = (nn.Linear(DIM, DIM) for _ in range(3))
        self.decay = nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        k, v, r = torch.exp(self.k(x)), self.v(x), self.r(x)
        above = torch.zeros_like(x[:, 0])
        below = torch.zeros_like(above)
        out = []
        for t in range(x.shape[1]):
            above = above * self.decay + k[:, t] * v[:, t]
            below = below * self.decay + k[:, t]
            out.append(r[:, t] * above / (below + 1e-6))
        return torch.stack(out, dim=1)


@_negative.add()
class Retention(nn.Module):
    """Scores with a decay and no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        decay = (0.9 ** (steps[:, None] - steps[None, :]).clamp(min=0)).tril().to(x.dtype)
        return (self.q(x) @ self.k(x).mT * decay) @ self.v(x)


@_negative.add()
class AdditiveAttention(nn.Module):
    """Bahdanau: the scores are a projection of tanh, the sum a broadcast product."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.v(torch.tanh(self.w(x)[:, :, None] + self.u(x)[:, None])).squeeze(-1)
        return (scores.softmax(-1)[..., None] * x[:, None]).sum(2)


@_negative.add()
class PooledByWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(dim=1) * x).sum(dim=1)


@_negative.add()
class TalkingHeads(nn.Module):
    """The probabilities are mixed across heads before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(DIM, 3 * DIM), nn.Linear(HEADS, HEADS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / HEAD**0.5).softmax(-1)
        weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (weights @ v).transpose(1, 2).flatten(2)


@_negative.add()
class SigmoidAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.sigmoid(q @ k.mT / DIM**0.5 - math.log(LENGTH)) @ v


@_negative.add()
class Classifier(nn.Module):
    """A softmax over classes, and one whose result is a mean of rows of another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(DIM, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.tanh(self.hidden(x))).softmax(-1)


@_negative.add()
def unit_length(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


@_negative.add()
def distance_to_mean(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x - x.mean(1, keepdim=True)).pow(2).sum(-1, keepdim=True) + 1e-6)


@_negative.add()
def norm_over_sequence(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


@_negative.add()
def statistic_of_another(x: Tensor) -> Tensor:
    return x.tanh() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@_negative.add(inputs=image)
class Squeezed(nn.Module):
    """Squeeze and excitation: the gate is one number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(DIM, DIM, 3, padding=1), nn.Linear(DIM, DIM)
        self.norm = nn.BatchNorm2d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        return h * torch.sigmoid(self.fc(h.mean((2, 3))))[:, :, None, None]


@_negative.add()
class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + self.down(h * torch.sigmoid(1.702 * h))


@_negative.add()
class Mixer(nn.Module):
    """Products of halves with no activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.down = nn.Linear(DIM, 64), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.packed(x).chunk(2, dim=-1)
        return self.down(a * b)
