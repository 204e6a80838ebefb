"""Gated activations of a mixture's experts, whose projections are grouped or batched products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.capture import Captured, capture, composite_overload, results

EXPERTS, DIM, HIDDEN = 3, 8, 16
Formula = Callable[..., Any]


def packed(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    gate, up = torch._grouped_mm(x, w, offs=offs).chunk(2, dim=-1)
    return F.silu(gate) * up


def transposed(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    gate, up = F.grouped_mm(x, w.transpose(1, 2).contiguous().transpose(-2, -1), offs=offs).chunk(2, dim=-1)
    return up * F.silu(gate)


def separate(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    return F.gelu(torch._grouped_mm(x, w, offs)) * torch._grouped_mm(x, other, offs=offs)


def interleaved(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    y = torch._grouped_mm(x, w, offs)
    return F.silu(y[..., 1::2]) * y[..., ::2]


def shares(x: Tensor) -> Tensor:
    """As many rows for each expert."""
    return x[: 3 * EXPERTS].unflatten(0, (EXPERTS, 3))


def batches(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    rows = shares(x)
    return F.silu(torch.bmm(rows, w)) * torch.bmm(rows, other)


def packed_batches(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    up, gate = (shares(x) @ w).chunk(2, dim=-1)
    return up * F.gelu(gate, approximate="tanh")


SPELLINGS: dict[str, tuple[Formula, str]] = {
    "packed": (packed, "gate_up"),
    "transposed": (transposed, "gate_up"),
    "separate": (separate, "gate_up"),
    "interleaved": (interleaved, "interleaved_up_first"),
    "batches": (batches, "gate_up"),
    "packed batches": (packed_batches, "up_gate"),
}


def run(formula: Formula, training: bool, dynamic: bool = False) -> Captured:
    generator = torch.Generator().manual_seed(1)
    x, w, other = (
        nn.Parameter(torch.randn(*shape, generator=generator).bfloat16(), requires_grad=training)
        for shape in ((10, DIM), (EXPERTS, DIM, 2 * HIDDEN), (EXPERTS, DIM, 2 * HIDDEN))
    )
    offs = torch.tensor([4, 4, 10], dtype=torch.int32)
    captured = capture(formula, x, w, other, offs, training=training, dynamic=dynamic, place=composite_overload)
    before, after = (results(graph, captured.inputs, training) for graph in (captured.original, captured.rewritten))
    torch.testing.assert_close(after, before)
    return captured


@pytest.mark.parametrize(("training", "dynamic"), [(False, True), (True, False)])
@pytest.mark.parametrize(("formula", "order"), SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(formula: Formula, order: str, training: bool, dynamic: bool) -> None:
    captured = run(formula, training, dynamic)
    assert captured.counts == {"grouped_linear_swiglu": 1}
    (node,) = captured.operators()
    assert node.args[3] == order
    assert not {"_grouped_mm", "bmm", "matmul"} & set(captured.targets())


def with_bias(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    gate, up = (torch._grouped_mm(x, w, offs=offs) + 1).chunk(2, dim=-1)
    return F.silu(gate) * up


def masked(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    gate, up = torch._grouped_mm(x, w, offs=offs).masked_fill(x.sum(-1, keepdim=True) > 0, 0.0).chunk(2, dim=-1)
    return F.silu(gate) * up


def returned_too(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Any:
    y = torch._grouped_mm(x, w, offs=offs)
    return F.silu(y[..., :HIDDEN]) * y[..., HIDDEN:], y


def other_rows(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    return F.silu(torch._grouped_mm(x, w, offs=offs)) * torch._grouped_mm(x.flip(0), other, offs=offs)


def other_groups(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    return F.silu(torch._grouped_mm(x, w, offs=offs)) * torch._grouped_mm(x, other, offs=offs + 0)


def batched(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    y = torch._grouped_mm(x.expand(EXPERTS, *x.shape).contiguous(), w)
    return F.silu(y[..., :HIDDEN]) * y[..., HIDDEN:]


def other_batches(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    return F.silu(torch.bmm(shares(x), w)) * torch.bmm(shares(x).flip(0), other)


def one_batch_for_all(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    return F.silu(x.unsqueeze(0) @ w) * (x.unsqueeze(0) @ other)


def added_batches(x: Tensor, w: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    gate, up = (torch.baddbmm(w.new_ones(1, 1, w.shape[-1]), shares(x), w)).chunk(2, dim=-1)
    return F.silu(gate) * up


KEPT = {
    "bias": (with_bias, ""),
    "mask between": (masked, ""),
    "returned too": (returned_too, "read elsewhere too"),
    "other rows": (other_rows, "project different inputs"),
    "other groups": (other_groups, "project different inputs"),
    "batches instead of groups": (batched, ""),
    "other batches": (other_batches, "project different inputs"),
    "one batch that all experts take": (one_batch_for_all, ""),
    "bias of batches": (added_batches, ""),
}


@pytest.mark.parametrize(("formula", "reason"), KEPT.values(), ids=KEPT)
def test_products_that_stay_apart(formula: Formula, reason: str) -> None:
    captured = run(formula, training=False)
    assert captured.counts == {"swiglu": 1}
    assert len(captured.notes) == bool(reason) and all(reason in note for note in captured.notes)
