"""The decayed sum is the recurrence that it stands for, at every length and every decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infuse.models.mahia.decayed_sum import decayed_sum
from tests.tolerances import error, rounding


def recurrence(values: Tensor, log_decay: Tensor) -> Tensor:
    state = torch.zeros_like(values[..., 0, :])
    states = []
    for position in range(values.shape[-2]):
        state = log_decay[..., position, None].exp() * state + values[..., position, :]
        states.append(state)
    return torch.stack(states, -2)


def tensors(length: int, strength: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    values = torch.randn(2, 3, length, 4, dtype=torch.float64)
    return values.to(dtype), (-strength * torch.rand(2, 3, length, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 61])
@pytest.mark.parametrize("strength", [0.0, 0.1, 3.0, 500.0])
def test_it_is_the_recurrence(length: int, strength: float) -> None:
    values, log_decay = tensors(length, strength)
    assert error(decayed_sum(values, log_decay, chunk_size=8), recurrence(values, log_decay)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    values, log_decay = tensors(200, 0.5, dtype)
    got = decayed_sum(values, log_decay)
    assert got.dtype == dtype
    # float32 besides: sums of up to 64 terms of up to 64 differences, some of them of like size
    bound = rounding(dtype) + 64 * rounding(torch.float32)
    assert error(got, recurrence(values.double(), log_decay.double())) < bound


def test_autocast_changes_nothing() -> None:
    values, log_decay = tensors(70, 0.5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decayed_sum(values, log_decay)
    assert torch.equal(found, decayed_sum(values, log_decay))


@pytest.mark.parametrize("strength", [0.3, 300.0])
def test_gradients(strength: float) -> None:
    values, log_decay = (tensor.requires_grad_() for tensor in tensors(11, strength))
    weights = torch.randn_like(values)
    got = torch.autograd.grad((decayed_sum(values, log_decay, chunk_size=4) * weights).sum(), (values, log_decay))
    expected = torch.autograd.grad((recurrence(values, log_decay) * weights).sum(), (values, log_decay))
    for mine, other in zip(got, expected):
        assert error(mine, other) < 1e-12
