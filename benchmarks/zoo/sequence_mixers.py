"""State spaces, experts, recurrences and other ways through a sequence, in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, HEAD, HEADS, LENGTH, Register, tokens

_zoo = Register("field")


def entries() -> list[Entry]:
    return _zoo.entries


@_zoo.add(rms_norm=1, swiglu=1)
class StateSpaceHead(nn.Module):
    """Mamba 2's last steps: y gated by silu(z), then normed in groups, then projected."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        z, y = self.in_proj(x).chunk(2, dim=-1)
        dtype = y.dtype
        y = y.cumsum(1).float() * F.silu(z.float())
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.out_proj((y * self.weight.float()).to(dtype))


@_zoo.add(rms_norm=2, swiglu=2)
class HybridExperts(nn.Module):
    """Mixtral's loop over experts: a one-hot of the choice selects rows, index_add_ returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM, eps=1e-5), nn.RMSNorm(DIM, eps=1e-5)
        self.w1, self.w3, self.w2 = (nn.Parameter(0.1 * torch.randn(2, *s)) for s in ((DIM, 48), (DIM, 48), (48, DIM)))
        self.router = nn.Linear(DIM, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).view(-1, DIM)
        weights = F.softmax(self.router(y), dim=1, dtype=torch.float).to(y.dtype)
        out = torch.zeros_like(y)
        rows = torch.arange(y.shape[0], device=x.device)
        for expert in range(2):
            current = y[rows]
            current = F.silu(current @ self.w1[expert]) * (current @ self.w3[expert])
            out.index_add_(0, rows, (current @ self.w2[expert]) * weights[rows, expert, None])
        return self.norm2(x + out.view_as(x))


@_zoo.add(swiglu=1, rms_norm=1)
class BatchedExperts(nn.Module):
    """Llama 4: all experts at once through bmm, a packed weight, a router of sigmoids that scales the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(2, DIM, 96))
        self.down_proj, self.router = nn.Parameter(0.1 * torch.randn(2, 48, DIM)), nn.Linear(DIM, 2, bias=False)
        self.norm = _Meta(DIM)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).view(-1, DIM)
        scores = torch.sigmoid(self.router(flat).float()).to(flat.dtype).transpose(0, 1)
        routed = flat.repeat(2, 1) * scores.reshape(-1, 1)
        gate_up = torch.bmm(routed.view(2, -1, DIM), self.gate_up_proj)
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), self.down_proj)
        return x + out.view(2, -1, DIM).sum(dim=0).view_as(x)


class _Meta(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


@_zoo.add(swiglu=1)
class EinsumExperts(nn.Module):
    """GShard: one-hot dispatch, experts by einsum over the expert axis, combine by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_gate = (nn.Parameter(0.1 * torch.randn(2, DIM, 48)) for _ in range(2))
        self.w_out, self.router = nn.Parameter(0.1 * torch.randn(2, 48, DIM)), nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        combine = self.router(x).softmax(-1)
        dispatched = torch.einsum("bne,bnd->ebnd", (combine > 0).to(x.dtype), x)
        h = torch.einsum("ebnd,edh->ebnh", dispatched, self.w_in)
        g = torch.einsum("ebnd,edh->ebnh", dispatched, self.w_gate)
        out = torch.einsum("ebnh,ehd->ebnd", F.gelu(g) * h, self.w_out)
        return torch.einsum("bne,ebnd->bnd", combine, out)


@_zoo.add(attention=1, rms_norm=2, swiglu=1, rope=2)
class RotaryInTime(nn.Module):
    """M-RoPE: three axes of positions whose bands are spliced into one table of cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm1, self.norm2 = _Meta(DIM), _Meta(DIM)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, HEAD, 2).float() / HEAD)))

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.arange(LENGTH, device=x.device)
        positions = torch.stack((at, at // 2, at % 2))[:, None, :].expand(3, x.shape[0], -1)
        inv_freq = self.inv_freq[None, None, :, None].float().expand(3, positions.shape[1], -1, 1)
        freqs = (inv_freq @ positions[:, :, None, :].float()).transpose(2, 3)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)

    def spliced(self, table: Tensor) -> Tensor:
        sections = [1, 1, 2] * 2
        return torch.cat([m[i % 3] for i, m in enumerate(table.split(sections, dim=-1))], dim=-1).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        cos, sin = (self.spliced(table) for table in self.tables(x))
        q, k = ((z * cos) + (torch.cat((-z[..., 4:], z[..., :4]), -1) * sin) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + self.o(y)
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


@_zoo.add(layer_norm=1)
class Receptance(nn.Module):
    """RWKV's time mixing: shifted mixing, an exponential recurrence, a squared relu with a sigmoid in front."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.receptance, self.output = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.mix, self.decay, self.ln = (
            nn.Parameter(0.5 * torch.ones(DIM)),
            nn.Parameter(torch.ones(DIM)),
            nn.LayerNorm(DIM),
        )
        self.group_norm = nn.GroupNorm(HEADS, DIM, eps=64e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(x)
        shifted = F.pad(x, (0, 0, 1, -1))
        mixed = x * self.mix + shifted * (1 - self.mix)
        k, v, r = self.key(mixed), self.value(mixed), self.receptance(mixed)
        w = torch.exp(-torch.exp(self.decay))
        num, den = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        out = []
        for t in range(x.shape[1]):
            e = torch.exp(k[:, t].clamp(max=10))
            num, den = num * w + e * v[:, t], den * w + e
            out.append(num / (den + 1e-6))
        y = torch.stack(out, 1)
        y = self.group_norm(y.flatten(0, 1)).view_as(x)
        return self.output(r * y)


@_zoo.add(rms_norm=1, rope=2)
class Retention(nn.Module):
    """RetNet: rotated queries and keys, products weighted by a decay without a softmax, a norm of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g, self.out = (nn.Linear(DIM, DIM, bias=False) for _ in range(5))
        angle = 1.0 / (100 ** torch.linspace(0, 1, HEAD // 2)).unsqueeze(-1).repeat(1, 2).flatten()
        index = torch.arange(LENGTH).float()
        self.register_buffer("sin", torch.sin(index[:, None] * angle))
        self.register_buffer("cos", torch.cos(index[:, None] * angle))
        gamma = torch.log(1 - 2 ** (-5 - torch.arange(HEADS).float()))
        decay = (index[:, None] - index) * gamma[:, None, None]
        mask = torch.tril(torch.ones(LENGTH, LENGTH)).bool()
        self.register_buffer("decay", torch.exp(decay.masked_fill(~mask, float("-inf"))))
        self.norm = nn.RMSNorm(HEAD, eps=1e-5, elementwise_affine=False)

    def theta_shift(self, x: Tensor) -> Tensor:
        x1, x2 = x[:, :, :, ::2], x[:, :, :, 1::2]
        return x * self.cos + torch.stack((-x2, x1), dim=-1).flatten(-2) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, HEADS, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = self.theta_shift(q) @ (self.theta_shift(k) * HEAD**-0.5).transpose(-1, -2)
        out = self.norm((scores * self.decay) @ v).transpose(1, 2).reshape(b, t, DIM)
        return self.out(F.silu(self.g(x)).cumsum(1) + out)


@_zoo.add()
class Linearised(nn.Module):
    """Katharopoulos: elu + 1 as a feature map, no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, HEAD).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("nshd,nshm->nhmd", k, v)
        z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
        return self.out(torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z).reshape(b, n, -1))


@_zoo.add(attention=1)
class Informed(nn.Module):
    """Time series: [B, L, H, E] through einsum, a float mask multiplied by a large number, scale from the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(x.shape[0], x.shape[1], HEADS, -1) for p in (self.q, self.k, self.v))
        _, length, _, e = q.shape
        scale = 1.0 / math.sqrt(e)
        scores = torch.einsum("blhe,bshe->bhls", q, k)
        mask = torch.triu(torch.ones([x.shape[0], 1, length, length], dtype=torch.bool), diagonal=1)
        scores.masked_fill_(mask, -torch.inf)
        a = torch.softmax(scale * scores, dim=-1)
        return self.o(torch.einsum("bhls,bshd->blhd", a, v).contiguous().view(x.shape[0], length, -1))


@_zoo.add(inputs=tokens, attention=1, layer_norm=2)
class DecisionTransformer(nn.Module):
    """Convolutions of GPT-2 for projections, where with a tensor of the lowest number, three kinds of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.w_attn, self.b_attn = nn.Parameter(0.1 * torch.randn(DIM, 3 * DIM)), nn.Parameter(torch.zeros(3 * DIM))
        self.c_proj, self.ln, self.out_ln = nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32, dtype=torch.uint8)).view(1, 1, 32, 32) > 0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack((x, x.flip(1), x * 2), dim=1).permute(0, 2, 1, 3).reshape(x.shape[0], -1, DIM)
        y = self.ln(y)
        qkv = torch.addmm(self.b_attn, y.view(-1, y.size(-1)), self.w_attn).view(*y.shape[:-1], 3 * DIM)
        q, k, v = (z.view(*z.shape[:-1], HEADS, HEAD).permute(0, 2, 1, 3) for z in qkv.split(DIM, dim=2))
        w = torch.matmul(q, k.transpose(-1, -2))
        w = w / torch.full([], v.size(-1) ** 0.5, dtype=w.dtype, device=w.device)
        ql, kl = q.size(-2), k.size(-2)
        causal = self.bias[:, :, kl - ql : kl, :kl]
        lowest = torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype, device=w.device)
        w = torch.where(causal, w.to(w.dtype), lowest)
        w = F.softmax(w, dim=-1).type(v.dtype)
        return self.out_ln(self.c_proj(torch.matmul(w, v).permute(0, 2, 1, 3).contiguous().view(y.shape)))
