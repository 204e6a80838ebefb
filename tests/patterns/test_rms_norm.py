"""RMSNorm: every spelling becomes one operator, whose arguments say what was spelled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.capture import MODES, assert_same_results, capture
from tests.patterns.rms_norm_spellings import (
    SPELLINGS,
    STATIC,
    D,
    Function,
    called_by_name,
    called_then_weighted,
    called_without_eps,
    cast_last,
    clamped,
    clamped_at_most,
    clamped_root,
    eps_in_float64,
    gemma,
    hugging_face,
    l2_norm_clamped,
    l2_norm_clamped_first,
    maximum,
    offset_in_the_weights_dtype,
    tensors,
    torchtune,
    weight_before_root_of_size,
)


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
