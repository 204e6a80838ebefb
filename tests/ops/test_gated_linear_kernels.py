"""What the kernels of gated linears take, and why not the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.ops.gated_linear_kernels import ACTIVATIONS, can_compute, readable

BF16 = torch.bfloat16


def reason(gate: Tensor | None = None, up: Tensor | None = None, dtype: torch.dtype = BF16, **options: Any) -> str:
    """For five rows of 64."""
    gate = torch.zeros(72, 64, dtype=BF16) if gate is None else gate
    return can_compute(torch.zeros(5, 64, dtype=dtype), gate, gate if up is None else up, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_taken(activation: str) -> None:
    assert reason(activation=activation) == ""
    packed, bias = torch.zeros(144, 64, dtype=BF16), torch.zeros(72, dtype=BF16)
    assert reason(packed[:72], packed[72:], gate_bias=bias, up_bias=bias) == ""
    assert reason(packed[0::2], packed[1::2]) == ""
    assert reason(torch.zeros(64, 72, dtype=BF16).T) == ""
    experts = torch.zeros(3, 64, 72, dtype=BF16)
    ends = torch.tensor([1, 3, 5], dtype=torch.int32)
    assert reason(experts.transpose(1, 2), offsets=ends) == reason(experts.view(3, 72, 64), offsets=ends) == ""


def test_what_is_refused_says_why() -> None:
    weight, bias = torch.zeros(72, 64, dtype=BF16), torch.zeros(72, dtype=BF16)
    wide = torch.zeros(72, 128, dtype=BF16)
    for refused, why in (
        (reason(dtype=torch.float32), "float32"),
        (reason(weight, weight.half()), "dtypes that differ"),
        (reason(activation="relu"), "relu"),
        (reason(torch.zeros(68, 64, dtype=BF16)), "weights of [68, 64]"),
        (reason(torch.zeros(72, 60, dtype=BF16)), "weights of [72, 60]"),
        (reason(weight, torch.zeros(80, 64, dtype=BF16)), "different shapes"),
        (reason(weight, torch.zeros(64, 72, dtype=BF16).T), "these strides"),
        (reason(wide[:, ::2]), "these strides"),
        (reason(torch.zeros(72, 65, dtype=BF16)[:, :64]), "65 elements apart"),
        (reason(offsets=torch.tensor([5]), gate_bias=bias), "biases of groups"),
    ):
        assert why in refused


def test_a_tensor_is_copied_only_where_it_cannot_be_read() -> None:
    x = torch.randn(40, 64).to(BF16)
    for fits in (x, x[::2], x[:, 8:24], x[:1, 8:], x[:0]):
        assert readable(fits) is fits
        turned = fits.T
        assert readable(turned, by_columns=True) is turned
    for odd in (x[:, 1:41], x[:, ::2], x[:1].expand(5, 64), x.T, x.view(-1)[3:67].view(1, 64)):
        for copy in (readable(odd), readable(odd.T, by_columns=True).T):
            assert copy is not odd and torch.equal(copy, odd) and copy.is_contiguous()
