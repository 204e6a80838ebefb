"""Masks and softmaxes as research code spells them now and then, and what only resembles them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.entry import Entry
from zoo.spelled import Register, SelfAttention

_attention = Register("unusual", SelfAttention)


def entries() -> list[Entry]:
    return _attention.entries


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
