"""LayerNorm: what its spellings become, and what of them stays outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, parameters
from tests.patterns.layer_norm_spellings import (
    CALLS,
    SPELLINGS,
    D,
    Function,
    called,
    called_in_float32,
    called_then_scaled_and_shifted,
    called_then_shifted,
    called_with_bias_alone,
    nemotron,
    olmo,
    tensors,
)


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
