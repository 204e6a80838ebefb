"""Speech, sets, proteins, state spaces and other fields, written anew in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, tokens, tokens_and_more

_zoo = Register("field")


def entries() -> list[Entry]:
    return _zoo.entries


def frames_and_lengths() -> Inputs:
    mask = torch.ones(BATCH, 1, LENGTH, dtype=torch.bool)
    mask[1, :, 4:] = False
    return (torch.randn(BATCH, LENGTH, DIM), mask), {}


def pairs() -> Inputs:
    """A pair representation [B, N, N, C] and its mask of zeros and ones."""
    mask = torch.ones(1, 5, 5)
    mask[:, :, 4] = 0
    return (torch.randn(1, 5, 5, DIM), mask), {}


def rows_and_pairs() -> Inputs:
    """An alignment [B, S, N, C] and pairs [B, N, N, C]."""
    return (torch.randn(1, 3, 5, DIM), torch.randn(1, 5, 5, DIM)), {}


@_zoo.add(inputs=frames_and_lengths, attention=1, layer_norm=4, swiglu=1)
class Conformer(nn.Module):
    """ESPnet: scores of content and of position, a relative shift, a mask before and after, a gated convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.pos = nn.Linear(DIM, DIM, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.zeros(HEADS, HEAD)) for _ in range(2))
        self.norm_mha, self.norm_conv, self.norm_ff, self.norm_final = (nn.LayerNorm(DIM) for _ in range(4))
        self.pointwise1, self.pointwise2 = nn.Conv1d(DIM, 2 * DIM, 1), nn.Conv1d(DIM, DIM, 1)
        self.depthwise, self.bn = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM), nn.BatchNorm1d(DIM)
        self.w_1, self.w_2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        at = torch.arange(LENGTH - 1, -LENGTH, -1.0)[:, None] * 100.0 ** -torch.arange(0, 1, 2 / DIM)
        self.register_buffer("pe", torch.stack((at.sin(), at.cos()), -1).flatten(1)[None])

    def rel_shift(self, x: Tensor) -> Tensor:
        zero_pad = torch.zeros((*x.size()[:3], 1), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=-1)
        x_padded = x_padded.view(*x.size()[:2], x.size(3) + 1, x.size(2))
        return x_padded[:, :, 1:].view_as(x)[:, :, :, : x.size(-1) // 2 + 1]

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        b = x.size(0)
        q = self.q(x).view(b, -1, HEADS, HEAD)
        k, v = (p(x).view(b, -1, HEADS, HEAD).transpose(1, 2) for p in (self.k, self.v))
        p = self.pos(self.pe).view(1, -1, HEADS, HEAD).transpose(1, 2)
        q_u, q_v = (q + self.pos_bias_u).transpose(1, 2), (q + self.pos_bias_v).transpose(1, 2)
        ac = torch.matmul(q_u, k.transpose(-2, -1))
        bd = self.rel_shift(torch.matmul(q_v, p.transpose(-2, -1)))
        scores = (ac + bd) / math.sqrt(HEAD)
        mask = mask.unsqueeze(1).eq(0)
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        attn = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
        return self.out(torch.matmul(attn, v).transpose(1, 2).contiguous().view(b, -1, DIM))

    def convolve(self, x: Tensor) -> Tensor:
        x = F.glu(self.pointwise1(x.transpose(1, 2)), dim=1)
        x = F.silu(self.bn(self.depthwise(x)))
        return self.pointwise2(x).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attend(self.norm_mha(x), mask)
        x = x + self.convolve(self.norm_conv(x))
        x = x + 0.5 * self.w_2(F.silu(self.w_1(self.norm_ff(x))))
        return self.norm_final(x)


@_zoo.add(inputs=tokens_and_more, attention=2, layer_norm=3)
class SpeechDecoder(nn.Module):
    """Whisper without its fused call: scale halved over queries and keys, a mask cut from a buffer, scores in float."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Linear(DIM, DIM, bias=i != 1) for i in range(4))
        self.cross = nn.ModuleList(nn.Linear(DIM, DIM, bias=i != 1) for i in range(4))
        self.lns = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        self.register_buffer("mask", torch.empty(16, 16).fill_(-torch.inf).triu_(1), persistent=False)

    def attend(self, layers: nn.ModuleList, x: Tensor, xa: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = layers[0](x), layers[1](xa), layers[2](xa)
        n_ctx = q.shape[1]
        scale = HEAD**-0.25
        q = q.view(*q.shape[:2], HEADS, -1).permute(0, 2, 1, 3) * scale
        k = k.view(*k.shape[:2], HEADS, -1).permute(0, 2, 3, 1) * scale
        v = v.view(*v.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
        qk = q @ k
        if mask is not None:
            qk = qk + mask[:n_ctx, :n_ctx]
        qk = qk.float()
        w = F.softmax(qk, dim=-1).to(q.dtype)
        return layers[3]((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))

    def norm(self, i: int, x: Tensor) -> Tensor:
        ln = self.lns[i]
        return F.layer_norm(x.float(), (DIM,), ln.weight.float(), ln.bias.float()).type(x.dtype)

    def forward(self, x: Tensor, xa: Tensor) -> Tensor:
        y = self.norm(0, x)
        x = x + self.attend(self.own, y, y, self.mask)
        x = x + self.attend(self.cross, self.norm(1, x), xa, None)
        return x + self.fc2(F.gelu(self.fc1(self.norm(2, x))))


@_zoo.add(inputs=pairs, attention=1, layer_norm=1, swiglu=1)
class TriangleAttention(nn.Module):
    """OpenFold, starting node: -1e9 for what is masked, a bias of the pairs, a gate of the result before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(DIM), nn.Linear(DIM, HEADS, bias=False)
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.linear_g, self.linear_o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        x = self.layer_norm(z)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
        triangle_bias = self.linear(x).permute(0, 3, 1, 2).unsqueeze(-4)
        q, k, v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        q, k, v = (t.view((*t.shape[:-1], HEADS, -1)).transpose(-2, -3) for t in (q, k, v))
        q = q / math.sqrt(HEAD)
        a = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
        for b in (mask_bias, triangle_bias):
            a += b
        a = F.softmax(a, dim=-1)
        o = torch.matmul(a, v).transpose(-2, -3)
        g = torch.sigmoid(self.linear_g(x))
        o = o * g.view((*g.shape[:-1], HEADS, -1))
        return z + self.linear_o(o.reshape((*o.shape[:-2], -1)))


@_zoo.add(inputs=pairs, layer_norm=2, swiglu=3)
class TriangleProduct(nn.Module):
    """OpenFold's triangle update: two gated projections with a mask between, a contraction, a gated result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.a_p, self.a_g, self.b_p, self.b_g, self.z, self.g = (nn.Linear(DIM, DIM) for _ in range(6))

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(-1)
        z = self.norm_in(pair)
        a = mask * torch.sigmoid(self.a_g(z)) * self.a_p(z)
        b = mask * torch.sigmoid(self.b_g(z)) * self.b_p(z)
        x = torch.einsum("bikc,bjkc->bijc", a, b)
        return pair + self.z(self.norm_out(x)) * torch.sigmoid(self.g(z))


@_zoo.add(inputs=rows_and_pairs, attention=1, layer_norm=2, swiglu=1)
class RowsWithPairBias(nn.Module):
    """AlphaFold's rows with einsum over named axes, the value's gate and the output as raw weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_m, self.norm_z = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.query_w, self.key_w, self.value_w, self.gating_w = (
            nn.Parameter(0.2 * torch.randn(DIM, HEADS, HEAD)) for _ in range(4)
        )
        self.gating_b, self.output_w = (
            nn.Parameter(torch.ones(HEADS, HEAD)),
            nn.Parameter(torch.zeros(HEADS, HEAD, DIM)),
        )
        self.feat_2d_weights = nn.Parameter(torch.randn(DIM, HEADS))

    def forward(self, m: Tensor, pair: Tensor) -> Tensor:
        x = self.norm_m(m)
        bias = torch.einsum("bqkc,ch->bhqk", self.norm_z(pair), self.feat_2d_weights)
        q = torch.einsum("bnqa,ahc->bnqhc", x, self.query_w) * HEAD ** (-0.5)
        k = torch.einsum("bnka,ahc->bnkhc", x, self.key_w)
        v = torch.einsum("bnka,ahc->bnkhc", x, self.value_w)
        logits = torch.einsum("bnqhc,bnkhc->bnhqk", q, k) + bias.unsqueeze(1)
        weights = torch.softmax(logits, dim=-1)
        avg = torch.einsum("bnhqk,bnkhc->bnqhc", weights, v)
        gate = torch.sigmoid(torch.einsum("bnqa,ahc->bnqhc", x, self.gating_w) + self.gating_b)
        return m + torch.einsum("bnqhc,hco->bnqo", avg * gate, self.output_w)


@_zoo.add(attention=2, layer_norm=4)
class SetTransformer(nn.Module):
    """Induced points: heads split by chunks and stacked in the batch, divided by the root of the whole width."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(DIM, DIM) for _ in range(4))
            self.ln0, self.ln1 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            q, k, v = self.fc_q(q), self.fc_k(k), self.fc_v(k)
            q_ = torch.cat(q.split(HEAD, 2), 0)
            k_ = torch.cat(k.split(HEAD, 2), 0)
            v_ = torch.cat(v.split(HEAD, 2), 0)
            a = torch.softmax(q_.bmm(k_.transpose(1, 2)) / math.sqrt(DIM), 2)
            o = torch.cat((q_ + a.bmm(v_)).split(q.size(0), 0), 2)
            o = self.ln0(o)
            o = o + F.relu(self.fc_o(o))
            return self.ln1(o)

    def __init__(self) -> None:
        super().__init__()
        self.induced = nn.Parameter(torch.randn(1, 3, DIM))
        self.mab0, self.mab1 = self.Block(), self.Block()

    def forward(self, x: Tensor) -> Tensor:
        h = self.mab0(self.induced.repeat(x.size(0), 1, 1), x)
        return self.mab1(x, h)


@_zoo.add(inputs=tokens_and_more, attention=1, layer_norm=3, swiglu=1)
class Perceiver(nn.Module):
    """Latents ask a byte array: fewer latents than inputs, packed keys and values, a gated GELU, context normed."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, DIM))
        self.norm, self.norm_context, self.norm_ff = (nn.LayerNorm(DIM) for _ in range(3))
        self.to_q, self.to_kv = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, 2 * DIM, bias=False)
        self.to_out, self.net0, self.net1 = nn.Linear(DIM, DIM), nn.Linear(DIM, 128), nn.Linear(64, DIM)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        latents = self.latents[None].expand(data.shape[0], -1, -1)
        y = self.norm_context(data)
        q = self.to_q(self.norm(latents))
        k, v = self.to_kv(y).chunk(2, dim=-1)
        q, k, v = (
            t.reshape(t.shape[0], t.shape[1], HEADS, HEAD).permute(0, 2, 1, 3).reshape(-1, t.shape[1], HEAD)
            for t in (q, k, v)
        )
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * HEAD**-0.5
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        out = out.reshape(-1, HEADS, 4, HEAD).permute(0, 2, 1, 3).reshape(-1, 4, DIM)
        latents = self.to_out(out) + latents
        y, gates = self.net0(self.norm_ff(latents)).chunk(2, dim=-1)
        return self.net1(y * F.gelu(gates)) + latents + x[:, :4]


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


@_zoo.add()
class SlotAttention(nn.Module):
    """Slots compete: a softmax over queries, renormalised over keys, which is no attention that a kernel has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.slots = nn.Parameter(torch.randn(3, DIM))

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots.expand(x.shape[0], -1, -1)
        k, v, q = self.k(x), self.v(x), self.q(slots)
        dots = torch.einsum("bid,bjd->bij", q, k) * DIM**-0.5
        attn = dots.softmax(dim=1) + 1e-8
        attn = attn / attn.sum(dim=-1, keepdim=True)
        return torch.einsum("bjd,bij->bid", v, attn)


@_zoo.add(layer_norm=1)
class GraphAttention(nn.Module):
    """GAT: scores are sums of two vectors through a leaky relu, no product of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm = nn.Linear(DIM, DIM, bias=False), nn.LayerNorm(DIM)
        self.a_src, self.a_dst = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))
        self.register_buffer("adjacency", torch.eye(LENGTH) + torch.eye(LENGTH).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        e = F.leaky_relu((h @ self.a_src)[:, :, None] + (h @ self.a_dst)[:, None, :], 0.2)
        attention = torch.where(self.adjacency > 0, e, torch.full_like(e, -9e15))
        return self.norm(F.elu(torch.matmul(F.softmax(attention, dim=-1), h)))


@_zoo.add(inputs=tokens_and_more, attention=1)
class PointerToMemory(nn.Module):
    """Luong: one product of decoder states with encoder states, bmm, tanh of the joined context."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.concat = nn.Linear(DIM, DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, hidden: Tensor, outputs: Tensor) -> Tensor:
        energies = torch.bmm(hidden, self.attn(outputs).transpose(1, 2))
        weights = F.softmax(energies, dim=2)
        context = weights.bmm(outputs)
        return torch.tanh(self.concat(torch.cat((hidden, context), dim=2)))


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
