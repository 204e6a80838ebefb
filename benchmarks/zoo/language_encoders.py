"""Encoders of text, with and without a decoder, written anew in the manner of their reference code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, tokens_and_more

_zoo = Register("language")


def entries() -> list[Entry]:
    return _zoo.entries


def ids_and_padding() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 4:] = 0
    return (torch.randint(1, 50, (BATCH, LENGTH)), mask), {}


def ids() -> Inputs:
    return (torch.randint(1, 50, (BATCH, LENGTH)),), {}


def sequence_first() -> Inputs:
    return (torch.randn(LENGTH, BATCH, DIM),), {}


@_zoo.add(inputs=ids_and_padding, attention=2, layer_norm=4)
class BertOfOne(nn.Module):
    """The well-known rewrite of BERT: a norm by the sample deviation outside of eps, mask == 0 filled with -1e9."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_2, self.b_2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean(-1, keepdim=True)
            std = x.std(-1, keepdim=True)
            return self.a_2 * (x - mean) / (std + 1e-6) + self.b_2

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
            self.output_linear, self.dropout = nn.Linear(DIM, DIM), nn.Dropout(p=0.0)
            self.norms = nn.ModuleList(BertOfOne.Norm() for _ in range(2))
            self.w_1, self.w_2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)

        def attend(self, x: Tensor, mask: Tensor) -> Tensor:
            b = x.size(0)
            q, k, v = [layer(x).view(b, -1, HEADS, HEAD).transpose(1, 2) for layer in self.linear_layers]
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
            scores = scores.masked_fill(mask == 0, -1e9)
            p_attn = self.dropout(F.softmax(scores, dim=-1))
            x = torch.matmul(p_attn, v).transpose(1, 2).contiguous().view(b, -1, DIM)
            return self.output_linear(x)

        def gelu(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x + self.dropout(self.attend(self.norms[0](x), mask))
            return x + self.dropout(self.w_2(self.dropout(self.gelu(self.w_1(self.norms[1](x))))))

    def __init__(self) -> None:
        super().__init__()
        self.token, self.blocks = nn.Embedding(50, DIM), nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mask = (x > 0).unsqueeze(1).repeat(1, x.size(1), 1).unsqueeze(1) & (padding > 0)[:, None, None, :]
        x = self.token(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


@_zoo.add(inputs=ids_and_padding, attention=2, layer_norm=5)
class HuggingBert(nn.Module):
    """Post-norm; the extended mask is (1 - padding) times the lowest number of the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, DIM), nn.LayerNorm(DIM, eps=1e-12)
        self.layers = nn.ModuleList()
        for _ in range(2):
            parts = {name: nn.Linear(DIM, DIM) for name in ("query", "key", "value", "dense")}
            parts |= {"wide": nn.Linear(DIM, 64), "narrow": nn.Linear(64, DIM)}
            self.layers.append(nn.ModuleDict(parts | {"ln1": nn.LayerNorm(DIM), "ln2": nn.LayerNorm(DIM)}))

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.view((*x.size()[:-1], HEADS, HEAD)).permute(0, 2, 1, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        extended = attention_mask[:, None, None, :].to(dtype=x.dtype)
        extended = (1.0 - extended) * torch.finfo(x.dtype).min
        for layer in self.layers:
            q, k, v = (self.heads(layer[name](x)) for name in ("query", "key", "value"))
            scores = torch.matmul(q, k.transpose(-1, -2))
            scores = scores / math.sqrt(HEAD)
            scores = scores + extended
            probs = nn.functional.softmax(scores, dim=-1)
            context = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
            context = context.view((*context.size()[:-2], DIM))
            x = layer["ln1"](layer["dense"](context) + x)
            x = layer["ln2"](layer["narrow"](F.gelu(layer["wide"](x))) + x)
        return x


class T5Norm(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            x = x.to(self.weight.dtype)
        return self.weight * x


@_zoo.add(attention=1, rms_norm=2, swiglu=1)
class TextToText(nn.Module):
    """T5 v1.1: no scale, buckets of relative distances, a bias added in place, a tanh GELU gate."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = T5Norm(), T5Norm()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(8, HEADS)
        self.wi_0, self.wi_1, self.wo = (
            nn.Linear(DIM, 48, bias=False),
            nn.Linear(DIM, 48, bias=False),
            nn.Linear(48, DIM),
        )

    def bias(self, length: int, device: torch.device) -> Tensor:
        context = torch.arange(length, dtype=torch.long, device=device)[:, None]
        memory = torch.arange(length, dtype=torch.long, device=device)[None, :]
        distance = memory - context
        bucket = (distance > 0).to(torch.long) * 4
        distance = torch.abs(distance)
        far = 2 + (torch.log(distance.float() / 2) / math.log(8 / 2) * 2).to(torch.long)
        far = torch.min(far, torch.full_like(far, 3))
        bucket += torch.where(distance < 2, distance, far)
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.ln1(x)
        q, k, v = (p(y).view(b, -1, HEADS, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += self.bias(t, x.device)
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, -1, DIM))
        y = self.ln2(x)
        y = F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y)
        return x + self.wo(y)


@_zoo.add(inputs=sequence_first, attention=1, layer_norm=2)
class SequenceFirst(nn.Module):
    """fairseq: time first, queries scaled after their projection, heads folded into the batch by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def forward(self, x: Tensor) -> Tensor:
        t, b, c = x.size()
        y = self.norm1(x)
        q = self.q_proj(y)
        q *= HEAD**-0.5
        k, v = self.k_proj(y), self.v_proj(y)
        q, k, v = (z.contiguous().view(t, b * HEADS, HEAD).transpose(0, 1) for z in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))
        future = torch.triu(torch.zeros([t, t]).float().fill_(float("-inf")).type_as(weights), 1)
        weights += future.unsqueeze(0)
        probs = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        attn = torch.bmm(probs, v)
        attn = attn.transpose(0, 1).contiguous().view(t, b, c)
        x = x + self.out_proj(attn)
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


@_zoo.add(inputs=tokens_and_more, attention=2, layer_norm=3)
class AnnotatedTransformer(nn.Module):
    """A decoder layer with attention to a memory: subsequent mask == 0 of a triu, weights kept as an attribute."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None:
                mask = mask.unsqueeze(1)
            b = query.size(0)
            query, key, value = [
                lin(x).view(b, -1, HEADS, HEAD).transpose(1, 2) for lin, x in zip(self.linears, (query, key, value))
            ]
            scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
            if mask is not None:
                scores = scores.masked_fill(mask == 0, -1e9)
            p_attn = scores.softmax(dim=-1)
            x = torch.matmul(p_attn, value).transpose(1, 2).contiguous().view(b, -1, HEADS * HEAD)
            return self.linears[-1](x)

    def __init__(self) -> None:
        super().__init__()
        self.own, self.src = self.Attention(), self.Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.w_1, self.w_2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        size = x.size(1)
        future = torch.triu(torch.ones((1, size, size)), diagonal=1).type(torch.uint8)
        y = self.norms[0](x)
        x = x + self.own(y, y, y, future == 0)
        x = x + self.src(self.norms[1](x), memory, memory)
        return x + self.w_2(self.w_1(self.norms[2](x)).relu())
