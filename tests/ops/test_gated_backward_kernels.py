"""What the kernels of a gated MLP's gradients take, and why not the rest."""

from __future__ import annotations

import pytest
import torch

from infuse.ops import library
from infuse.ops.gated_backward_kernels import (
    ACTIVATIONS,
    can_differentiate,
    can_differentiate_linear,
    can_multiply_pair,
)

BF16, FP16 = torch.bfloat16, torch.float16


def test_what_one_pass_takes() -> None:
    for dtype in (BF16, FP16):
        for activation in ACTIVATIONS:
            assert can_differentiate(torch.zeros(3, 7, dtype=dtype), torch.zeros(3, 14, dtype=dtype), activation) == ""


def test_what_one_pass_refuses_says_why() -> None:
    dout, gate_up = torch.zeros(3, 7, dtype=BF16), torch.zeros(3, 14, dtype=BF16)
    for refused, why in (
        (can_differentiate(dout, gate_up, "relu"), "relu"),
        (can_differentiate(dout.float(), gate_up.float(), "silu"), "float32"),
        (can_differentiate(dout.half(), gate_up, "silu"), "float16"),
    ):
        assert why in refused


def test_what_the_gemms_take_and_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.zeros(3, 32, dtype=BF16), torch.zeros(32, 24, dtype=BF16)
    assert "9.0" in can_multiply_pair(rows, weight[:16], weight[16:])
    monkeypatch.setattr(library, "capability", lambda device: (9, 0))
    for gate_weight, up_weight in ((weight[:16], weight[16:]), (weight[0::2], weight[1::2])):
        assert can_multiply_pair(rows, gate_weight, up_weight) == ""
    assert can_differentiate_linear(rows[:, :24], weight.mT.contiguous(), rows.repeat(1, 2), "silu") == ""
    for refused, why in (
        (can_multiply_pair(rows, weight[:16].mT.contiguous().mT, weight[16:]), "strides of 1 and 16"),
        (can_multiply_pair(rows, weight[:16, :20], weight[16:, :20]), "16 x 20"),
        (can_multiply_pair(rows, weight[:16], weight[16:].half()), "float16"),
        (can_multiply_pair(rows.float(), weight[:16].float(), weight[16:].float()), "float32"),
        (can_differentiate_linear(rows[:, :24], weight.mT, rows.repeat(1, 2), "silu"), "strides of 1 and 24"),
        (can_differentiate_linear(rows[:, :24], weight.mT.contiguous(), rows.repeat(1, 2), "mish"), "mish"),
    ):
        assert why in refused


def test_the_fake_results_have_the_operands_shapes() -> None:
    with torch.device("meta"):
        results = torch.ops.infuse.gated_backward(torch.zeros(2, 3, 7), torch.zeros(2, 3, 14), "silu", True, -1)
        dy, down, gate, up = (torch.zeros(*shape) for shape in ((2, 3, 5), (5, 7), (7, 4), (7, 4)))
        without = torch.ops.infuse.linear_gated_backward(dy, down, results[0], "silu", False, -1)
        dx = torch.ops.infuse.linear_pair_product(results[0], gate, up, -1)
    shapes = [tuple(result.shape) for result in (*results, *without, dx)]
    assert shapes == [(2, 3, 14), (2, 3, 7), (2, 3, 14), (0,), (2, 3, 4)]
