"""DynamicNeuroFabric: every layer is as strong as the input asks for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from infuse.models.mahia import DynamicNeuroFabric
from tests.tolerances import error

DIM = 8


@pytest.mark.parametrize("shape", [(5, DIM), (2, 4, DIM), (1, DIM)])
def test_it_is_its_formula(shape: tuple[int, ...]) -> None:
    fabric = DynamicNeuroFabric(DIM, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = x
    for index in range(3):
        weights = fabric.get_submodule(f"layers.{index}").state_dict()
        h = expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["norm.weight"]
        hidden = F.silu(h @ weights["gate.weight"].T) * (h @ weights["up.weight"].T)
        strength = torch.sigmoid(x @ fabric.activation.weight[index] + fabric.activation.bias[index])
        expected = expected + strength[..., None] * (hidden @ weights["down.weight"].T)
    assert error(fabric(x), expected) < 1e-12


def test_layers_act_by_row() -> None:
    """A row for which every probability is 0 passes unchanged; another one beside it does not."""
    fabric = DynamicNeuroFabric(DIM, 2)
    with torch.no_grad():
        fabric.activation.weight.zero_()[:, 0] = 1e4
        fabric.activation.bias.zero_()
    x = torch.ones(2, DIM)
    x[0, 0] = -1.0
    out = fabric(x)
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])
    assert fabric.activations(x).tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("sizes", [{"dim": 0}, {"dim": 8, "max_layers": 0}, {"dim": 8, "hidden_dim": -1}])
def test_wrong_sizes_are_refused(sizes: dict[str, int]) -> None:
    name, value = list(sizes.items())[-1]
    with pytest.raises(ValueError, match=f"DynamicNeuroFabric: {name}: got {value}, expected at least 1"):
        DynamicNeuroFabric(**sizes)


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DynamicNeuroFabric: x: got shape \(8,\), expected \[B, 8\] or \[B, L, 8\]"):
        DynamicNeuroFabric(DIM)(torch.zeros(8))
