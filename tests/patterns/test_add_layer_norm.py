"""Residual add + LayerNorm: one operator with two results, and when they stay apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, parameters

D = 16
Function = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w, b)


def next_residual(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = residual + x
    return total + torch.tanh(norm(total, w, b))


def both_returned(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.add(x, residual)
    return norm(total, w, b), total


def norm_behind_the_add(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return norm(x + residual, w, b)


def sum_read_before_the_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = x + residual
    other = torch.tanh(total)
    return norm(total, w, b) * other


def branch_scaled_first(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + 0.5 * x
    return norm(total, w, b), total


def branch_scaled_by_a_vector(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + w * x
    return norm(total, w, b), total


def parallel_blocks(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + torch.tanh(x) + torch.sigmoid(x)
    return norm(total, w, b), total


def dropout_on_the_branch(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, 0.5, training=False)
    return norm(total, w, b), total


def tensors(dtype: torch.dtype = torch.float32, training: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [2, 3, D], w, b [D]"""
    values = torch.randn(2, 3, D), torch.randn(2, 3, D), torch.randn(D) * 0.3 + 1, torch.randn(D)
    return tuple(t.to(dtype).requires_grad_(training) for t in values)  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(
    "function",
    [
        next_residual,
        both_returned,
        norm_behind_the_add,
        sum_read_before_the_norm,
        branch_scaled_first,
        branch_scaled_by_a_vector,
        parallel_blocks,
        dropout_on_the_branch,
    ],
)
def test_add_and_norm_become_one_operator(
    function: Function, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"add_layer_norm": 1}
    assert_same_results(captured, training)


def test_live_dropout_on_the_branch_is_an_operand_like_any_other() -> None:
    def dropped(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return norm(residual + F.dropout(x, 0.5), w, b)

    captured = capture(dropped, *tensors(training=True), training=True)
    assert captured.counts == {"add_layer_norm": 1}
    assert "dropout" in captured.targets()


def test_norm_then_add_is_a_plain_norm() -> None:
    def post_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return residual + norm(x, w, b)

    captured = capture(post_norm, *tensors())
    assert captured.counts == {"layer_norm": 1}
    assert_same_results(captured)


def test_two_norms_of_one_sum_share_it() -> None:
    def parallel(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total = x + residual
        rms = F.rms_norm(total, (D,), w, 1e-6)
        return norm(total, w, b) + rms + total

    captured = capture(parallel, *tensors(training=True), training=True)
    assert captured.counts in ({"add_layer_norm": 1, "rms_norm": 1}, {"add_rms_norm": 1, "layer_norm": 1})
    assert_same_results(captured, training=True)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_encoder_layers_normalise_every_sum(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.mlp = nn.Linear(D, D), nn.Linear(D, D)
            self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x + self.mix(x))
            return self.second(torch.relu(self.mlp(x)) + x)

    module = parameters(nn.Sequential(Block(), Block()), dtype).requires_grad_(training)
    captured = capture(module, tensors(dtype, training)[0], training=training, dynamic=dynamic)
    assert captured.counts == {"add_layer_norm": 4}
    assert_same_results(captured, training)


def broadcast(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return norm(x + residual[:1], w, b)


def bias_of_a_linear(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return norm(x + b, w, b)


def alpha(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return norm(torch.add(x, residual, alpha=2), w, b)


def difference(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return norm(x - residual, w, b)


def written(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = x + residual
    total.mul_(2.0)
    return norm(total, w, b)


@pytest.mark.parametrize("function", [broadcast, bias_of_a_linear, alpha, difference, written])
def test_other_sums_stay_apart_from_the_norm(function: Function) -> None:
    captured = capture(function, *tensors())
    assert captured.counts == {"layer_norm": 1}
    assert captured.refusals == []
    assert_same_results(captured)


def test_each_composition_can_be_asked_for_alone() -> None:
    def model(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.rms_norm(norm(x + residual, w, b) + residual, (D,), w)

    def counts(*patterns: str) -> dict[str, int]:
        return capture(model, *tensors(), settings=Settings(patterns=patterns)).counts

    assert counts("add_layer_norm") == {"add_layer_norm": 1}
    assert counts("add_rms_norm") == {"add_rms_norm": 1}
    assert counts("layer_norm", "add_rms_norm") == {"layer_norm": 1, "add_rms_norm": 1}
