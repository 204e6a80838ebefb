"""Writes to temporaries become new values, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.patterns.capture import MODES, assert_same_results, capture
from tests.patterns.test_attention_call import HEAD, B, H, S, T, tensors

Function = Callable[..., Tensor]


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= HEAD**0.5
    scores += torch.linspace(-1, 1, T, device=q.device).to(q.dtype)
    return torch.softmax(scores, -1) @ v


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3
    # The name of the value stays the old one.
    scores.masked_fill_(torch.ones(S, T, dtype=torch.bool, device=q.device).triu(2), float("-inf"))
    return torch.softmax(scores, -1) @ v


def through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(B * H, -1, HEAD) for t in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, T)
    scores += torch.linspace(-1, 1, T, device=q.device).to(q.dtype)
    return torch.bmm(torch.softmax(scores.mul_(0.3), -1).view(B * H, S, T), v)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [scaled_in_place, masked_in_place, through_a_view])
def test_scores_changed_in_place(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.refusals == []
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training)


def input_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    q *= 2.0
    return torch.softmax(scores, -1) @ v + q


def view_of_an_input_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    q.view(-1).mul_(2.0)
    return torch.softmax(scores, -1) @ v + q


def base_is_read_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = (q * 1.5).reshape(-1)
    rows = flat.view(B, H, S, HEAD)
    rows += 1.0
    return torch.softmax(rows @ k.mT, -1) @ v + flat.view(B, H, S, HEAD)


def complex_operand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2) * 1.5)
    turned *= torch.polar(torch.ones(HEAD // 2), torch.linspace(0, 1, HEAD // 2))
    return torch.softmax(torch.view_as_real(turned).flatten(-2) @ k.mT, -1) @ v


def without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.no_grad():
        scores *= 2.0
    return torch.softmax(scores.clone(), -1) @ v


@pytest.mark.parametrize(
    "function", [input_is_written, view_of_an_input_is_written, base_is_read_later, complex_operand, without_gradient]
)
def test_other_writes_stay(function: Function) -> None:
    training = function is without_gradient
    captured = capture(function, *tensors(training=training), training=training)
    kept = {"mul_", "imul", "iadd"} & captured.targets()
    assert kept
    assert_same_results(captured, training)


def test_write_behind_a_closed_block_without_gradients() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            factor = q.abs().amax()
        scores = q @ k.mT
        scores /= 2.0
        return torch.softmax(scores, -1) @ v * factor

    captured = capture(function, *tensors(training=True), training=True)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training=True)


def test_old_value_that_is_read_before_is_kept() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        total = scores.sum()
        scores *= 0.5
        return torch.softmax(scores, -1) @ v + total

    captured = capture(function, *tensors(training=True), training=True)
    assert not {"imul"} & captured.targets()
    assert_same_results(captured, training=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_wider_operand_is_added_and_rounded(training: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += torch.full((5, 5), float("-inf")).triu(1)
        return torch.softmax(scores, -1) @ v

    inputs = [torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=training) for _ in range(3)]
    captured = capture(attention, *inputs, training=training)
    assert captured.counts == {"attention": 1}
    assert captured.refusals == []
    assert_same_results(captured, training)


def test_what_is_written_in_a_wider_dtype_is_rounded_as_before() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z *= y
        z.sub_(y)
        return z * torch.rsqrt(z.float().pow(2).mean(-1, keepdim=True) + 1e-6)

    captured = capture(function, torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(6, 8))
    assert not {"imul", "sub_"} & captured.targets()
    before, after = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    assert before[0].dtype == after[0].dtype
    assert_same_results(captured)
