"""Speech, sets, proteins and graphs, written anew in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, tokens_and_more

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
