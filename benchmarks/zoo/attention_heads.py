"""Attention whose heads share keys and values, in the ways that people write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.entry import Entry
from zoo.spelled import HEAD, HEADS, Grouped, MultiQuery, Register

_grouped = Register("attention", Grouped)
_multi_query = Register("attention", MultiQuery)
_SCALE = HEAD**-0.5


def entries() -> list[Entry]:
    return [*_grouped.entries, *_multi_query.entries]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * _SCALE).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@_grouped.add(attention=1)
def groups_repeat_interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


@_grouped.add(attention=1)
def groups_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = k.shape
    k = k[:, :, None, :, :].expand(batch, heads, 2, length, dim).reshape(batch, heads * 2, length, dim)
    v = v[:, :, None, :, :].expand(batch, heads, 2, length, dim).reshape(batch, heads * 2, length, dim)
    return _attend(q, k, v)


@_grouped.add(attention=1)
def groups_flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
    return _attend(q, k, v)


@_grouped.add(attention=1)
def groups_stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.stack((t, t), dim=2).flatten(1, 2) for t in (k, v))
    return _attend(q, k, v)


@_grouped.add(attention=1)
def groups_indexed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.tensor([0, 0, 1, 1], device=q.device)
    return _attend(q, k[:, index], v[:, index])


@_grouped.add(attention=1)
def groups_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads are tiled, not interleaved: query head h reads key head h % 2."""
    return _attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


@_grouped.add(attention=1)
def groups_in_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    weights = torch.einsum("bkgqd,bksd->bkgqs", q, k).mul(_SCALE).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", weights, v).flatten(1, 2)


@_grouped.add(attention=1)
def groups_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(q.shape[0], 2, 2, q.shape[2], HEAD)
    weights = (q @ k.unsqueeze(2).mT / math.sqrt(HEAD)).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


@_grouped.add(attention=1)
def groups_in_a_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@_multi_query.add(attention=1)
def one_key_head_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * _SCALE).softmax(-1) @ v


@_multi_query.add(attention=1)
def one_key_head_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1))


@_multi_query.add(attention=1)
def one_key_head_in_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.squeeze(1), v.squeeze(1)
    weights = torch.einsum("bhid,bjd->bhij", q * _SCALE, k).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v)


@_multi_query.add(attention=1)
def heads_folded_into_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt_bigcode: queries of all heads are rows of one matrix."""
    batch, heads, length, dim = q.shape
    folded = q.transpose(1, 2).reshape(batch, length * heads, dim)
    weights = (torch.bmm(folded, k[:, 0].transpose(1, 2)) * _SCALE).softmax(-1)
    return torch.bmm(weights, v[:, 0]).view(batch, length, heads, dim).transpose(1, 2)
