"""Calls of scaled_dot_product_attention, and K/V heads that were repeated for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

B, H, KV, S, T, HEAD = 2, 4, 2, 5, 6, 8
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(
    dtype: torch.dtype = torch.float32, training: bool = False, heads: int = H, keys: int = T, value_dim: int = HEAD
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, S, HEAD], k [B, heads, keys, HEAD], v [B, heads, keys, value_dim]"""
    q, k = torch.randn(B, H, S, HEAD, dtype=dtype), torch.randn(B, heads, keys, HEAD, dtype=dtype)
    v = torch.randn(B, heads, keys, value_dim, dtype=dtype)
    return q.requires_grad_(training), k.requires_grad_(training), v.requires_grad_(training)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def positional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


def own_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=True)


def bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, k.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.linspace(-1, 1, S * T, device=q.device, dtype=torch.float64).view(1, 1, S, T).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(B, 1, S, T))


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [plain, positional, own_scale, bool_mask, float_mask])
def test_call_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert captured.refusals == []
    assert_same_results(captured, training)


def arguments(function: Function, *args: Tensor) -> tuple[object, ...]:
    (node,) = capture(function, *args).operators()
    return node.args


def test_scale_of_the_user_is_kept() -> None:
    assert arguments(own_scale, *tensors())[4] == 0.3
    assert arguments(plain, *tensors())[4] == pytest.approx(1 / math.sqrt(HEAD))


def test_mask_is_kept_and_not_replaced_by_is_causal() -> None:
    args = arguments(bool_mask, *tensors())
    assert args[3] is not None
    assert args[5] is False
    assert arguments(positional, *tensors())[3] is None
    assert arguments(positional, *tensors())[5] is True


def test_value_heads_of_another_size() -> None:
    captured = capture(plain, *tensors(value_dim=12))
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def torchtune_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.unsqueeze(2).expand(B, KV, H // KV, -1, HEAD).flatten(1, 2)
    v = v.unsqueeze(2).expand(B, KV, H // KV, -1, HEAD).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, length, dim).reshape(batch, heads * n, length, dim)


def hugging_face_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k, H // KV), repeat_kv(v, H // KV).contiguous())


def repeat_interleave_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = H // KV
    return F.scaled_dot_product_attention(q, k.repeat_interleave(n, dim=1), v.repeat_interleave(n, 1))


def repeat_interleave_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = H // KV
    return F.scaled_dot_product_attention(q, torch.repeat_interleave(k, n, dim=1), torch.repeat_interleave(v, n, -3))


def repeated_before_the_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = H // KV
    k = k.transpose(1, 2).contiguous().repeat_interleave(n, dim=2).transpose(1, 2)
    v = torch.repeat_interleave(v.transpose(1, 2), n, dim=2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


GROUPED = (
    torchtune_heads,
    hugging_face_heads,
    repeat_interleave_method,
    repeat_interleave_function,
    repeated_before_the_transpose,
)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [enable_gqa, *GROUPED])
def test_repeated_heads_are_folded_away(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training, heads=KV), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert not captured.targets() & {"expand", "repeat_interleave"}
    (node,) = captured.operators()
    assert [argument.meta["example_value"].shape[1] for argument in node.args[:3]] == [H, KV, KV]  # type: ignore[union-attr]
    assert_same_results(captured, training)


def single_head_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1))


def single_head_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat(1, H, 1, 1), v.repeat(1, H, 1, 1))


@pytest.mark.parametrize("function", [single_head_expanded, single_head_repeated])
def test_single_head_is_folded_however_it_was_repeated(function: Function) -> None:
    captured = capture(function, *tensors(heads=1))
    assert captured.operators()[0].args[1].meta["example_value"].shape[1] == 1  # type: ignore[union-attr]
    assert_same_results(captured)


def repeated_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat(1, H // KV, 1, 1), v.repeat(1, H // KV, 1, 1))


def expanded_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k[:, None].expand(B, H // KV, KV, T, HEAD).reshape(B, H, T, HEAD)
    v = v[:, None].expand(B, H // KV, KV, T, HEAD).reshape(B, H, T, HEAD)
    return F.scaled_dot_product_attention(q, k, v)


def only_k_repeated_by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = H // KV
    return F.scaled_dot_product_attention(q, k.repeat_interleave(n, 1), v.repeat(1, n, 1, 1))


def keys_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = torch.cat([k, k + 1], 1), torch.cat([v, v + 1], 1)
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))


def repeated_through_a_scrambling_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k[:, :, None].expand(B, KV, H // KV, T, HEAD).transpose(1, 2).reshape(B, H, T, HEAD)
    v = v[:, :, None].expand(B, KV, H // KV, T, HEAD).transpose(1, 2).reshape(B, H, T, HEAD)
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "function",
    [
        repeated_in_blocks,
        expanded_in_blocks,
        only_k_repeated_by_heads,
        keys_repeated,
        repeated_through_a_scrambling_view,
    ],
)
def test_heads_in_another_order_are_not_folded(function: Function) -> None:
    captured = capture(function, *tensors(heads=KV))
    assert captured.counts == {"attention": 1}
    assert captured.operators()[0].args[1].meta["example_value"].shape[1] == H  # type: ignore[union-attr]
    assert_same_results(captured)


@pytest.mark.parametrize("causal", [False, True])
def test_result_keeps_the_layout_that_its_readers_rely_on(causal: bool) -> None:
    def projections(x: Tensor) -> Tensor:
        q, k, v = (x.view(B, S, H, HEAD).transpose(1, 2) * c for c in (1.0, 2.0, 3.0))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(B, S, H * HEAD)

    captured = capture(projections, torch.randn(B, S, H * HEAD))
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)


def two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0])


def five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.stack([t, t + 1, t - 1], 1) for t in (q, k, v))
    mask = torch.ones(S, k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, mask)


def mask_of_the_batch_in_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    mask = torch.linspace(-1, 1, B * H * S * T, device=q.device).view(B * H, S, T).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask)


def batch_broadcasts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:1], v[:1])


def learned_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:1], k, v)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(
    "function",
    [
        three_dimensions,
        two_dimensions,
        five_dimensions,
        mask_of_the_batch_in_three_dimensions,
        batch_broadcasts,
        learned_queries,
    ],
)
def test_any_leading_dimensions(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert captured.refusals == []
    assert_same_results(captured, training)


def test_grouped_heads_in_three_dimensions() -> None:
    q, k, v = tensors(heads=KV)
    captured = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q[0], k[0], v[0])
    assert [arg.meta["example_value"].shape[1] for arg in captured.operators()[0].args[:3]] == [H, KV, KV]  # type: ignore[union-attr]
    assert_same_results(captured)


def test_autocast_casts_are_made_explicit() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v)

    captured = capture(call, *tensors())
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def test_dropout_is_handed_on() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)

    captured = capture(call, *tensors(training=True), training=True)
    assert captured.counts == {"attention": 1}
    (node,) = captured.operators()
    assert node.args[9] == 0.1
    assert str(node.target) == "infuse.attention.inline"
    refused = capture(call, *tensors(), settings=Settings(numerics="exact"))
    assert "random numbers" in refused.refusals[0]


def test_symbolic_dropout_of_zero_is_rewritten() -> None:
    class Attention(torch.nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p)

    assert capture(Attention(0.0), *tensors(), dynamic=True).counts == {"attention": 1}
    dropping = capture(Attention(0.25), *tensors(), dynamic=True)
    assert dropping.counts == {"attention": 1}
    assert dropping.operators()[0].args[9] != 0.0


def test_calls_are_exact() -> None:
    captured = capture(torchtune_heads, *tensors(torch.bfloat16, heads=KV), settings=Settings(numerics="exact"))
    assert captured.counts == {"attention": 1}
