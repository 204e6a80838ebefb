"""Attention in the spellings of its scores: orders of scale and mask, products, softmaxes, biases. One site each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, LENGTH, Register, SelfAttention

_zoo = Register("attention", SelfAttention)
_SCALE = HEAD**-0.5


def entries() -> list[Entry]:
    return _zoo.entries


def _causal(x: Tensor, k: Tensor) -> Tensor:
    return torch.ones(x.shape[-2], k.shape[-2], dtype=torch.bool, device=x.device).tril()


@_zoo.add(attention=1)
def scores_times_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q, k.transpose(-2, -1)) * _SCALE).softmax(dim=-1) @ v


@_zoo.add(attention=1)
def scores_over_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD), dim=-1), v)


@_zoo.add(attention=1)
def query_times_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * _SCALE
    attn = q @ k.transpose(-2, -1)
    attn = attn.softmax(dim=-1)
    return attn @ v


@_zoo.add(attention=1)
def both_times_root_of_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = 1 / math.sqrt(math.sqrt(HEAD))
    return torch.softmax((q * scale) @ (k * scale).mT, -1) @ v


@_zoo.add(attention=1)
def key_over_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ (k / HEAD**0.5).permute(0, 1, 3, 2), -1) @ v


@_zoo.add(attention=1)
def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


@_zoo.add(attention=1)
def scale_of_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / torch.full([], HEAD**0.5, dtype=q.dtype), -1) @ v


@_zoo.add(attention=1)
def mask_after_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf"), device=q.device).triu(1)
    scores = q @ k.transpose(2, 3) * _SCALE + mask
    return F.softmax(scores.float(), dim=-1).type_as(q) @ v


@_zoo.add(attention=1)
def mask_before_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros_like(_causal(q, k), dtype=q.dtype).masked_fill(~_causal(q, k), -1e4)
    return (((q @ k.mT) + mask) * _SCALE).softmax(-1) @ v


@_zoo.add(attention=1)
def masked_fill_with_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(_causal(q, k)[None, None] == 0, float("-inf"))
    return F.softmax(att, dim=-1) @ v


@_zoo.add(attention=1)
def masked_fill_with_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    att = torch.einsum("bhid,bhjd->bhij", q, k) * _SCALE
    att = att.masked_fill(~_causal(q, k), -torch.finfo(att.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", att.softmax(dim=-1), v)


@_zoo.add(attention=1)
def where_on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / HEAD**0.5
    scores = torch.where(_causal(q, k), scores, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@_zoo.add(attention=1)
def where_with_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / HEAD**0.5
    low = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=q.device)
    return torch.where(_causal(q, k), scores, low).softmax(-1) @ v


@_zoo.add(attention=1)
def mask_of_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.triu(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device), diagonal=1)
    return ((q @ k.mT) * _SCALE).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@_zoo.add(attention=1)
def logarithm_of_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.log(torch.tril(torch.ones(q.shape[-2], k.shape[-2], device=q.device)))
    return torch.softmax((q @ k.mT) * _SCALE + mask.to(q.dtype), -1) @ v


@_zoo.add(attention=1)
def mask_of_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)[:, None]
    j = torch.arange(k.shape[-2], device=q.device)[None, :]
    return (q @ k.mT * _SCALE).masked_fill(j > i, float("-inf")).softmax(-1) @ v


@_zoo.add(attention=1)
def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)[:, None]
    j = torch.arange(k.shape[-2], device=q.device)[None, :]
    allowed = (j <= i) & (i - j < 3)
    return torch.where(allowed, q @ k.mT * _SCALE, float("-inf")).softmax(-1) @ v


@_zoo.add(attention=1)
def block_local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block = torch.arange(q.shape[-2], device=q.device) // 3
    scores = (q @ k.mT * _SCALE).masked_fill(block[:, None] != block[None, :], float("-inf"))
    return scores.softmax(-1) @ v


@_zoo.add(attention=1)
def softmax_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(2, 3) * _SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.0, training=True) @ v


@_zoo.add(attention=1)
def product_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * _SCALE
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


@_zoo.add(attention=1)
def all_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v32 = q.float(), k.float(), v.float()
    return (torch.softmax(q @ k.mT * _SCALE, -1) @ v32).to(v.dtype)


@_zoo.add(attention=1)
def softmax_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * _SCALE
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@_zoo.add(attention=1)
def softmax_module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.Softmax(dim=-1)(q @ k.mT * _SCALE).matmul(v)


@_zoo.add(attention=1)
def softmax_over_positive_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax((q @ k.mT).mul(_SCALE), 3).matmul(v)


@_zoo.add(attention=1)
def keys_by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Transposed: the scores are [keys, queries] and the softmax runs over the keys."""
    scores = k @ q.transpose(-1, -2) * _SCALE
    return scores.softmax(dim=-2).transpose(-1, -2) @ v


@_zoo.add(attention=1)
def safe_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = _causal(q, k)
    scores = (q @ k.mT * _SCALE).masked_fill(~allowed, float("-inf"))
    weights = torch.where(allowed.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return weights @ v


@_zoo.add(attention=1)
def nan_to_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * _SCALE).masked_fill(~_causal(q, k), float("-inf")).softmax(-1)
    return torch.nan_to_num(weights, 0.0) @ v


@_zoo.add(attention=1)
def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * _SCALE
    scores = 20.0 * torch.tanh(scores / 20.0)
    return scores.masked_fill(~_causal(q, k), float("-inf")).softmax(-1) @ v


@_zoo.add(attention=1)
def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([2 ** -(2.0 * (h + 1)) for h in range(HEADS)], device=q.device, dtype=q.dtype)
    distance = torch.arange(k.shape[-2], device=q.device) - torch.arange(q.shape[-2], device=q.device)[:, None]
    scores = q @ k.mT * _SCALE + slopes[:, None, None] * distance
    return scores.masked_fill(~_causal(q, k), float("-inf")).softmax(-1) @ v


@_zoo.add(attention=1)
def clamp_after_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.finfo(q.dtype).min
    scores = q @ k.mT * _SCALE + torch.where(_causal(q, k), 0.0, low).to(q.dtype)
    return torch.max(scores, torch.tensor(low, dtype=q.dtype, device=q.device)).softmax(-1) @ v


@_zoo.add(attention=1)
def mask_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= _SCALE
    scores.masked_fill_(~_causal(q, k), float("-inf"))
    return scores.softmax(-1) @ v


@_zoo.add(attention=1)
def batched_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, t.shape[2], HEAD) for t in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * _SCALE, -1), v)
    return out.view(-1, HEADS, out.shape[1], HEAD)


@_zoo.add(attention=1)
def batched_product_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, t.shape[2], HEAD) for t in (q, k, v))
    bias = -torch.arange(k.shape[1], device=q.device, dtype=q.dtype).flip(0).expand(q.shape[0], 1, -1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=_SCALE)
    return torch.bmm(scores.softmax(-1), v).view(-1, HEADS, q.shape[1], HEAD)


@_zoo.add(attention=1)
def batched_product_on_empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, t.shape[2], HEAD) for t in (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=_SCALE)
    return torch.bmm(scores.softmax(-1), v).view(-1, HEADS, q.shape[1], HEAD)


@_zoo.add(attention=1)
def einsum_over_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(_SCALE).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


@_zoo.add(attention=1)
def probabilities_masked_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The hidden probabilities are set to zero again after the softmax, which changes nothing."""
    hidden = ~_causal(q, k)
    weights = (q @ k.mT * _SCALE).masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ v


class _Biased(SelfAttention):
    """A learned bias over heads, queries and keys."""

    def __init__(self) -> None:
        super().__init__(self.core_with_bias)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def core_with_bias(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * _SCALE + self.bias).softmax(-1) @ v


_zoo.add(attention=1)(type("LearnedBias", (_Biased,), {}))


@_zoo.add(attention=1)
class RelativeBuckets(SelfAttention):
    """T5: an embedding of bucketed distances, no scale."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.table = nn.Embedding(2 * LENGTH, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = (torch.arange(t.shape[-2], device=q.device) for t in (q, k))
        bias = self.table(j[None, :] - i[:, None] + LENGTH).permute(2, 0, 1).unsqueeze(0)
        scores = q @ k.transpose(3, 2)
        scores += bias
        return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


@_zoo.add(attention=1)
class RelativeTable(SelfAttention):
    """Swin: a table of parameters, indexed by a buffer."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.table = nn.Parameter(torch.randn(2 * LENGTH - 1, HEADS))
        i = torch.arange(LENGTH)
        self.register_buffer("index", i[:, None] - i[None, :] + LENGTH - 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(LENGTH, LENGTH, -1).permute(2, 0, 1).contiguous()
        attn = (q * _SCALE) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return attn.softmax(dim=-1) @ v


@_zoo.add(attention=1)
class Sinks(SelfAttention):
    """A learned logit a head takes part in the softmax and is dropped."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * _SCALE
        column = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        return F.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1] @ v


@_zoo.add(attention=1)
class CausalBuffer(SelfAttention):
    """minGPT: a buffer of ones that is sliced."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


def _with_padding() -> Inputs:
    mask = torch.ones(BATCH, LENGTH)
    mask[1, 4:] = 0
    return (torch.randn(BATCH, LENGTH, DIM), mask), {}


@_zoo.add(inputs=_with_padding, attention=1)
class ExtendedPadding(SelfAttention):
    """BERT: (1 - mask) * -10000, added."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.extended = torch.zeros(())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(q @ k.mT / math.sqrt(HEAD) + self.extended) @ v

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        self.extended = (1.0 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        return super().forward(x)


def _with_lengths() -> Inputs:
    return (torch.randn(BATCH, LENGTH, DIM), torch.tensor([6, 4])), {}


@_zoo.add(inputs=_with_lengths, attention=1)
class PaddingOfLengths(SelfAttention):
    def __init__(self) -> None:
        super().__init__(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        valid = torch.arange(k.shape[2], device=q.device)[None, :] < self.lengths[:, None]
        return (q @ k.mT * _SCALE).masked_fill(~valid[:, None, None, :], -1e9).softmax(-1) @ v

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        self.lengths = lengths
        return super().forward(x)


def _with_documents() -> Inputs:
    return (torch.randn(BATCH, LENGTH, DIM), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])), {}


@_zoo.add(inputs=_with_documents, attention=1)
class Documents(SelfAttention):
    """A packed batch: causal within each document."""

    def __init__(self) -> None:
        super().__init__(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        same = self.documents[:, :, None] == self.documents[:, None, :]
        allowed = (same & _causal(q, k))[:, None]
        return torch.where(allowed, q @ k.mT * _SCALE, -torch.inf).softmax(-1) @ v

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:  # type: ignore[override]
        self.documents = documents
        return super().forward(x)


@_zoo.add(attention=1, random=True)
class WithDropout(SelfAttention):
    def __init__(self) -> None:
        super().__init__(lambda q, k, v: self.drop((q @ k.mT * _SCALE).softmax(-1)) @ v)
        self.drop = nn.Dropout(0.1)


@_zoo.add(attention=1)
class NoDropout(SelfAttention):
    def __init__(self) -> None:
        super().__init__(lambda q, k, v: self.drop((q @ k.mT * _SCALE).softmax(-1)) @ v)
        self.drop = nn.Dropout(0.0)


@_zoo.add(attention=1)
class LearnedTemperature(SelfAttention):
    """Cosine attention: unit queries and keys, a clamped learned scale a head."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.logit_scale = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        return attn.softmax(dim=-1) @ v


# calls


@_zoo.add(attention=1)
def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_zoo.add(attention=1)
def call_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@_zoo.add(attention=1)
def call_with_bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(q, k), scale=0.3)


@_zoo.add(attention=1)
def call_with_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(~_causal(q, k), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, mask[None, None], 0.0, False)


@_zoo.add(wrap=False, attention=1)
def call_without_heads(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)
