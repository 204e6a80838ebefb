"""SparseMoETopK against a loop over rows, with and without experts that are full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.models.mahia import SparseMoETopK
from tests.tolerances import error, rounding

DIM, EXPERTS = 8, 4


def one_by_one(layer: SparseMoETopK, x: Tensor) -> tuple[Tensor, int]:
    """The formula, row after row, first choices first; and how many choices found their expert full."""
    rows = x.reshape(-1, DIM)
    out, taken, full = torch.zeros_like(rows), [0] * EXPERTS, 0
    probabilities = torch.softmax(rows @ layer.router.weight.T, -1)
    weights, experts = probabilities.sort(-1, descending=True)
    weights = weights[:, : layer.top_k] / weights[:, : layer.top_k].sum(-1, keepdim=True)
    limit = layer.capacity(len(rows))
    for choice in range(layer.top_k):
        for row, vector in enumerate(rows):
            expert = int(experts[row, choice])
            if taken[expert] == limit:
                full += 1
                continue
            taken[expert] += 1
            hidden = F.silu(vector @ layer.gate[expert]) * (vector @ layer.up[expert])
            out[row] += weights[row, choice] * (hidden @ layer.down[expert])
    return out.view(x.shape), full


@pytest.mark.parametrize("shape", [(1, DIM), (7, DIM), (3, 5, DIM)])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("capacity_factor", [0.5, float(EXPERTS)])
def test_rows_go_to_their_experts(shape: tuple[int, ...], top_k: int, capacity_factor: float) -> None:
    layer = SparseMoETopK(DIM, EXPERTS, top_k, capacity_factor).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected, full = one_by_one(layer, x)
    if capacity_factor == EXPERTS:  # all rows may go to one expert
        assert full == 0
    elif len(x) > 1:
        assert full > 0
    assert error(layer(x), expected) < 1e-12


def test_full_experts_get_no_gradient_from_what_they_left_out() -> None:
    layer = SparseMoETopK(DIM, EXPERTS, 1, 1e-6).double()  # one row each
    x = torch.randn(9, DIM, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    left_out = out.detach().abs().sum(-1) == 0
    assert 9 - EXPERTS <= left_out.sum() < 9
    assert x.grad is not None
    assert torch.equal(x.grad.abs().sum(-1) == 0, left_out)


def test_bf16_routes_as_float32_does() -> None:
    layer = SparseMoETopK(DIM, EXPERTS, 2, 4.0).bfloat16()
    x = torch.randn(40, DIM).bfloat16()
    wide = SparseMoETopK(DIM, EXPERTS, 2, 4.0)
    wide.load_state_dict(layer.state_dict())
    assert torch.equal(layer.route(x).experts, wide.route(x.float()).experts)
    # inputs of the third product, its result, weights, their products and the sum: five roundings in a row
    assert error(layer(x), wide(x.float())) < 5 * 2 * rounding(torch.bfloat16)


def test_autocast_does_not_touch_the_router() -> None:
    layer, x = SparseMoETopK(DIM, EXPERTS, 2), torch.randn(40, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.route(x)
    for got, expected in zip(found, layer.route(x)):
        assert torch.equal(got, expected)


def test_balance_loss_is_one_when_all_experts_get_the_same() -> None:
    layer = SparseMoETopK(EXPERTS, EXPERTS, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(EXPERTS) * 50)
    assert layer.balance_loss(torch.eye(EXPERTS)).item() == pytest.approx(1.0)
    one_for_all = torch.eye(EXPERTS)[:1].repeat(8, 1)
    assert layer.balance_loss(one_for_all).item() == pytest.approx(EXPERTS)


def test_balance_loss_trains_the_router() -> None:
    layer, x = SparseMoETopK(DIM, EXPERTS, 2), torch.randn(64, DIM) + 2
    optimiser = torch.optim.SGD([layer.router.weight], lr=0.02)
    before = layer.balance_loss(x).item()
    for _ in range(50):
        optimiser.zero_grad()
        layer.balance_loss(x).backward()
        optimiser.step()
    assert layer.balance_loss(x).item() < before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0"),
        ({"top_k": 5}, "top_k: got 5, expected at most num_experts=4"),
        ({"capacity_factor": 0.0}, "capacity_factor: got 0.0, expected a number above 0"),
        ({"capacity_factor": float("inf")}, "capacity_factor: got inf"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMoETopK(DIM, **{"num_experts": EXPERTS, **settings})  # type: ignore[arg-type]


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SparseMoETopK: x: got shape \(3, 7\), expected \[B, 8\] or \[B, L, 8\]"):
        SparseMoETopK(DIM)(torch.zeros(3, 7))
