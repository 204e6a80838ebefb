"""RMSNorm with a gate in front of it or behind it: one operator, and when they stay apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

D = 16
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


def qwen3_next(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = norm(x, w)
    h = h * F.silu(z.to(torch.float32))
    return h.to(x.dtype)


def norm_then_gate_in_float32(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * w
    return (h * F.silu(z.float())).to(x.dtype)


def norm_then_sigmoid(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = F.rms_norm(x.float(), (D,), w.float(), 1e-6)
    return (torch.sigmoid(z.float()) * h).type_as(x)


def rounded_norm_then_rounded_gate(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), w, 1e-6) * F.silu(z)


def gate_written_out(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return norm(x, w) * (z * torch.sigmoid(z))


def mamba2_in_one_group(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32) * F.silu(z.to(torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


def mamba2_in_groups(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * F.silu(z.to(torch.float32))
    *prefix, last = h.shape
    parts = h.view(*prefix, 4, last // 4)
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * parts.view(*prefix, last).to(x.dtype)


def mamba2_in_a_view_of_one_group(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32) * F.silu(z.to(torch.float32))
    parts = h.view(2, 3, 1, D)
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * parts.view(2, 3, D).to(x.dtype)


def gate_then_norm_with_the_cast_last(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = F.silu(z.float()) * x.float()
    return (F.rms_norm(h, (D,), w.float(), 1e-6)).to(x.dtype)


def gate_then_norm_by_name(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x * torch.sigmoid(z), (D,), w, 1e-6)


def gate_in_half_then_norm(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return norm(x * F.silu(z), w)


NORM_FIRST = (
    qwen3_next,
    norm_then_gate_in_float32,
    norm_then_sigmoid,
    rounded_norm_then_rounded_gate,
    gate_written_out,
)
GATE_FIRST = (
    mamba2_in_one_group,
    mamba2_in_groups,
    mamba2_in_a_view_of_one_group,
    gate_then_norm_with_the_cast_last,
    gate_then_norm_by_name,
    gate_in_half_then_norm,
)


def tensors(dtype: torch.dtype = torch.float32, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x, z [2, 3, D] and w [D]"""
    values = torch.randn(2, 3, D), torch.randn(2, 3, D), torch.randn(D) * 0.3 + 1
    return tuple(t.to(dtype).requires_grad_(training) for t in values)  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", NORM_FIRST + GATE_FIRST)
def test_spelling_becomes_one_operator(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"gated_rms_norm": 1}
    assert captured.refusals == []
    (node,) = captured.operators()
    if dtype != torch.float32:  # where casts change nothing they are read as they stand
        assert all(argument.op == "placeholder" for argument in node.args[:3])  # type: ignore[union-attr]
    assert node.args[4] is (function in NORM_FIRST)
    assert not captured.targets() & {"rsqrt", "mean", "silu", "sigmoid", "mul"}
    assert_same_results(captured, training)


@pytest.mark.parametrize("function", [qwen3_next, mamba2_in_groups, mamba2_in_one_group, norm_then_gate_in_float32])
def test_published_spellings_are_exact(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"gated_rms_norm": 1}
    assert torch.equal(captured.original(*captured.inputs)[0], captured.rewritten(*captured.inputs)[0])


@pytest.mark.parametrize("function", [rounded_norm_then_rounded_gate, gate_written_out, gate_in_half_then_norm])
def test_what_the_operator_does_not_round_stays_in_parts_under_exact_numerics(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts.get("gated_rms_norm", 0) == 0
    assert captured.counts["rms_norm"] == 1


def flags(function: Function) -> tuple[object, ...]:
    """(activation, groups, cast_before_weight, cast_before_gate) of the operator."""
    (node,) = capture(function, *tensors(torch.bfloat16)).operators()
    return tuple(node.args[5:])


def test_order_of_the_casts_is_kept() -> None:
    assert flags(qwen3_next) == ("silu", 1, True, True)
    assert flags(norm_then_gate_in_float32) == ("silu", 1, False, False)
    assert flags(norm_then_sigmoid) == ("sigmoid", 1, False, False)
    assert flags(rounded_norm_then_rounded_gate) == ("silu", 1, False, True)
    assert flags(mamba2_in_groups) == ("silu", 4, True, False)
    assert flags(gate_then_norm_with_the_cast_last) == ("silu", 1, False, False)


def test_float32_weight_beside_bfloat16() -> None:
    x, z, w = tensors(torch.bfloat16)
    for function in (qwen3_next, mamba2_in_groups, norm_then_gate_in_float32):
        captured = capture(function, x, z, w.float())
        assert captured.counts == {"gated_rms_norm": 1}
        assert_same_results(captured)


def test_gate_of_a_packed_projection() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.weight = nn.Linear(D, 2 * D), nn.Parameter(torch.rand(D))

        def forward(self, x: Tensor) -> Tensor:
            z, h = self.project(x).chunk(2, dim=-1)
            return mamba2_in_groups(torch.cumsum(h, 1), z, self.weight)

    captured = capture(Mixer(), tensors()[0], training=True)
    assert captured.counts == {"gated_rms_norm": 1}
    assert_same_results(captured, training=True)


def test_gated_mlp_with_a_norm_of_its_own_stays_one() -> None:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.RMSNorm(D, eps=1e-6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.silu(self.gate(x)) * self.up(x))

    captured = capture(MLP(), tensors()[0])
    assert captured.counts == {"swiglu": 1, "rms_norm": 1}
    assert_same_results(captured)


def product_read_elsewhere(x: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x * F.silu(z)
    return norm(h, w), torch.tanh(h)


def norm_read_elsewhere(x: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = norm(x, w)
    return h * F.silu(z), torch.tanh(h)


def gate_of_the_norm_itself(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = norm(x, w)
    return h * F.silu(h)


def broadcast_gate(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return norm(x, w) * F.silu(z[..., :1])


def gate_and_more(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return norm(x, w) * (1 + F.silu(z))


def residual_between(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return norm(x * F.silu(z) + x, w)


def other_activation(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return norm(x, w) * F.gelu(z)


def regrouped_otherwise(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    h = (x * F.silu(z)).view(2, 3 * D)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        product_read_elsewhere,
        norm_read_elsewhere,
        gate_of_the_norm_itself,
        broadcast_gate,
        gate_and_more,
        residual_between,
        other_activation,
        regrouped_otherwise,
    ],
)
def test_other_neighbours_stay_apart(function: Function) -> None:
    captured = capture(function, *tensors())
    assert "gated_rms_norm" not in captured.counts
    norms = captured.counts.get("rms_norm", 0) + captured.counts.get("add_rms_norm", 0)
    assert norms == 1
    assert_same_results(captured)


def test_gate_that_is_written_to_in_between_stays_apart() -> None:
    def written(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        z = z * 1.0
        h = x * F.silu(z)
        z.zero_()
        return norm(h, w) + z

    captured = capture(written, *tensors())
    assert "gated_rms_norm" not in captured.counts
    assert_same_results(captured)


def test_result_that_stays_wide_takes_the_wide_x() -> None:
    def stays_wide(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        h = x.float() * F.silu(z.float())
        return F.rms_norm(h, (D,), w.float(), 1e-6)

    captured = capture(stays_wide, *tensors(torch.bfloat16))
    assert captured.counts == {"gated_rms_norm": 1}
    assert captured.operators()[0].meta["example_value"].dtype == torch.float32
    assert_same_results(captured)
