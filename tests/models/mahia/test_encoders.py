"""FusionLayer, TextEncoder and TabularEncoder: formulas, lengths, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from infuse.models.mahia import FusionLayer, TabularEncoder, TextEncoder
from tests.tolerances import error

DIM = 8


@pytest.mark.parametrize("shape", [(5, DIM), (2, 3, DIM)])
def test_fusion_is_its_formula(shape: tuple[int, ...]) -> None:
    layer = FusionLayer(DIM).double()
    first, second = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    gate, value = (
        first @ linear.weight[:, :DIM].T + second @ linear.weight[:, DIM:].T + linear.bias
        for linear in (layer.gate, layer.value)
    )
    assert error(layer(first, second), torch.sigmoid(gate) * value * torch.sigmoid(value)) < 1e-12


def test_fusion_refuses_inputs_that_differ() -> None:
    layer, rows = FusionLayer(DIM), torch.zeros(5, DIM)
    with pytest.raises(ValueError, match=r"got shapes \(5, 8\) and \(4, 8\), expected the same"):
        layer(rows, rows[:4])
    with pytest.raises(ValueError, match=r"FusionLayer: second: got shape \(5, 9\)"):
        layer(rows, torch.zeros(5, 9))


def test_text_is_embedded_mixed_and_normed() -> None:
    encoder = TextEncoder(20, 12, DIM, num_layers=2, kernel_size=3)
    tokens = torch.randint(20, (2, 7))
    x = encoder.tokens.weight[tokens] + encoder.positions[:7]
    for layer in encoder.layers:
        x = layer(x)
    assert len(encoder.layers) == 4
    torch.testing.assert_close(encoder(tokens), F.rms_norm(x, (DIM,), encoder.norm.weight, 1e-6))
    assert torch.equal(encoder(tokens.int()), encoder(tokens))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 13, dtype=torch.int64), r"got shape \(2, 13\), expected \[B, 1..12\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"got shape \(2, 0\), expected \[B, 1..12\]"),
        (torch.zeros(12, dtype=torch.int64), r"got shape \(12,\), expected \[B, 1..12\]"),
        (torch.zeros(2, 5), "got torch.float32, expected torch.int64 or torch.int32"),
    ],
)
def test_text_refuses_other_tokens(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"TextEncoder: tokens: {message}"):
        TextEncoder(20, 12, DIM)(tokens)


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(IndexError):
        TextEncoder(20, 12, DIM)(torch.full((1, 3), 20))


def test_features_are_projected_mixed_and_normed() -> None:
    encoder, features = TabularEncoder(5, DIM, num_layers=2), torch.randn(3, 5)
    x = features @ encoder.proj.weight.T + encoder.proj.bias
    for layer in encoder.layers:
        x = x + layer(x)
    torch.testing.assert_close(encoder(features), F.rms_norm(x, (DIM,), encoder.norm.weight, 1e-6))


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TabularEncoder: features: got shape \(3, 4\), expected \[B, 5\]"):
        TabularEncoder(5, DIM)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="TabularEncoder: tab_dim: got 0"):
        TabularEncoder(0, DIM)
