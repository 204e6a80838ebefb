"""Scores overwritten by a mask, and several masks at once: values, gradients, and rows that are masked whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.patterns.capture import MODES, Captured, assert_same_results, capture, inline_overload
from tests.patterns.test_attention_call import B, H, S, T, tensors

Function = Callable[..., Tensor]
INF = float("-inf")


def causal(q: Tensor) -> Tensor:
    """[S, T]; no row is masked whole, but that is not what these tests rely on."""
    return torch.ones(S, T, dtype=torch.bool, device=q.device).tril(1)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores_of(q, k).masked_fill(~causal(q), INF), -1) @ v


def masked_fill_where_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal(q).view(1, 1, S, T)
    return torch.softmax(scores_of(q, k).masked_fill(mask == 0, INF), -1) @ v


def masked_fill_of_an_int_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal(q).to(torch.int64)
    return torch.softmax(torch.masked_fill(scores_of(q, k), mask == 0, -1e9), -1) @ v


def masked_fill_of_the_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.softmax(scores.masked_fill(causal(q).logical_not(), torch.finfo(scores.dtype).min), -1) @ v


def masked_fill_before_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(~causal(q), INF) / 2.5, -1) @ v


def where_attends(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.where(causal(q), scores_of(q, k), INF), -1) @ v


def where_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.where(~causal(q), -1e9, scores_of(q, k)), -1) @ v


def where_with_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=q.device)
    return torch.softmax(torch.where(causal(q), scores, lowest), -1) @ v


def where_with_a_full_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).float()
    return torch.softmax(torch.where(causal(q), scores, torch.full_like(scores, -1e4)), -1).to(v.dtype) @ v


def two_fills(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padding = torch.arange(T, device=q.device) < T - 1
    scores = scores_of(q, k).masked_fill(~causal(q), INF).masked_fill(~padding, INF)
    return torch.softmax(scores, -1) @ v


def bias_and_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, H * T, device=q.device).view(H, 1, T).to(q.dtype)
    return torch.softmax((scores_of(q, k) + bias).masked_fill(~causal(q), INF), -1) @ v


def bias_and_finite_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, H * T, device=q.device).view(H, 1, T).to(q.dtype)
    scores = scores_of(q, k) + bias
    return torch.softmax(scores.masked_fill(~causal(q), torch.finfo(scores.dtype).min), -1) @ v


def fill_then_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, H * T, device=q.device).view(H, 1, T).to(q.dtype)
    return torch.softmax(scores_of(q, k).masked_fill(~causal(q), INF) + bias, -1) @ v


def gpt_neo(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2))
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(causal(q), scores, torch.tensor(lowest, dtype=scores.dtype))
    padding = torch.where(torch.arange(T, device=q.device) < T - 1, 0.0, torch.finfo(q.dtype).min)
    weights = torch.softmax(scores + padding[None, None, None].to(q.dtype), -1)
    return torch.matmul(weights.to(v.dtype), v)


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal(q).to(q.dtype)
    return torch.softmax(scores_of(q, k) - 1e4 * (1.0 - mask), -1) @ v


def inverted_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (1.0 - causal(q)[None, None].to(q.dtype)) * torch.finfo(q.dtype).min
    return torch.softmax(scores_of(q, k) + mask, -1) @ v


def logarithm_of_a_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.log(torch.tril(torch.ones(S, T, device=q.device), 1)).to(q.dtype)
    return torch.softmax(scores_of(q, k) + mask, -1) @ v


def less_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~causal(q), INF)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, -1) @ v


def less_the_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.softmax(scores - scores.amax(-1, keepdim=True).detach(), -1) @ v


def raised_to_the_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # XGLM and older OPT: torch.max against the sum of two lowest numbers.
    scores = scores_of(q, k)
    mask = torch.zeros(S, T, device=q.device).masked_fill(~causal(q), INF).to(q.dtype)
    scores = torch.max(scores + mask, torch.full((), torch.finfo(scores.dtype).min, device=q.device))
    return torch.softmax(scores, -1) @ v


def clamped_to_the_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~causal(q), INF)
    return torch.softmax(scores.clamp(min=torch.finfo(scores.dtype).min), -1) @ v


def zeroed_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = ~causal(q)
    return torch.softmax(scores_of(q, k).masked_fill(mask, INF), -1).masked_fill(mask, 0.0) @ v


SPELLINGS = (
    masked_fill,
    masked_fill_where_zero,
    masked_fill_of_an_int_mask,
    masked_fill_of_the_lowest,
    masked_fill_before_the_scale,
    where_attends,
    where_masked,
    where_with_a_tensor,
    two_fills,
    bias_and_fill,
    bias_and_finite_fill,
    fill_then_bias,
    gpt_neo,
    subtracted,
    inverted_float_mask,
    logarithm_of_a_triangle,
    less_the_maximum,
    less_the_detached_maximum,
    raised_to_the_lowest,
    clamped_to_the_lowest,
    zeroed_after_the_softmax,
)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", SPELLINGS)
def test_spelling_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    for place in (None, inline_overload):
        options = {} if place is None else {"place": place}
        captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic, **options)
        assert captured.refusals == []
        assert captured.counts == {"attention": 1}
        assert not captured.targets() & {"softmax", "matmul"}
        assert_same_results(captured, training)


def test_constant_of_the_scores_shape_does_not_read_them() -> None:
    captured = capture(where_with_a_full_tensor, *tensors(torch.bfloat16))
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def flags(captured: Captured) -> object:
    return captured.operators()[0].args[8]


@pytest.mark.parametrize(
    ("function", "masked_rows"),
    [
        (masked_fill, "none"),
        (masked_fill_of_an_int_mask, "none"),
        (where_attends, "none"),
        (where_masked, "none"),
        (fill_then_bias, "nan"),
        (raised_to_the_lowest, "none"),
        (clamped_to_the_lowest, "none"),
        (logarithm_of_a_triangle, "none"),
        (zeroed_after_the_softmax, "zeros"),
        (less_the_detached_maximum, "none"),
    ],
)
def test_rows_masked_whole_are_the_sources_unless_there_are_none(function: Function, masked_rows: str) -> None:
    assert flags(capture(function, *tensors())) == masked_rows


def with_mask(fill: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(fill(scores_of(q, k), mask), -1) @ v

    return attention


def fill_infinity(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, INF)


def fill_lowest(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scores, torch.finfo(scores.dtype).min)


def add_infinity(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, INF)


def add_infinity_and_raise(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.maximum(add_infinity(scores, mask), torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype))


def add_lowest(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)


def fill_lowest_and_add(scores: Tensor, mask: Tensor) -> Tensor:
    padding = torch.where(mask[..., -1:, :], 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
    return torch.where(mask, scores, torch.finfo(scores.dtype).min) + padding


def fill_infinity_beside_lowest(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -1e9).masked_fill(~mask[..., :1, :], INF)


@pytest.mark.parametrize(
    ("fill", "masked_rows"),
    [(fill_infinity, "nan"), (fill_lowest, "mean"), (add_infinity, "nan"), (add_lowest, "none")],
)
def test_rows_masked_whole_by_a_mask_that_is_not_known(
    fill: Callable[[Tensor, Tensor], Tensor], masked_rows: str
) -> None:
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    assert flags(capture(with_mask(fill), *tensors(), mask)) == masked_rows


@pytest.mark.parametrize("overload", ["default", "inline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fill",
    [
        fill_infinity,
        fill_lowest,
        add_infinity,
        add_infinity_and_raise,
        add_lowest,
        fill_lowest_and_add,
        fill_infinity_beside_lowest,
    ],
)
def test_row_that_is_masked_whole(fill: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, overload: str) -> None:
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    mask[0, :, 2], mask[..., 3] = False, False
    options = {"place": inline_overload} if overload == "inline" else {}
    captured = capture(with_mask(fill), *tensors(dtype), mask, **options)  # type: ignore[arg-type]
    assert captured.counts == {"attention": 1}
    (expected,), (got,) = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("overload", ["default", "inline"])
def test_gradients_of_a_row_that_is_overwritten_whole_by_a_number(overload: str) -> None:
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    mask[0, :, 2], mask[..., 3] = False, False
    options = {"place": inline_overload} if overload == "inline" else {}
    captured = capture(with_mask(fill_lowest), *tensors(training=True), mask, training=True, **options)  # type: ignore[arg-type]
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training=True)


def test_learned_bias_beside_a_finite_fill_keeps_its_gradient() -> None:
    bias = torch.randn(1, H, S, T, requires_grad=True)
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    mask[0, :, 2], mask[..., 3] = False, False

    def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax((scores_of(q, k) + bias).masked_fill(~mask, -1e9), -1) @ v

    captured = capture(biased, *tensors(training=True), mask, bias, training=True)
    assert flags(captured) == "mean"
    assert_same_results(captured, training=True)


def test_finite_fill_with_something_added_later_is_refused_if_scores_remain() -> None:
    def added_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(scores_of(q, k).masked_fill(~causal(q), -1e9) + q.new_ones(S, T), -1) @ v

    captured = capture(added_later, *tensors())
    assert captured.counts == {}
    assert "masked in another way" in captured.refusals[0]


def test_mask_that_is_written_to_behind_its_negation() -> None:
    def overwritten(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        masked = ~mask
        mask.fill_(True)
        return torch.softmax(scores_of(q, k).masked_fill(masked, INF), -1) @ v

    captured = capture(overwritten, *tensors(), torch.ones(S, T, dtype=torch.bool).tril(1))
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)
