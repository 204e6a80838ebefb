"""What looks like LayerNorm and is none, or none that can be proven."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.settings import Settings
from tests.patterns.capture import assert_same_results, capture
from tests.patterns.layer_norm_spellings import (
    D,
    Function,
    called,
    cohere,
    mean_and_rsqrt,
    one_pass_variance,
    tensors,
    weight_multiplied_first,
)


def two_normalised_dimensions(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (3, D))


@pytest.mark.parametrize("dynamic", [False, True])
def test_symbolic_shape_of_two_dimensions_is_refused(dynamic: bool) -> None:
    def over_two(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x, x.shape[-2:]), F.rms_norm(x, x.size()[1:], eps=1e-6)

    captured = capture(over_two, *tensors(), dynamic=dynamic)
    assert captured.counts == {}
    assert ["2 dimensions" in reason for reason in captured.refusals] == [True, True]


def unbiased_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * w + b


def annotated_transformer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return w * (x - mean) / (std + 1e-6) + b


def eps_outside_the_root(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / (d.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5) * w + b


def unbiased_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / std * w + b


def eps_is_a_tensor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + b[0].abs()) * w


def eps_bounds_the_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True).clamp(min=1e-5)) * w


def channels_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(1, keepdim=True)
    return d / torch.sqrt(d.pow(2).mean(1, keepdim=True) + 1e-6)


def whole_sample(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean((1, 2), True)) * torch.rsqrt(x.var((1, 2), False, True) + 1e-6)


def statistics_in_half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x.bfloat16() - x.bfloat16().mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)


def mean_in_half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.bfloat16()
    d = h.float() - h.mean(-1, keepdim=True).float()
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)


def in_place_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x * 1.0
    y = F.layer_norm(h, (D,))
    h.zero_()
    return y * w


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (two_normalised_dimensions, "2 dimensions"),
        (in_place_statistics, "in place"),
        (unbiased_variance, "n - 1"),
        (annotated_transformer, "outside the root"),
        (eps_outside_the_root, "outside the root"),
        (unbiased_deviation, "n - 1"),
        (eps_is_a_tensor, "eps is a tensor"),
        (eps_bounds_the_variance, "bounds the variance"),
        (channels_first, "dimension 1 of 3"),
        (whole_sample, "dimension 1 and 2 of 3"),
        (statistics_in_half, "bfloat16"),
        (mean_in_half, "bfloat16"),
    ],
)
def test_near_miss_is_refused_with_a_reason(function: Function, word: str) -> None:
    captured = capture(function, *tensors())
    assert captured.counts == {}
    assert [word in reason for reason in captured.refusals] == [True]
    assert captured.records[0].remedy


def group_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x, 3)


def batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def instance_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.instance_norm(x)


def local_response_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.local_response_norm(x, 2)


def batch_norm_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)


def instance_norm_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x[None]
    d = h - h.mean((2, 3), keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean((2, 3), keepdim=True) + 1e-5)


def batch_norm_of_running_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - b) * torch.rsqrt(w * w + 1e-5)


def variance_of_another_tensor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt((2 * x).var(-1, unbiased=False, keepdim=True) + 1e-5)


def mean_of_another_tensor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - (2 * x).mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def mean_over_another_dimension(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def added_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x + x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def mean_without_x(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True) - x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def variance_kept_as_a_loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.relu(1 - torch.sqrt(x.var(-1) + 1e-4)).mean()


def sum_over_another_size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.sum(-1, keepdim=True) / 3
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)


def root_multiplied(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def root_divided_by_x(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) / (x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    "function",
    [
        batch_norm_by_hand,
        instance_norm_by_hand,
        batch_norm_of_running_statistics,
        variance_of_another_tensor,
        mean_of_another_tensor,
        mean_over_another_dimension,
        added_mean,
        mean_without_x,
        variance_kept_as_a_loss,
        root_multiplied,
        root_divided_by_x,
    ],
)
def test_what_is_put_together_otherwise_is_no_site(function: Function) -> None:
    captured = capture(function, *tensors())
    assert captured.records == []


def test_detached_statistics_are_no_site_in_training() -> None:
    def detached(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var.detach() + 1e-5)

    assert capture(detached, *tensors(training=True), training=True).counts == {}
    assert capture(detached, *tensors()).counts == {"layer_norm": 1}


def test_sum_over_another_size_is_the_rms_norm_of_a_difference() -> None:
    captured = capture(sum_over_another_size, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_one_pass_variance_is_refused_under_exact_numerics_only() -> None:
    captured = capture(one_pass_variance, *tensors(), settings=Settings(numerics="exact"))
    assert captured.counts == {}
    assert "cancels" in captured.refusals[0]


def test_several_sites_in_a_row() -> None:
    def stacked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        for spelling in (mean_and_rsqrt, called, weight_multiplied_first, cohere):
            x = torch.tanh(spelling(x, w, b))
        return x

    captured = capture(stacked, *tensors(torch.bfloat16, training=True), training=True)
    assert captured.counts == {"layer_norm": 4}
    assert_same_results(captured, training=True)


@pytest.mark.parametrize("function", [group_norm, batch_norm, instance_norm, local_response_norm])
def test_other_norms_are_no_sites(function: Function) -> None:
    assert capture(function, *tensors()).records == []
