"""What looks like attention around a softmax and is none, or none that the operator computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.capture import assert_same_results, capture
from tests.patterns.test_attention_call import B, H, S, T, tensors

Function = Callable[..., Tensor]
INF = float("-inf")


def returned_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v + (weights @ v.abs())


def used_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ q.mT, -1)
    return weights @ weights


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, -1)
    return (weights @ v) * weights.sum()


def head_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT, -1) * v[:1, :, :1, :1]) @ v


def mask_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax(q @ k.mT, -1).masked_fill(~allowed, 0.0) @ v


def another_mask_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    weights = torch.softmax((q @ k.mT).masked_fill(~allowed, INF), -1)
    return weights.masked_fill(allowed, 0.0) @ v


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return torch.softmax(scores * 0.5, -1) @ v, scores


def masked_scores_reused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + 1.0 * v.new_ones(S, T)
    return torch.softmax(scores, -1) @ v + scores.sum()


def scale_for_each_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * v[0, 0, :, 0], -1) @ v


def small_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT).masked_fill(~allowed, -100.0), -1) @ v


def fill_made_small_by_a_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT).masked_fill(~allowed, -2e4) * 0.1, -1) @ v


def fill_turned_by_a_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT).masked_fill(~allowed, -1e9) * -1.0, -1) @ v


def fill_of_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT).masked_fill(~allowed, float("inf")), -1) @ v


def fill_inside_a_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax(torch.tanh((q @ k.mT).masked_fill(~allowed, -1e9) / 5.0) * 5.0, -1) @ v


def mask_inside_a_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh((q @ k.mT + v.new_ones(S, T)) / 5.0) * 5.0, -1) @ v


def capped_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(torch.tanh(q @ k.mT)), -1) @ v


def selected_from_two_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax(torch.where(allowed, q @ k.mT, v.new_ones(S, T)), -1) @ v


def extra_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1)
    return torch.softmax(scores, -1) @ torch.cat([v, v[:, :, :1]], 2)


def column_of_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def wrong_column_cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = q[0, :, 0, :1].reshape(1, H, 1, 1).expand(B, H, S, 1)
    return torch.softmax(torch.cat([q @ k.mT, sinks], -1), -1)[..., 1:] @ v


def columns_cut_off_without_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1)[..., :-1] @ v[:, :, :-1]


def queries_cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1)[:, :, 1:] @ v


def wrong_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -2) @ v


def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, 1) @ v


def mask_enlarges_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q[:1] @ k[:1].mT + torch.ones(B, 1, S, T), -1) @ v


def scores_added_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).cumsum(-1), -1) @ v


def weights_mixed_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, -1)
    return torch.einsum("bhst,hg->bgst", weights, v[0, :, :H, 0]) @ v


def subtracts_another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.softmax(scores - scores.amax(-2, keepdim=True), -1) @ v


def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Longformer: scores copied by bands, probabilities shifted so that a column is another key in each row."""
    scores = (q @ k.mT).new_zeros(B, H, S, S)
    scores[..., 1:] = (q @ k.mT)[..., :-1]
    weights = F.pad(torch.softmax(scores, -1), (0, S + 1))
    shifted = weights.flatten(-2)[..., : S * 2 * S].view(B, H, S, 2 * S)[..., :S]
    return shifted @ v


def products_by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * 0.3
    return (scores.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (products_by_sums, "a sum"),
        (banded, "overlapping chunks"),
        (returned_too, "read elsewhere"),
        (read_twice, "read elsewhere"),
        (used_on_both_sides, "not over the dimension"),
        (renormalised, "read elsewhere"),
        (head_mask, "read elsewhere"),
        (mask_after_the_softmax, "read elsewhere"),
        (another_mask_after_the_softmax, "read elsewhere"),
        (scores_returned, "scores are read elsewhere"),
        (masked_scores_reused, "scores are read elsewhere"),
        (scale_for_each_key, "mul"),
        (small_fill, "no mask"),
        (fill_made_small_by_a_scale, "no mask"),
        (fill_turned_by_a_scale, "no mask"),
        (fill_of_infinity, "no mask"),
        (fill_inside_a_softcap, "no mask"),
        (mask_inside_a_softcap, "add"),
        (capped_twice, "tanh"),
        (selected_from_two_scores, "no mask"),
        (extra_columns, "not over the dimension"),
        (column_of_each_query, "one number for each head"),
        (wrong_column_cut_off, "read elsewhere"),
        (columns_cut_off_without_a_sink, "read elsewhere"),
        (queries_cut_off, "read elsewhere"),
        (wrong_dimension, "dimension"),
        (softmax_over_heads, "dimension 1"),
        (mask_enlarges_the_batch, "add"),
        (scores_added_up, "cumsum"),
        (subtracts_another_maximum, "read elsewhere"),
    ],
)
def test_near_miss_is_refused_with_a_reason(function: Function, word: str) -> None:
    captured = capture(function, *tensors(keys=S if function in (used_on_both_sides, banded) else T))
    assert captured.counts == {}
    assert [word in reason for reason in captured.refusals] == [True], captured.refusals
    assert captured.records[0].remedy


def test_probabilities_mixed_over_heads_are_not_values() -> None:
    captured = capture(weights_mixed_over_heads, *tensors())
    assert captured.counts == {}


@pytest.mark.parametrize("convert", [lambda t: t.long(), lambda t: t.bool(), lambda t: t.to(torch.int32)])
def test_conversions_to_integers_are_no_casts(convert: Callable[[Tensor], Tensor]) -> None:
    for function in (
        lambda q, k, v: torch.softmax(convert(q @ k.mT).float(), -1) @ v,
        lambda q, k, v: convert(torch.softmax(q @ k.mT, -1)).float() @ v,
        lambda q, k, v: torch.softmax((q @ k.mT + convert(q[..., :1]).float()), -1) @ convert(v).float(),
    ):
        captured = capture(function, *tensors(keys=S))
        assert_same_results(captured)
    assert captured.counts == {"attention": 1}  # the converted tensors are arguments here


def router(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(F.linear(x, w), -1).topk(2).values


def router_with_experts(x: Tensor, w: Tensor) -> Tensor:
    # The probabilities mix experts: a product with a matrix, but no product of q and k before.
    return torch.softmax(F.linear(x, w), -1) @ w


def router_by_matmul(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x @ w.reshape(8, 6), -1) @ w


def vocabulary(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x @ w.mT, -1).log()


def pooling(x: Tensor, w: Tensor) -> Tensor:
    return (torch.softmax(x.mean(-1), -1)[..., None] * x).sum(1)


def weighted_mean(x: Tensor, w: Tensor) -> Tensor:
    """Pooling by learned scores: a sum of products before the softmax and after it, but over one tensor's positions."""
    return ((x * w[0]).sum(-1).softmax(-1)[..., None] * x).sum(1)


def padded(x: Tensor, w: Tensor) -> Tensor:
    """A convolution over probabilities: cut, multiplied, but of no product."""
    return F.pad(torch.softmax(x, -1), (1, 1)).unfold(-1, 8, 2) @ w.mT


def projected(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(torch.softmax(x @ w.mT, -1), w.mT)


@pytest.mark.parametrize(
    "function", [router, router_with_experts, router_by_matmul, vocabulary, pooling, weighted_mean, padded, projected]
)
def test_other_softmaxes_are_no_sites(function: Function) -> None:
    captured = capture(function, torch.randn(2, 5, 8), torch.randn(6, 8))
    assert captured.records == []


def test_scale_is_the_product_of_all_scales() -> None:
    captured = capture(lambda q, k, v: torch.softmax((q * 0.5) @ (k * 0.25).mT / 2.0 * 3.0, -1) @ v, *tensors())
    assert captured.operators()[0].args[4] == pytest.approx(0.1875)
    assert_same_results(captured)
