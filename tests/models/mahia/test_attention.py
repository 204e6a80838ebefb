"""MetaAttentionKernel against its formula: a loop for the state, torch's own attention for the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.models.mahia import MetaAttentionKernel
from tests.tolerances import error

X = (2, 9, 16)


def module(**settings: object) -> MetaAttentionKernel:
    return MetaAttentionKernel(16, **{"num_heads": 2, **settings}).double()  # type: ignore[arg-type]


def state_of(layer: MetaAttentionKernel, h: Tensor) -> Tensor:
    """s = f s + (1 - f) u, one position after the other."""
    forget = torch.sigmoid(layer.forget(h)).repeat_interleave(layer.dim // layer.num_heads, -1)
    new, state, states = layer.update(h), torch.zeros_like(h[:, 0]), []
    for position in range(h.shape[1]):
        state = forget[:, position] * state + (1 - forget[:, position]) * new[:, position]
        states.append(state)
    return torch.stack(states, 1)


@pytest.mark.parametrize("use_fourier", [True, False])
def test_it_is_its_formula(use_fourier: bool) -> None:
    layer, x = module(use_fourier=use_fourier), torch.randn(X, dtype=torch.float64)
    h = F.rms_norm(x, (16,), layer.norm.weight, 1e-6)
    if layer.fourier is not None:
        phases = layer.fourier.phases(h)
        h = h + layer.fourier.out(torch.cat((torch.sin(phases), torch.cos(phases)), -1))
    projected = (layer.q(h + state_of(layer, h)), layer.k(h), layer.v(h))
    q, k, v = (tensor.view(2, 9, 2, 8).transpose(1, 2) for tensor in projected)
    expected = x + layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(X))
    assert use_fourier == (layer.fourier is not None)
    assert error(layer(x), expected) < 1e-12


def test_distillation_holds_the_update_of_the_state_fixed() -> None:
    layer, x = module(), torch.randn(X, dtype=torch.float64)
    before = layer(x)
    layer.during_distillation = True
    after = layer(x)
    assert torch.equal(before, after)
    after.sum().backward()
    grads = {name: parameter.grad is not None for name, parameter in layer.named_parameters()}
    assert [name for name, has in grads.items() if not has] == ["forget.weight", "forget.bias", "update.weight"]


@pytest.mark.parametrize(("dim", "heads"), [(16, 1), (64, 1), (96, 1), (256, 4)])
def test_heads_have_64_features_where_they_can(dim: int, heads: int) -> None:
    assert MetaAttentionKernel(dim).num_heads == heads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim: got 0, expected at least 1"),
        ({"dim": 16, "num_heads": 3}, "got 16 and 3, expected dim to be"),
    ],
)
def test_wrong_sizes_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaAttentionKernel(**settings)


def test_a_size_that_is_no_int_is_refused() -> None:
    with pytest.raises(TypeError, match="dim: got 16.0, expected an int"):
        MetaAttentionKernel(16.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(9, 16), (2, 9, 8), (2, 0, 16), (1, 2, 9, 16)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"MetaAttentionKernel: x: got shape .*, expected \[B, L, 16\]"):
        module()(torch.zeros(shape))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch.int64, expected a floating-point dtype"):
        module()(torch.zeros(X, dtype=torch.int64))
