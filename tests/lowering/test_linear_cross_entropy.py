"""The loss of a language model's head, compiled: what runs forwards, and the gradients' factor in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import infuse
from infuse.report import Placement

VOCAB, DIM = 4099, 8


def loss_of(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float().view(-1, VOCAB), target.view(-1))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    return torch.randn(2, 5, DIM), weight, torch.randint(0, VOCAB, (2, 5))


def gradients(loss: Tensor, *leaves: Tensor, factor: float) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(factor))]


def test_weight_gradient_is_scaled_in_place(
    inputs: tuple[Tensor, Tensor, Tensor],
    implement_on_cpu: Callable[[str, Callable[..., Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[float] = []

    def scale(tensor: Tensor, by: Tensor) -> None:
        calls.append(by.item())
        tensor.mul_(by)

    implement_on_cpu("scale_unless_one", scale)
    monkeypatch.setattr("infuse.backend.place", lambda *args, **kwargs: Placement("default", "pretended"))
    monkeypatch.setattr("infuse.ops.chunked_cross_entropy.cannot_run", lambda *args: "there is no kernel here")

    _, weight, _ = inputs
    expected = gradients(loss_of(*inputs), weight, factor=0.25)
    compiled = torch.compile(loss_of, backend="infuse")
    found, codes = run_and_get_code(lambda: gradients(compiled(*inputs), weight, factor=0.25))
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want)
    assert calls == [0.25]
    assert "scale_unless_one" in codes[-1] and "linear_cross_entropy_fwd" in codes[0]


def test_formula_runs_where_there_is_no_kernel(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    report = infuse.explain(loss_of, *inputs, training=True)
    assert report.rewritten == {"linear_cross_entropy": 1}
    assert report.sites[0].kernel == "decomposition (no kernel for cpu)"
