"""Activations of gated MLPs: by name and written out, in any order of their factors, and what only looks alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, parameters

DIM, HIDDEN = 8, 12
Activation = Callable[[Tensor], Tensor]


def hugging_face_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def fast_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def megatron_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def halved_last_tanh(x: Tensor) -> Tensor:
    return x * ((torch.tanh((x**3 * 0.044715 + x) * math.sqrt(2 / math.pi)) + 1) / 2)


def tanh_in_float32(x: Tensor) -> Tensor:
    return hugging_face_tanh(x.float()).type_as(x)


def python_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def cdf_first_erf(x: Tensor) -> Tensor:
    cdf = 0.5 * (torch.special.erf(x * 2**-0.5) + 1)
    return cdf * x


def erf_in_float32(x: Tensor) -> Tensor:
    return python_erf(x.float()).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def relu_power(x: Tensor) -> Tensor:
    return x.relu() ** 2


def relu_times_itself(x: Tensor) -> Tensor:
    relu = torch.relu(x)
    return relu * relu


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def scaled_swish(x: Tensor) -> Tensor:
    return torch.sigmoid(x * 1.3) * x


def quick_gelu_in_float32(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


ACTIVATIONS: list[tuple[Activation, str]] = [
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu_erf"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.ReLU(), "relu"),
    (nn.Tanh(), "tanh"),
    (nn.Mish(), "mish"),
    (torch.special.expit, "sigmoid"),
    (hugging_face_tanh, "gelu_tanh"),
    (fast_tanh, "gelu_tanh"),
    (megatron_tanh, "gelu_tanh"),
    (halved_last_tanh, "gelu_tanh"),
    (tanh_in_float32, "gelu_tanh"),
    (python_erf, "gelu_erf"),
    (cdf_first_erf, "gelu_erf"),
    (erf_in_float32, "gelu_erf"),
    (squared_relu, "relu_squared"),
    (relu_power, "relu_squared"),
    (relu_times_itself, "relu_squared"),
    (quick_gelu, "quick_gelu"),
    (scaled_swish, "quick_gelu"),
    (quick_gelu_in_float32, "quick_gelu"),
]


class GatedMLP(nn.Module):
    def __init__(self, activation: Activation, up_first: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.up_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False)
        self.activation = activation
        self.up_first = up_first

    def forward(self, x: Tensor) -> Tensor:
        if self.up_first:
            return self.down_proj(self.up_proj(x) * self.activation(self.gate_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS)
def test_gated_mlp_with_any_activation(
    activation: Activation, name: str, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    module = parameters(GatedMLP(activation, up_first=training), dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module, x, training=training, dynamic=dynamic)
    assert captured.counts == {"swiglu": 1}
    assert captured.operators()[0].args[2] == name
    assert not captured.targets() & {"tanh", "erf", "sigmoid", "gelu", "relu", "silu", "pow", "square"}
    assert_same_results(captured, training)


@pytest.mark.parametrize("activation", [hugging_face_tanh, python_erf, quick_gelu])
def test_written_out_activation_is_refused_under_exact_numerics(activation: Activation) -> None:
    captured = capture(GatedMLP(activation), torch.randn(2, DIM), settings=Settings(numerics="exact"))
    assert captured.counts == {}
    assert "rounded before it is multiplied" in captured.refusals[0]


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), squared_relu, nn.ReLU()])
def test_named_activation_is_exact(activation: Activation) -> None:
    module = parameters(GatedMLP(activation), torch.bfloat16)
    x = torch.randn(2, DIM, dtype=torch.bfloat16)
    captured = capture(module, x, settings=Settings(numerics="exact"))
    assert captured.counts == {"swiglu": 1}
    assert torch.equal(captured.original(*captured.inputs)[0], captured.rewritten(*captured.inputs)[0])


def other_kappa(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.04471 * torch.pow(x, 3.0))))


def other_scale(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7979 * (x + 0.044715 * torch.pow(x, 3.0))))


def no_half(x: Tensor) -> Tensor:
    return x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def minus_one(x: Tensor) -> Tensor:
    return 0.5 * x * (torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))) - 1)


def square_for_cube(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 2.0))))


def erf_unscaled(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x))


def laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def erf_of_another(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf((x + 1) / math.sqrt(2.0)))


def relu_cubed(x: Tensor) -> Tensor:
    return F.relu(x) ** 3


def relu_rounded_then_squared(x: Tensor) -> Tensor:
    return F.relu(x).to(torch.bfloat16).float() ** 2


@pytest.mark.parametrize(
    "activation",
    [
        *(other_kappa, other_scale, no_half, minus_one, square_for_cube),
        *(erf_unscaled, laplace, erf_of_another, relu_cubed, relu_rounded_then_squared),
    ],
)
def test_other_formulas_are_no_sites(activation: Activation) -> None:
    assert capture(GatedMLP(activation), torch.randn(2, DIM)).records == []


def sigmoid_of_a_shifted_x(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x + 1)


def silu_of_twice_x(x: Tensor) -> Tensor:
    return F.silu(2 * x)


def test_sigmoid_of_something_near_x_is_a_gate_by_another_tensor() -> None:
    """x * sigmoid(x + 1) is no activation of x; x + 1 gates x, which is what the operator says."""
    captured = capture(GatedMLP(sigmoid_of_a_shifted_x), torch.randn(2, DIM))
    assert [node.args[2] for node in captured.operators()] == ["sigmoid"]
    assert_same_results(captured)


def test_scaled_gate_stays_scaled() -> None:
    captured = capture(GatedMLP(silu_of_twice_x), torch.randn(2, DIM))
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured)


class ClampedExperts(nn.Module):
    """gpt-oss: interleaved gate and up of each expert, clamped, with a slope of its own."""

    def __init__(self, order: str = "up first") -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2, DIM, 2 * HIDDEN))
        self.bias = nn.Parameter(torch.randn(2, 2 * HIDDEN))
        self.alpha, self.limit = 1.702, 0.5
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        gate_up = torch.bmm(x, self.gate_up) + self.bias[..., None, :]
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        glu = gate * torch.sigmoid(gate * self.alpha)
        return (up + 1) * glu if self.order == "up first" else glu * (1 + up)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("order", ["up first", "glu first"])
def test_clamped_and_interleaved_experts(order: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = parameters(ClampedExperts(order), dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module, x, training=training, dynamic=dynamic)
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings[0].startswith("packed matmul, gate first, x * sigmoid(alpha * x), ")
    assert captured.spellings[0].endswith(", clamped")
    assert "clamp" not in captured.targets() and "sigmoid" not in captured.targets()
    assert_same_results(captured, training)


def limits_differ(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.25, 0.5)


def gate_has_a_lower_limit(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(-0.5, 0.5)) * up.clamp(-0.5, 0.5)


def one_is_clamped(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate.clamp(max=0.5)) * (up + 1)


def limit_above_and_below_another(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.75)


def added_tensor(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=0.5)) * (up.clamp(-0.5, 0.5) + gate)


@pytest.mark.parametrize(
    "function", [limits_differ, gate_has_a_lower_limit, one_is_clamped, limit_above_and_below_another, added_tensor]
)
def test_clamps_that_are_not_one_limit_stay_in_front(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    gate, up = (torch.randn(2, 3, HIDDEN, requires_grad=True) for _ in range(2))
    captured = capture(function, gate, up, training=True)
    assert captured.counts == {"swiglu": 1}
    assert "clamp" in captured.targets()
    assert_same_results(captured, training=True)


def test_limit_beside_a_named_activation() -> None:
    def limited(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)

    gate, up = (torch.randn(2, 3, HIDDEN, requires_grad=True) for _ in range(2))
    captured = capture(limited, gate, up, training=True)
    assert "clamp" not in captured.targets()
    assert_same_results(captured, training=True)
