"""What only looks like an RMSNorm, or is one that is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.capture import assert_same_results, capture
from tests.patterns.rms_norm_spellings import D, Function, tensors


def l2_norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w


def normalize(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * w


def normalize_times_another_number(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * 4.1 * w


def normalize_over_another_dimension(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * math.sqrt(3) * w


def normalize_with_another_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, p=1.0, dim=-1) * 4.0


def l1_norm(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.norm(1, dim=-1, keepdim=True) / 4.0)


def clamped_from_above(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(max=2.0))


def clamped_on_both_sides(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(1e-6, 1.0))


def sum_over_another_size(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 15 + 1e-6)


def product_with_the_root(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def root_over_x(x: Tensor, w: Tensor) -> Tensor:
    return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) / x


def number_over_the_root(x: Tensor, w: Tensor) -> Tensor:
    return x * (2.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def power_of_minus_one(x: Tensor, w: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-1.0)


def quotient_by_the_inverse(x: Tensor, w: Tensor) -> Tensor:
    return x / torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def clamped_inverse(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).clamp(min=0.9)


def largest_of_squares(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).max(-1, True)[0] + 1e-6)


def loss_with_a_root(x: Tensor, w: Tensor) -> Tensor:
    return torch.sqrt((x - w).pow(2).mean(-1) + 1e-6) + 1e-3


def another_tensor_is_normalised(x: Tensor, w: Tensor) -> Tensor:
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def cube(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6) * w


def product_of_two_tensors(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt((x * w).mean(-1, keepdim=True) + 1e-6)


def rsqrt_of_something_else(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(w * w + 1.0)


@pytest.mark.parametrize(
    "function",
    [
        l2_norm,
        normalize,
        normalize_times_another_number,
        normalize_over_another_dimension,
        normalize_with_another_norm,
        l1_norm,
        clamped_from_above,
        clamped_on_both_sides,
        sum_over_another_size,
        product_with_the_root,
        root_over_x,
        number_over_the_root,
        power_of_minus_one,
        quotient_by_the_inverse,
        clamped_inverse,
        largest_of_squares,
        loss_with_a_root,
        another_tensor_is_normalised,
        cube,
        product_of_two_tensors,
        rsqrt_of_something_else,
    ],
)
def test_other_norms_are_no_sites(function: Function) -> None:
    captured = capture(function, *tensors())
    assert captured.records == []


def test_rounded_x_in_the_square_only_is_no_site() -> None:
    def rounds_the_square(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.bfloat16().float().pow(2).mean(-1, keepdim=True) + 1e-6) * w

    assert capture(rounds_the_square, *tensors()).records == []


def statistics_in_bfloat16(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def squares_in_bfloat16(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.pow(2).float().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def mean_in_float32_of_bfloat16_squares(x: Tensor, w: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1e-6)).to(x.dtype) * w


@pytest.mark.parametrize("function", [statistics_in_bfloat16, squares_in_bfloat16, mean_in_float32_of_bfloat16_squares])
def test_statistics_that_are_not_in_float32_are_refused(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16))
    assert captured.counts == {}
    assert ["bfloat16" in reason for reason in captured.refusals] == [True]
    assert "x.float()" in captured.records[0].remedy


def wrong_axis(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w


def mean_over_two_dimensions(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6) * w


def mean_over_everything(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean() + 1e-6) * w


def eps_inside_the_mean(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt((x.pow(2) + 1e-6).mean(-1, keepdim=True)) * w


def eps_outside_the_root(x: Tensor, w: Tensor) -> Tensor:
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6) * w


def zhang(x: Tensor, w: Tensor) -> Tensor:
    rms = x.norm(2, dim=-1, keepdim=True) * D ** (-1.0 / 2)
    return w * (x / (rms + 1e-8))


def eps_outside_the_square_root(x: Tensor, w: Tensor) -> Tensor:
    return w * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8)


def two_bounds(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt().clamp(min=0.1)


def eps_is_a_tensor(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0])


def statistic_without_keepdim(x: Tensor, w: Tensor) -> Tensor:
    return x[0, :, :3] * torch.rsqrt(x[0, :, :3].pow(2).mean(-1) + 1e-6)


def two_normalised_dimensions(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (3, D), eps=1e-6)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (wrong_axis, "dimension 1 of 3"),
        (mean_over_two_dimensions, "dimension 1 and 2"),
        (mean_over_everything, "dimension 0 and 1 and 2"),
        (eps_inside_the_mean, "inside the mean"),
        (eps_outside_the_root, "outside the root"),
        (zhang, "outside the root"),
        (eps_outside_the_square_root, "outside the root"),
        (two_bounds, "twice"),
        (eps_is_a_tensor, "eps is a tensor"),
        (two_normalised_dimensions, "2 dimensions"),
    ],
)
def test_near_miss_is_refused_with_a_reason(function: Function, word: str) -> None:
    captured = capture(function, *tensors())
    assert captured.counts == {}
    assert [word in reason for reason in captured.refusals] == [True]
    assert captured.records[0].remedy


def test_statistic_of_the_wrong_shape_is_not_rewritten() -> None:
    # Two slices are two values to the matcher.
    assert capture(statistic_without_keepdim, *tensors()).counts == {}

    def square_x(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)

    captured = capture(square_x, torch.randn(4, 4))
    assert captured.counts == {}
    assert "keep the reduced dimension" in captured.records[0].remedy


class ScaledUnit(nn.Module):
    """A unit length times a scale that is an attribute, symbolic with dynamic shapes."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.proj, self.g, self.scale = nn.Linear(D, D), nn.Parameter(torch.randn(D)), scale

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.proj(x), dim=-1) * self.scale * self.g


def test_a_symbolic_scale_is_fixed_where_it_is_the_root_of_the_size() -> None:
    captured = capture(ScaledUnit(D**0.5), torch.randn(3, 5, D), dynamic=True)
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_another_symbolic_scale_is_left_alone() -> None:
    assert capture(ScaledUnit(D**0.5 + 0.5), torch.randn(3, 5, D), dynamic=True).counts == {}
