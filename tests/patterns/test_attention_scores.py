"""Attention written out around a softmax: the spellings that are recognised, and what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, Captured, assert_same_results, capture
from tests.patterns.test_attention_call import HEAD, KV, B, H, S, T, repeat_kv, tensors

Function = Callable[..., Tensor]


def mask_like(q: Tensor, k: Tensor) -> Tensor:
    """[B, 1, S, T]: a causal mask in the dtype of q, as Hugging Face builds it."""
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(1)
    mask = torch.where(allowed, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    return mask[None, None].expand(q.shape[0], 1, -1, -1)


def operators_and_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    return scores.softmax(-1) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.mT), dim=-1), v)


def scale_first_on_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * HEAD**-0.5
    return torch.softmax(q @ k.permute(0, 1, 3, 2), dim=3) @ v


def scale_on_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(0.2 * torch.matmul(q, k.swapaxes(2, 3)), -1).matmul(v)


def two_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * 0.5) @ k.transpose(3, 2) * 0.5 / 2.0, -1) @ v


def float32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), v)


def scores_cast_to_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).float() * 0.3
    return scores.softmax(dim=-1).type_as(v) @ v


def hugging_face_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = mask_like(q, k)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = scores + mask[:, :, :, : k.shape[-2]]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v)


def mask_before_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, T, device=q.device).to(q.dtype)
    return torch.softmax((q @ k.mT + bias) * 0.5, -1) @ v


def two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, S * T, device=q.device).view(S, T).to(q.dtype)
    return torch.softmax(q @ k.mT * 0.3 + bias + mask_like(q, k), -1) @ v


def float32_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, S * T, device=q.device).view(S, T)
    return torch.softmax((q @ k.mT * 0.3).float() + bias, -1).to(v.dtype) @ v


def q_and_k_cast_to_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)) * 0.3
    return scores.softmax(-1).to(v.dtype) @ v


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # K goes straight from [B, T, H, D] to [B, H, D, T].
    k = k.transpose(1, 2).contiguous().permute(0, 2, 3, 1)
    return torch.softmax(q @ k * 0.3, -1) @ v


def key_already_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = torch.tanh(k.reshape(B, H, HEAD, T))
    return torch.softmax(q @ k * 0.3, -1) @ v


SPELLINGS = (
    operators_and_math,
    no_scale,
    scale_first_on_q,
    scale_on_the_left,
    two_scales,
    float32_softmax,
    scores_cast_to_float32,
    hugging_face_eager,
    mask_before_the_scale,
    two_masks,
    float32_mask,
    q_and_k_cast_to_float32,
    sequence_first,
    key_already_transposed,
)


def scale_of(captured: Captured) -> object:
    return captured.operators()[0].args[4]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", SPELLINGS)
def test_spelling_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.refusals == []
    assert captured.counts == {"attention": 1}
    assert not captured.targets() & {"softmax", "matmul"}
    assert_same_results(captured, training)


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (operators_and_math, HEAD**-0.5),
        (no_scale, 1.0),
        (scale_first_on_q, HEAD**-0.5),
        (two_scales, 0.125),
        (mask_before_the_scale, 0.5),
    ],
)
def test_scale_is_what_the_source_multiplies_by(function: Function, scale: float) -> None:
    assert scale_of(capture(function, *tensors())) == pytest.approx(scale)


def test_symbolic_head_dim_gives_a_symbolic_scale() -> None:
    captured = capture(operators_and_math, *tensors(training=True), dynamic=True, training=True)
    assert isinstance(scale_of(captured), torch.fx.Node)
    captured = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *tensors(), dynamic=True)
    assert isinstance(scale_of(captured), torch.fx.Node)
    assert_same_results(captured)


def test_square_scores_do_not_make_a_transposed_key_a_key() -> None:
    # T == HEAD: the shapes alone can't tell K from its transpose.
    q, k, v = tensors(keys=HEAD)

    def transposed_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k * 0.3, -1) @ v

    def key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * 0.3, -1) @ v

    for function in (transposed_key, key):
        captured = capture(function, q, k, v)
        assert captured.counts == {"attention": 1}
        assert_same_results(captured)


def test_transposed_values_are_taken_as_they_are() -> None:
    q, k, v = tensors(keys=HEAD)
    captured = capture(lambda q, k, v: torch.softmax(q @ k.mT * 0.3, -1) @ v.mT, q, k, v)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def test_mask_that_needs_a_gradient() -> None:
    bias = torch.randn(1, H, S, T, requires_grad=True)
    q, k, v = tensors(training=True)
    captured = capture(lambda q, k, v, b: torch.softmax(q @ k.mT * 0.3 + b, -1) @ v, q, k, v, bias, training=True)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training=True)


def test_mask_after_a_scale_on_it_needs_a_gradient() -> None:
    bias = torch.randn(H, 1, T, requires_grad=True)
    q, k, v = tensors(training=True)
    captured = capture(lambda q, k, v, b: torch.softmax((b + q @ k.mT) / 3.0, -1) @ v, q, k, v, bias, training=True)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training=True)


def test_key_that_is_the_value() -> None:
    q, k, _ = tensors(training=True)
    captured = capture(lambda q, k: torch.softmax(q @ k.mT, -1) @ k, q, k, training=True)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training=True)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_repeated_heads_are_folded_away(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_kv(k, H // KV), repeat_kv(v, H // KV)
        return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.3, -1), v)

    captured = capture(grouped, *tensors(dtype, training, heads=KV), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    (node,) = captured.operators()
    assert [argument.op for argument in node.args[:3]] == ["placeholder"] * 3  # type: ignore[union-attr]
    assert_same_results(captured, training)


def test_heads_repeated_in_blocks_are_not_folded() -> None:
    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat(1, H // KV, 1, 1), v.repeat(1, H // KV, 1, 1)
        return torch.softmax(q @ k.mT, -1) @ v

    captured = capture(blocks, *tensors(heads=KV))
    assert captured.operators()[0].args[1].meta["example_value"].shape[1] == H  # type: ignore[union-attr]
    assert_same_results(captured)


def test_half_precision_is_refused_under_exact_numerics_only() -> None:
    exact = Settings(numerics="exact")
    assert capture(float32_softmax, *tensors(), settings=exact).counts == {"attention": 1}
    captured = capture(float32_softmax, *tensors(torch.bfloat16), settings=exact)
    assert captured.counts == {}
    assert "rounded to torch.bfloat16" in captured.refusals[0]


def test_rounding_of_the_scores_is_refused_under_exact_numerics_only() -> None:
    def rounds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).bfloat16(), -1).float() @ v

    captured = capture(rounds, *tensors())
    assert captured.counts == {"attention": 1}
    captured = capture(rounds, *tensors(), settings=Settings(numerics="exact"))
    assert "rounded to torch.bfloat16" in captured.refusals[0]


@pytest.mark.parametrize(("q_dtype", "mask"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_mask_of_a_narrower_dtype_is_widened(q_dtype: torch.dtype, mask: torch.dtype) -> None:
    bias = torch.randn(S, T).to(mask)
    q, k, v = tensors(q_dtype)
    captured = capture(lambda q, k, v, b: torch.softmax((q @ k.mT).float() + b, -1).to(v.dtype) @ v, q, k, v, bias)
    assert captured.counts == {"attention": 1}
    assert captured.operators()[0].args[3].meta["example_value"].dtype == torch.float32  # type: ignore[union-attr]
    assert_same_results(captured)


def test_float64_mask_beside_narrower_scores_is_refused() -> None:
    bias = torch.randn(S, T, dtype=torch.float64)
    captured = capture(lambda q, k, v, b: torch.softmax(q @ k.mT + b, -1).float() @ v, *tensors(), bias)
    assert captured.counts == {}
    assert "mask is float64" in captured.refusals[0]
