"""Attention of any rank and by any product: bmm, baddbmm, einsum, windows, groups, memories."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.patterns.capture import MODES, Captured, assert_same_results, capture, inline_overload
from tests.patterns.test_attention_call import HEAD, KV, B, H, S, T, tensors

Function = Callable[..., Tensor]
WINDOWS = 2


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, t.shape[2], HEAD) for t in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, -1), v)


def bmm_with_a_mask_in_four_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # As OPT, BART and BLOOM spell it.
    batch, heads, length, _ = q.shape
    mask = torch.where(torch.arange(T, device=q.device) < T - 1, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    q, k, v = (t.reshape(batch * heads, -1, HEAD) for t in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, -1) + mask[None, None, None]
    weights = torch.softmax(scores.view(batch * heads, length, -1), -1)
    out = torch.bmm(weights, v).view(batch, heads, length, HEAD)
    return out.transpose(1, 2).reshape(batch, length, heads * HEAD)


def bloom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, _ = q.shape
    alibi = torch.linspace(-1, 0, heads * T, device=q.device).view(1, heads, 1, T).expand(batch, heads, 1, T)
    alibi = alibi.reshape(batch * heads, 1, T).to(q.dtype)
    q, k, v = (t.reshape(batch * heads, -1, HEAD) for t in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.3).view(batch, heads, length, -1)
    scores = scores.masked_fill(torch.arange(T, device=q.device) > T - 2, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(weights.view(batch * heads, length, -1), v)
    return out.view(batch, heads, length, HEAD).transpose(1, 2).reshape(batch, length, -1)


def baddbmm_without_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), v)


def single_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    return torch.softmax(q @ k.transpose(-2, -1) / HEAD**0.5, -1) @ v


def matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    return torch.softmax(torch.mm(q, k.t()) * 0.3, 1).mm(v)


def memory_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    memory = k[0, 0]
    return torch.softmax(q[:, 0] @ memory.T, dim=-1) @ memory


def memory_read_of_a_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    memory = k[0, 0]
    return torch.softmax(torch.matmul(q[0, 0], memory.transpose(0, 1)), -1) @ memory


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Swin: a bias for each head, and a mask for each window, added in five dimensions.
    bias = torch.linspace(-1, 1, H * S * T, device=q.device).view(H, S, T).to(q.dtype)
    allowed = torch.ones(WINDOWS, S, T, dtype=torch.bool, device=q.device).tril(2)
    mask = torch.zeros(WINDOWS, S, T, device=q.device, dtype=q.dtype).masked_fill(~allowed, -100.0)
    q, k, v = (torch.cat([t, t + 1], 0) for t in (q, k, v))
    scores = (q * 0.3) @ k.transpose(-2, -1) + bias.unsqueeze(0)
    scores = scores.view(-1, WINDOWS, H, S, T) + mask.unsqueeze(1).unsqueeze(0)
    return torch.softmax(scores.view(-1, H, S, T), -1) @ v


def relative_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # SAM and ViTDet: rows and columns of an image, whose biases are added to the keys' two dimensions.
    batch, heads = q.shape[:2]
    rows = torch.einsum("nsd,rd->nsr", q.reshape(-1, S, HEAD), torch.ones(2, HEAD, dtype=q.dtype, device=q.device))
    columns = rows.new_ones(batch * heads, S, T // 2)
    q, k, v = (t.reshape(batch * heads, -1, HEAD) for t in (q, k, v))
    scores = (q * 0.3) @ k.transpose(-2, -1)
    scores = scores.view(-1, S, 2, T // 2) + rows[:, :, :, None] + columns[:, :, None, :]
    return torch.softmax(scores.view(-1, S, T), -1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_heads_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", [q * 0.3, k])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def einsum_with_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("...qd, ...kd -> ...qk", q, k) * 0.3, -1)
    return torch.einsum("...qk, ...kd -> ...qd", weights, v)


def einsum_queries_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bkhq", q, k) * 0.3, 1)
    return torch.einsum("bkhq,bhkd->bqhd", weights, v)


def keys_by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(k @ q.transpose(-2, -1) * 0.3, dim=-2)
    return weights.transpose(-2, -1) @ v


def values_by_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Stable Diffusion's autoencoder: channels before positions.
    q, k, v = (t.transpose(-2, -1).contiguous() for t in (q, k, v))
    weights = torch.softmax(q.transpose(-2, -1) @ k * 0.3, -1)
    return v @ weights.transpose(-2, -1)


def axial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.stack([t, t + 1, t - 1], 1) for t in (q, k, v))
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def weights_permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.permute(1, 0, 2, 3), k.permute(1, 0, 2, 3), v
    weights = torch.softmax(q @ k.mT * 0.3, -1).permute(1, 0, 2, 3)
    return weights @ v


SPELLINGS = (
    bmm,
    bmm_with_a_mask_in_four_dimensions,
    bloom,
    baddbmm_without_a_bias,
    single_head,
    matrices,
    memory_read,
    memory_read_of_a_matrix,
    windows,
    einsum,
    einsum_heads_inside,
    einsum_with_ellipsis,
    einsum_queries_last,
    keys_by_queries,
    values_by_weights,
    axial,
    weights_permuted,
)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", SPELLINGS)
def test_spelling_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    place = {"place": inline_overload} if dynamic else {}
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic, **place)  # type: ignore[arg-type]
    assert captured.refusals == []
    assert captured.counts == {"attention": 1}
    assert "softmax" not in captured.targets()
    assert_same_results(captured, training)


@pytest.mark.parametrize("training", [False, True])
def test_biases_of_rows_and_columns_of_the_keys(training: bool) -> None:
    captured = capture(relative_positions, *tensors(training=training), training=training)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training)


def test_keys_split_into_dimensions_of_unknown_size_are_refused() -> None:
    captured = capture(relative_positions, *tensors(), dynamic=True)
    assert captured.counts == {}
    assert len(captured.refusals) == 1


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(q.shape[0], KV, H // KV, S, HEAD)
    weights = torch.softmax(torch.einsum("bhgqd,bhkd->bhgqk", q, k) * 0.3, -1)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).reshape(-1, H, S, HEAD)


def grouped_by_broadcasting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (KV, H // KV))
    mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(1)
    scores = (q @ k.unsqueeze(2).mT * 0.3).masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, -1) @ v[:, :, None]).flatten(1, 2)


def grouped_by_folding_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.reshape(q.shape[0], KV, H // KV * S, HEAD)
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def repeated_for_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
    return bmm(q, k, v)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [grouped_einsum, grouped_by_broadcasting, repeated_for_bmm])
def test_grouped_heads_are_not_repeated(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training, heads=KV), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert heads(captured) == [H, KV, KV]
    assert_same_results(captured, training)


def heads(captured: Captured) -> list[int]:
    return [arg.meta["example_value"].shape[1] for arg in captured.operators()[0].args[:3]]  # type: ignore[union-attr]


def test_groups_folded_into_the_queries_are_taken_as_they_are() -> None:
    captured = capture(grouped_by_folding_queries, *tensors(heads=KV))
    assert heads(captured) == [KV, KV, KV]
    assert_same_results(captured)


def test_multi_query_by_broadcasting() -> None:
    captured = capture(lambda q, k, v: torch.softmax(q @ k.mT * 0.3, -1) @ v, *tensors(heads=1))
    assert heads(captured) == [H, 1, 1]
    assert_same_results(captured)


def test_rows_that_share_a_memory_are_joined() -> None:
    captured = capture(memory_read, *tensors())
    assert captured.operators()[0].args[0].meta["example_value"].shape == (1, 1, B * S, HEAD)  # type: ignore[union-attr]


def test_queries_of_one_row_and_heads_of_another_batch_broadcast() -> None:
    def learned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q[:1] @ k.mT, -1) @ v

    def shared_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k[:1].mT, -1) @ v

    for function in (learned, shared_keys):
        captured = capture(function, *tensors(training=True), training=True)
        assert captured.counts == {"attention": 1}
        assert_same_results(captured, training=True)


def test_single_query_and_single_head() -> None:
    q, k, v = tensors()
    captured = capture(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, q[:, :1, :1], k[:, :1], v[:, :1])
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


class TimeFirst(torch.nn.Module):
    """fairseq: [T, B, C], heads folded into the batch by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, width = x.size()
        projected = self.qkv(x).chunk(3, -1)
        q, k, v = (y.contiguous().view(length, batch * 4, 4).transpose(0, 1) for y in projected)
        scores = torch.bmm(q, k.transpose(1, 2))
        scores = scores + torch.triu(torch.full((length, length), float("-inf"), dtype=x.dtype), 1).unsqueeze(0)
        out = torch.bmm(torch.softmax(scores, -1), v)
        return out.transpose(0, 1).contiguous().view(length, batch, width)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_heads_folded_beside_a_batch_that_is_no_first_dimension(
    dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    x = torch.randn(6, 3, 16, dtype=dtype, requires_grad=training)
    captured = capture(TimeFirst().to(dtype), x, training=training, dynamic=dynamic)
    assert captured.refusals == []
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training)
