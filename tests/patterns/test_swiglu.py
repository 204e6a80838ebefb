"""Gated MLP activations: the spellings that are recognised, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, parameters

DIM, HIDDEN = 8, 12
Function = Callable[[Tensor, Tensor], Tensor]


class SeparateLinears(nn.Module):
    def __init__(self, bias: bool = False, up_first: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=bias)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=bias)
        self.act = nn.SiLU()
        self.up_first = up_first

    def forward(self, x: Tensor) -> Tensor:
        if self.up_first:
            return self.w3(x) * self.act(self.w1(x))
        return self.act(self.w1(x)) * self.w3(x)


class Packed(nn.Module):
    """One linear for gate and up. part: how its result is taken apart."""

    def __init__(self, part: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.w13 = nn.Linear(DIM, 2 * HIDDEN, bias=False)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.part(self.w13(x))
        return F.silu(gate) * up


def chunks(y: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = y.chunk(2, dim=-1)
    return gate, up


def chunks_gate_second(y: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = torch.chunk(y, 2, -1)
    return gate, up


def splits(y: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = torch.split(y, [HIDDEN, HIDDEN], dim=-1)
    return gate, up


def slices(y: Tensor) -> tuple[Tensor, Tensor]:
    return y[..., :HIDDEN], y[..., HIDDEN:]


def interleaved(y: Tensor) -> tuple[Tensor, Tensor]:
    return y[..., ::2], y[..., 1::2]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(
    ("module", "spelling"),
    [
        (SeparateLinears(), "separate linears, silu, act * up"),
        (SeparateLinears(bias=True), "separate linears with bias, silu, act * up"),
        (SeparateLinears(up_first=True), "separate linears, silu, up * act"),
        (Packed(chunks), "packed linear, gate first, silu, act * up"),
        (Packed(chunks_gate_second), "packed linear, gate second, silu, act * up"),
        (Packed(splits), "packed linear, gate first, silu, act * up"),
        (Packed(slices), "packed linear, gate first, silu, act * up"),
        (Packed(interleaved), "packed linear, gate first, silu, act * up"),
    ],
)
def test_module_becomes_one_operator(
    module: nn.Module, spelling: str, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    module = parameters(module, dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module, x, training=training, dynamic=dynamic)
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings == [spelling]
    assert "silu" not in captured.targets()
    assert_same_results(captured, training)


def x_sigmoid_x(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def sigmoid_method(gate: Tensor, up: Tensor) -> Tensor:
    return up * (gate.sigmoid() * gate)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("function", [x_sigmoid_x, sigmoid_method])
def test_x_times_sigmoid_of_x(function: Function, training: bool) -> None:
    captured = capture(function, *pair(requires_grad=training), training=training)
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured, training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_sigmoid_is_refused_under_exact_numerics_only(dtype: torch.dtype) -> None:
    assert capture(x_sigmoid_x, *pair(dtype)).counts == {"swiglu": 1}
    captured = capture(x_sigmoid_x, *pair(dtype), settings=Settings(numerics="exact"))
    assert captured.counts == {}
    assert "sigmoid is rounded" in captured.refusals[0]


def silu_in_float32(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.float()).to(gate.dtype) * up


def test_silu_in_float32_of_a_half_is_the_same_as_silu() -> None:
    captured = capture(silu_in_float32, *pair(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"swiglu": 1}
    assert captured.operators()[0].args[0].op == "placeholder"  # type: ignore[union-attr]
    assert torch.equal(captured.original(*captured.inputs)[0], captured.rewritten(*captured.inputs)[0])


def pair(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    """gate and up [2, 3, HIDDEN]"""
    gate, up = torch.randn(2, 3, HIDDEN, dtype=dtype), torch.randn(2, 3, HIDDEN, dtype=dtype)
    return gate.requires_grad_(requires_grad), up.requires_grad_(requires_grad)


def test_silu_is_exact_where_it_is_literal() -> None:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    captured = capture(gated, *pair(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"swiglu": 1}


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) + up


def scaled(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * 2.0


def scaled_by_a_vector(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up[0, 0]


def squared(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).square() * up


def multiplied_by_itself(gate: Tensor, up: Tensor) -> Tensor:
    a = F.silu(gate)
    return a * a


def gate_is_its_own_factor(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * gate


def plain_swish(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.3 * gate) + up


def sigmoid_of_no_projection(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate) * up


def relu_of_no_projection(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate) * up


def broadcasting(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up[:, :1]


def broadcasting_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate[:, :1]) * up


@pytest.mark.parametrize(
    "function",
    [
        plain,
        scaled,
        scaled_by_a_vector,
        squared,
        multiplied_by_itself,
        gate_is_its_own_factor,
        plain_swish,
        sigmoid_of_no_projection,
        relu_of_no_projection,
        broadcasting,
        broadcasting_gate,
    ],
)
def test_other_activations_are_no_sites(function: Function) -> None:
    assert capture(function, *pair()).records == []


def silu_in_place(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate + 0, inplace=True) * up


def activation_returned(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    a = F.silu(gate)
    return a * up, a


def activation_read_twice(gate: Tensor, up: Tensor) -> Tensor:
    a = F.silu(gate)
    return a * up + a


def in_place_multiply(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def in_place_operator(gate: Tensor, up: Tensor) -> Tensor:
    a = F.gelu(gate)
    a *= up
    return a


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (silu_in_place, "in place"),
        (activation_returned, "read elsewhere"),
        (activation_read_twice, "read elsewhere"),
    ],
)
def test_near_miss_is_refused_with_a_reason(function: Function, word: str) -> None:
    captured = capture(function, *pair())
    assert captured.counts == {}
    assert [word in reason for reason in captured.refusals] == [True]
    assert captured.records[0].remedy


@pytest.mark.parametrize("function", [in_place_multiply, in_place_operator])
def test_product_in_place_is_read_as_a_new_value(function: Function) -> None:
    captured = capture(function, *pair())
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured)


def cast_between(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).to(torch.float16) * up


@pytest.mark.parametrize("up_dtype", [torch.float32, torch.bfloat16])
def test_narrowing_cast_between_silu_and_multiply_is_refused(up_dtype: torch.dtype) -> None:
    gate, up = pair()
    captured = capture(cast_between, gate, up.to(up_dtype))
    assert captured.counts == {}
    assert "differ in dtype" in captured.refusals[0]


def widened_activation(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).float() * up


def promoted(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("function", [widened_activation, promoted])
def test_gate_in_a_narrower_dtype_than_the_other_factor(function: Function, training: bool) -> None:
    gate, up = pair(requires_grad=training)
    gate = gate.detach().bfloat16().requires_grad_(training)
    captured = capture(function, gate, up, training=training)
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured, training)
    assert "rounded" in capture(function, gate, up, settings=Settings(numerics="exact")).refusals[0]


def test_other_factor_in_a_narrower_dtype_than_the_gate() -> None:
    gate, up = pair()
    captured = capture(promoted, gate, up.bfloat16(), settings=Settings(numerics="exact"))
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured)


def float32_throughout(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def test_gate_in_float32_keeps_its_casts() -> None:
    captured = capture(float32_throughout, *pair(torch.bfloat16, True), training=True)
    assert captured.counts == {"swiglu": 1}
    assert captured.targets() >= {"float", "to"}
    assert_same_results(captured, training=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim", [None, -1, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_glu(dim: int | None, dtype: torch.dtype, training: bool) -> None:
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=training)
    glu = nn.GLU() if dim is None else nn.GLU(dim)
    captured = capture(glu, x, training=training, settings=Settings(numerics="exact"))
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings == ["packed tensor, gate second, glu"]
    assert "glu" not in captured.targets()
    assert_same_results(captured, training)


def test_glu_of_symbolic_sizes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(DIM, 2 * HIDDEN, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.glu(self.conv(x), dim=1)

    captured = capture(Model(), torch.randn(2, DIM, 5, requires_grad=True), dynamic=True, training=True)
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings == ["packed convolution, gate second, glu"]
    assert_same_results(captured, training=True)
