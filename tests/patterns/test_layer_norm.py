"""LayerNorm: the spellings that are recognised, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, parameters

D = 16
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def called(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w, b)


def called_in_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.layer_norm(x, [D], weight=w, bias=b, eps=1e-6)


def called_with_a_number(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-6)


def called_with_the_node_of_a_size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + 1, x.size()[2:], w, b, 1e-6)


def called_with_weight_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w, None, 1e-5)


def called_with_bias_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), bias=b)


def called_without_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def called_then_scaled_and_shifted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,)) * w + b


def called_then_shifted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return b + F.layer_norm(x, (D,), eps=1e-6)


def called_in_float32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (D,), w.float(), b.float()).type_as(x)


def olmo(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.to(dtype=torch.float32), (D,), None, None, eps=1e-5).to(x.dtype)


def nemotron(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w + 1, b, 1e-5)


CALLS = (
    called,
    called_in_torch,
    called_with_a_number,
    called_with_the_node_of_a_size,
    called_with_weight_alone,
    called_with_bias_alone,
    called_without_affine,
    called_then_scaled_and_shifted,
    called_then_shifted,
    called_in_float32,
    olmo,
    nemotron,
)


def mean_and_rsqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.mean(-1, keepdim=True)
    return (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b).to(x.dtype)


def bert_in_tensorflow_style(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    u = h.mean(-1, keepdim=True)
    s = (h - u).pow(2).mean(-1, keepdim=True)
    h = (h - u) / torch.sqrt(s + 1e-12)
    return w * h.to(x.dtype) + b


def biased_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean, var = h.mean(dim=-1, keepdim=True), h.var(dim=-1, keepdim=True, unbiased=False)
    return ((h - mean) / (var + 1e-5).sqrt() * w + b).to(x.dtype)


def variance_with_correction(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    var = torch.var(h, -1, correction=0, keepdim=True)
    return ((h - torch.mean(h, -1, keepdim=True)) * (var + 1e-5) ** -0.5).to(x.dtype) * w + b


def variance_by_position(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    r = 1.0 / torch.sqrt(torch.var(h, -1, False, True) + 1e-5)
    return (h.sub(h.mean(-1, True)) * r).type_as(x) * w + b


def joint_mean_and_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    var, mean = torch.var_mean(h, dim=-1, correction=0, keepdim=True)
    return torch.addcmul(b.float(), (h - mean) * torch.rsqrt(var + 1e-5), w.float()).to(x.dtype)


def weight_multiplied_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean, var = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
    return (w * (h - mean) / torch.sqrt(var + 1e-6) + b).to(x.dtype)


def unit_offset(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.mean(-1, keepdim=True)
    return (d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5) * (1 + w.float()) + b.float()).to(x.dtype)


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    h = w.to(torch.float32) * h
    return h.to(x.dtype)


def mean_by_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.sum(-1, keepdim=True) / x.shape[-1]
    var = torch.square(d).sum(-1, keepdim=True) / x.size(-1)
    return (d * torch.rsqrt(var + 1e-5)).to(x.dtype) * w + b


def narrow_x_beside_wide_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.float().mean(-1, keepdim=True)
    var = x.float().var(-1, keepdim=True, correction=0)
    return w * ((x - mean) * torch.rsqrt(var + 1e-5)).to(x.dtype) + b


def reduced_dimension(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    d = h - h.mean(-1)[..., None]
    return (d * torch.rsqrt(h.var(-1, unbiased=False) + 1e-5).unsqueeze(-1)).to(x.dtype) * w + b


def biased_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return ((h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True, unbiased=False)).to(x.dtype) * w + b


def one_pass_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    var = (h * h).mean(-1, keepdim=True) - mean**2
    return ((h - mean) * torch.rsqrt(var + 1e-5)).to(x.dtype) * w + b


BY_HAND = (
    mean_and_rsqrt,
    bert_in_tensorflow_style,
    biased_variance,
    variance_with_correction,
    variance_by_position,
    joint_mean_and_variance,
    weight_multiplied_first,
    unit_offset,
    cohere,
    mean_by_sum,
    narrow_x_beside_wide_statistics,
    reduced_dimension,
    biased_deviation,
    one_pass_variance,
)
SPELLINGS = CALLS + BY_HAND


def tensors(
    dtype: torch.dtype = torch.float32, training: bool = False, affine: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 3, D], w [D] and b [D]"""
    x, w, b = torch.randn(2, 3, D) + 0.5, torch.randn(D) * 0.3 + 1, torch.randn(D)
    wide = affine or dtype
    return tuple(t.requires_grad_(training) for t in (x.to(dtype), w.to(wide), b.to(wide)))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", SPELLINGS)
def test_spelling_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"layer_norm": 1}
    assert captured.refusals == []
    assert not captured.targets() & {"rsqrt", "sqrt", "mean", "pow", "var", "var_mean", "layer_norm"}
    assert_same_results(captured, training)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("flags", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_module_becomes_one_operator(flags: dict[str, bool], dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = parameters(nn.LayerNorm(D, eps=1e-3, **flags), dtype).requires_grad_(training)
    captured = capture(module, tensors(dtype, training)[0], training=training, dynamic=dynamic)
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured, training)


# torch's own layer_norm takes float32 vectors beside a half, or vectors of x's dtype.
@pytest.mark.parametrize("function", SPELLINGS)
def test_float32_weight_with_bfloat16_activations_keeps_dtype_and_rounding(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16, affine=torch.float32))
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("function", SPELLINGS)
def test_other_dtypes(function: Function, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and function not in (called, called_then_scaled_and_shifted, nemotron):
        return  # the others narrow it
    captured = capture(function, *tensors(dtype))
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


def test_float64_that_is_narrowed_keeps_its_casts() -> None:
    captured = capture(called_in_float32, *tensors(torch.float64))
    assert captured.counts == {"layer_norm": 1}
    assert captured.operators()[0].meta["example_value"].dtype == torch.float32
    assert_same_results(captured)


def arguments(function: Function, *args: Tensor) -> tuple[object, ...]:
    """(weight is given, bias is given, weight_offset, cast_before_weight) of the operator."""
    (node,) = capture(function, *args).operators()
    return node.args[1] is not None, node.args[2] is not None, *node.args[4:]


def test_affine_part_is_read_in_its_order() -> None:
    bf16, fp32 = tensors(torch.bfloat16), tensors()
    assert arguments(called, *bf16) == (True, True, 0.0, False)
    assert arguments(called_with_bias_alone, *bf16) == (False, True, 0.0, False)
    assert arguments(called_then_scaled_and_shifted, *bf16) == (True, True, 0.0, True)
    assert arguments(called_then_scaled_and_shifted, *fp32) == (True, True, 0.0, False)
    assert arguments(called_then_shifted, *bf16) == (False, True, 0.0, True)
    assert arguments(olmo, *bf16) == (False, False, 0.0, False)


def test_offset_becomes_an_argument_only_if_it_is_added_in_the_statistics_dtype() -> None:
    assert arguments(nemotron, *tensors()) == (True, True, 1.0, False)
    assert arguments(nemotron, *tensors(torch.bfloat16)) == (True, True, 0.0, False)


def test_casts_of_weight_and_bias_are_read_through() -> None:
    (node,) = capture(called_in_float32, *tensors(torch.bfloat16)).operators()
    assert all(argument.op == "placeholder" for argument in node.args[:3])  # type: ignore[union-attr]


def test_bias_before_the_weight_stays_outside() -> None:
    def shifted_then_scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (F.layer_norm(x, (D,)) + b) * w

    captured = capture(shifted_then_scaled, *tensors())
    assert captured.counts == {"layer_norm": 1}
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured)


def test_second_scale_stays_outside() -> None:
    def scaled_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), w) * b + b + b

    captured = capture(scaled_twice, *tensors())
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


def test_modulation_of_every_token_stays_outside() -> None:
    def adaptive(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), eps=1e-6) * (1 + x.mean(1, keepdim=True)) + x

    captured = capture(adaptive, *tensors(torch.bfloat16))
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


def test_value_that_is_read_before_the_weight_ends_the_site_there() -> None:
    def read_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        n = F.layer_norm(x, (D,))
        return n * w + n * b

    captured = capture(read_twice, *tensors())
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


def test_symbolic_eps_is_passed_on() -> None:
    module = nn.LayerNorm(D, eps=1e-3)
    captured = capture(module, tensors()[0], dynamic=True)
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("function", CALLS)
def test_calls_are_exact(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"layer_norm": 1}
    assert torch.equal(captured.original(*captured.inputs)[0], captured.rewritten(*captured.inputs)[0])


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
