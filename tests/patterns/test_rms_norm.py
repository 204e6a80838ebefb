"""RMSNorm: the spellings that are recognised, and what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

D = 16
Function = Callable[[Tensor, Tensor], Tensor]


def hugging_face(x: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-6)
    return w * h.to(x.dtype)


def hugging_face_weight_on_the_right(x: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h.to(x.dtype) * w


def cast_last(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (w * h).to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).type_as(x)


def torchtune(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (D,), weight=w, eps=1e-6).to(x.dtype)


def called_by_name(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, [D], w, 1e-6)


def called_by_name_in_torch(x: Tensor, w: Tensor) -> Tensor:
    return torch.rms_norm(x, (D,), weight=w, eps=1e-6)


def called_without_eps(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x * 1e-3, (D,), w)


def called_without_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), eps=1e-6)


def called_then_weighted(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), eps=1e-6) * w


def two_separate_casts(x: Tensor, w: Tensor) -> Tensor:
    r = torch.rsqrt((x.float() ** 2).mean(-1, keepdim=True) + 1e-6)
    return w * (x.float() * r).type_as(x)


def x_times_x(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * (h * h).mean(dim=-1, keepdim=True).add(1e-6).rsqrt()).to(x) * w


def torch_square(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(torch.mean(torch.square(h), (-1,), True) + 1e-6)).to(x.dtype) * w


def two_float_casts_in_the_square(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def without_weight(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def without_eps(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).to(x.dtype) * w


def offset_in_the_weights_dtype(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (1 + w) * h.to(x.dtype)


def unsqueeze_in_place_of_keepdim(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1) + 1e-6).unsqueeze(-1)).to(x.dtype) * w


def narrow_x_beside_a_wide_statistic(x: Tensor, w: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def weight_of_three_dimensions(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w[None, None]


def dropout_that_drops_nothing(x: Tensor, w: Tensor) -> Tensor:
    h = F.dropout(x, 0.0).float()
    return w * F.dropout(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6), 0.5, training=False).to(x.dtype)


def eps_in_float64(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def root_and_quotient(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def reciprocal_of_the_root(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * (1.0 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype) * w


def reciprocal_method(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * (h.square().mean(-1, keepdim=True) + 1e-6).sqrt().reciprocal()).to(x.dtype)


def power_of_minus_one_half(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5)).to(x.dtype)


def power_of_one_half(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h / (h.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5).to(x.dtype)


def sum_and_size(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6)).to(x.dtype)


def eps_added_in_place_of_order(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(1e-6 + h.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def eps_as_a_constant_tensor(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + torch.tensor(1e-6))).to(x.dtype)


def clamped(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=1e-6))).to(x.dtype)


def clamped_at_most(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * h.pow(2).mean(-1, keepdim=True).clamp_min(0.5).rsqrt()).to(x.dtype) * w


def maximum(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(torch.maximum(h.pow(2).mean(-1, keepdim=True), torch.tensor(0.7)))).to(x.dtype)


def maximum_of_a_full_tensor(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    mean = torch.mean(h * h, dim=-1, keepdim=True)
    return (h / torch.maximum(mean, torch.full_like(mean, 0.6)).sqrt() * w).to(x.dtype)


def clamped_root(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h / h.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=0.8)).to(x.dtype) * w


def weight_multiplied_first(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (w * h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def weight_multiplied_last_of_three(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * w.float() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def squared_l2_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.norm(2, -1, keepdim=True) ** 2 / D + 1e-6)).to(x.dtype)


def l2_norm_over_root_of_size(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h / (torch.norm(h, dim=-1, keepdim=True) * D**-0.5)).to(x.dtype)


def l2_norm_clamped(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    norm = torch.norm(h, p=2, dim=-1, keepdim=True) / 4.0
    return (h / norm.clamp(min=0.9) * w).to(x.dtype)


def l2_norm_clamped_first(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp(min=4.0)
    return (w * (h / norm * 4.0)).to(x.dtype)


def normalize_times_root_of_size(x: Tensor, w: Tensor) -> Tensor:
    return (F.normalize(x.float(), dim=-1) * 4.0 * w).to(x.dtype)


def weight_before_root_of_size(x: Tensor, w: Tensor) -> Tensor:
    return (F.normalize(x.float(), p=2.0, dim=-1, eps=3.0) * (w + 1) * math.sqrt(D)).to(x.dtype)


def olmo_without_weight_in_its_own_dtype(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], None, 1e-5).type_as(x) * w


# Those whose size n has to be a number: n ** 0.5 of a symbolic one is not known.
STATIC = (
    squared_l2_norm,
    l2_norm_over_root_of_size,
    l2_norm_clamped,
    l2_norm_clamped_first,
    normalize_times_root_of_size,
    weight_before_root_of_size,
)
SPELLINGS = (
    root_and_quotient,
    reciprocal_of_the_root,
    reciprocal_method,
    power_of_minus_one_half,
    power_of_one_half,
    sum_and_size,
    eps_added_in_place_of_order,
    eps_as_a_constant_tensor,
    clamped,
    clamped_at_most,
    maximum,
    maximum_of_a_full_tensor,
    clamped_root,
    weight_multiplied_first,
    weight_multiplied_last_of_three,
    olmo_without_weight_in_its_own_dtype,
    *STATIC,
    hugging_face,
    hugging_face_weight_on_the_right,
    cast_last,
    gemma,
    torchtune,
    called_by_name,
    called_by_name_in_torch,
    called_without_eps,
    called_without_weight,
    called_then_weighted,
    two_separate_casts,
    x_times_x,
    torch_square,
    two_float_casts_in_the_square,
    without_weight,
    without_eps,
    offset_in_the_weights_dtype,
    unsqueeze_in_place_of_keepdim,
    narrow_x_beside_a_wide_statistic,
    weight_of_three_dimensions,
    dropout_that_drops_nothing,
)


def tensors(dtype: torch.dtype = torch.float32, training: bool = False, weight: object = None) -> tuple[Tensor, Tensor]:
    """x [2, 3, D] and w [D]"""
    w = torch.randn(D) * 0.3 + 1
    x = torch.randn(2, 3, D).to(dtype)
    wide = weight if isinstance(weight, torch.dtype) else dtype
    return x.requires_grad_(training), w.to(wide).requires_grad_(training)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", SPELLINGS)
def test_spelling_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(
        function, *tensors(dtype, training), training=training, dynamic=dynamic and function not in STATIC
    )
    assert captured.counts == {"rms_norm": 1}
    assert captured.refusals == []
    assert not captured.targets() & {"rsqrt", "mean", "pow", "rms_norm"}
    assert_same_results(captured, training)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_module_becomes_one_operator(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = nn.RMSNorm(D, eps=1e-5, dtype=dtype).requires_grad_(training)
    captured = capture(module, tensors(dtype, training)[0], training=training, dynamic=dynamic)
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured, training)


@pytest.mark.parametrize("function", SPELLINGS)
def test_float32_weight_with_bfloat16_activations_keeps_dtype_and_rounding(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16, weight=torch.float32))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("function", [hugging_face, cast_last, gemma, torchtune, called_by_name])
def test_float16(function: Function) -> None:
    captured = capture(function, *tensors(torch.float16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("function", [called_by_name, called_without_eps, eps_in_float64])
def test_float64_is_computed_in_float64(function: Function) -> None:
    captured = capture(function, *tensors(torch.float64))
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].meta["example_value"].dtype == torch.float64
    assert_same_results(captured)


def arguments(function: Function, *args: Tensor) -> tuple[float, bool]:
    """(weight_offset, cast_before_weight) of the operator."""
    (node,) = capture(function, *args).operators()
    return node.args[3], node.args[4]  # type: ignore[return-value]


def test_order_of_cast_and_weight_is_kept() -> None:
    x, w = tensors(torch.bfloat16)
    assert arguments(hugging_face, x, w) == (0.0, True)
    assert arguments(cast_last, x, w) == (0.0, False)
    assert arguments(called_by_name, x, w) == (0.0, False)
    assert arguments(called_then_weighted, x, w) == (0.0, True)


def test_offset_becomes_an_argument_only_if_it_is_added_in_float32() -> None:
    x, w = tensors(torch.bfloat16)
    assert arguments(gemma, x, w) == (1.0, False)
    assert arguments(offset_in_the_weights_dtype, x, w) == (0.0, True)


def test_offset_is_read_from_the_constant() -> None:
    def no_offset(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (0.0 + w.float())).type_as(x)

    assert arguments(no_offset, *tensors(torch.bfloat16)) == (0.0, False)


def test_eps_of_half_precision_is_that_of_float32() -> None:
    x, w = tensors(torch.bfloat16)
    (node,) = capture(called_without_eps, x, w).operators()
    assert node.args[2] == torch.finfo(torch.float32).eps


def test_lower_bounds_become_an_argument() -> None:
    def eps(function: Function) -> float:
        (node,) = capture(function, *tensors()).operators()
        assert node.args[5] is True
        return node.args[2]  # type: ignore[return-value]

    assert eps(clamped) == 1e-6
    assert eps(clamped_at_most) == 0.5
    assert eps(maximum) == pytest.approx(0.7)
    assert eps(clamped_root) == pytest.approx(0.64)
    assert eps(l2_norm_clamped) == pytest.approx(0.81)
    assert eps(l2_norm_clamped_first) == pytest.approx(1.0)
    assert eps(weight_before_root_of_size) == pytest.approx(9 / D)
    (node,) = capture(hugging_face, *tensors()).operators()
    assert node.args[5] is False


def test_rows_below_the_lower_bound_keep_their_gradient() -> None:
    for function in (clamped_at_most, maximum, clamped_root, l2_norm_clamped, weight_before_root_of_size):
        x, w = tensors(training=True)
        small = (x.detach() * torch.tensor([0.1, 1.0, 3.0])[:, None]).requires_grad_()
        captured = capture(function, small, w, training=True)
        assert captured.counts == {"rms_norm": 1}
        assert_same_results(captured, training=True)


def test_symbolic_lower_bound_is_passed_on() -> None:
    class Norm(nn.Module):
        eps = 1e-3

        def forward(self, x: Tensor) -> Tensor:
            y = x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=self.eps)
            mean = y.pow(2).mean(-1, keepdim=True)
            return y * torch.rsqrt(torch.maximum(mean, torch.full_like(mean, self.eps)))

    captured = capture(Norm(), tensors()[0], dynamic=True)
    assert captured.counts == {"rms_norm": 2}
    assert_same_results(captured)


def test_heads_with_a_weight_each_are_normalised_without_it() -> None:
    def cohere(x: Tensor, w: Tensor) -> Tensor:
        h = x.view(2, 3, 2, D // 2)
        h = h.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (w.view(2, D // 2).to(torch.float32) * h).to(x.dtype)

    captured = capture(cohere, *tensors(torch.bfloat16, training=True), training=True)
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured, training=True)


@pytest.mark.parametrize("layout", ["packed", "heads"])
@pytest.mark.parametrize("function", [hugging_face, torchtune, called_by_name, root_and_quotient])
def test_slice_of_a_packed_projection(function: Function, layout: str) -> None:
    def sliced(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if layout == "packed":
            q, k, _ = x.view(2, 3, 3 * D).split([D, D, D], dim=-1)
            return function(q, w), function(k, w)
        q, k = x.view(2, 3, 3, D)[:, :, :2].unbind(2)
        return function(q.transpose(0, 1), w), function(k, w)

    captured = capture(sliced, torch.randn(2, 3, 3 * D).bfloat16(), tensors(torch.bfloat16)[1])
    assert captured.counts == {"rms_norm": 2}
    assert_same_results(captured)


def test_scale_on_top_stays_outside() -> None:
    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return hugging_face(x, w) * w[0] * 0.5

    captured = capture(scaled, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_symbolic_eps_is_passed_on() -> None:
    class Norm(nn.Module):
        eps = 1e-3

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    captured = capture(Norm(), tensors()[0], dynamic=True)
    (node,) = captured.operators()
    assert isinstance(node.args[2], torch.fx.Node)
    assert_same_results(captured)


def test_wide_result_keeps_the_cast_and_takes_the_wide_x() -> None:
    def stays_float32(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    captured = capture(stays_float32, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].args[0].target == "float"  # type: ignore[union-attr]
    assert_same_results(captured)


def test_cast_to_a_third_dtype_stays_outside() -> None:
    def to_half(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(torch.float16)

    captured = capture(to_half, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_factor_that_is_no_vector_stays_outside() -> None:
    def modulated(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * x * w * 2.0

    captured = capture(modulated, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured)


def test_weight_of_another_length_stays_outside() -> None:
    def broadcast(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[:1] * w[0]

    captured = capture(broadcast, *tensors())
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured)


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_input_keeps_its_layout(transposed: bool) -> None:
    def heads(x: Tensor, w: Tensor) -> Tensor:
        h = x.view(2, 3, 4, D)
        h = h.transpose(1, 2) if transposed else h
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        # A view that only the source's strides allow.
        return h.transpose(1, 2).view(2, 3, 4 * D) if transposed else h.view(2, 3, 4 * D)

    captured = capture(heads, torch.randn(2, 3, 4 * D), tensors()[1])
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_statistic_that_is_read_elsewhere_stays() -> None:
    def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * r * w, r

    captured = capture(returned, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_rounded_statistic_is_refused_under_exact_numerics_only() -> None:
    def rounded(x: Tensor, w: Tensor) -> Tensor:
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        return x * r * w

    captured = capture(rounded, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)
    exact = capture(rounded, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert exact.counts == {}
    assert "numerics" in exact.refusals[0]


@pytest.mark.parametrize("function", [hugging_face, cast_last, gemma, torchtune, called_by_name])
def test_common_spellings_are_exact(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"rms_norm": 1}
    x, w = captured.inputs
    assert torch.equal(captured.original(x, w)[0], captured.rewritten(x, w)[0])


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
