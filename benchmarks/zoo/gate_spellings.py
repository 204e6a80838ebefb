"""Gated units in the spellings that people write them in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, Register


class _Gated(nn.Module):
    """Two projections, a core, a third."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48, bias=False), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.core(self.gate(x), self.up(x)))  # type: ignore[operator]
        return result


class _PackedGate(nn.Module):
    """One projection, a core that divides it, another projection."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core
        self.packed, self.down = nn.Linear(DIM, 96), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.core(self.packed(x)))  # type: ignore[operator]
        return result


_gate, _packed = Register("gate", _Gated), Register("gate", _PackedGate)


def entries() -> list[Entry]:
    return [*_gate.entries, *_packed.entries]


# gates


@_gate.add(swiglu=1)
def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@_gate.add(swiglu=1)
def up_times_silu(gate: Tensor, up: Tensor) -> Tensor:
    return up * nn.SiLU()(gate)


@_gate.add(swiglu=1)
def silu_of_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


@_gate.add(swiglu=1)
def silu_in_float(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.float()).to(gate.dtype) * up


@_gate.add(swiglu=1)
def product_in_float(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@_gate.add(swiglu=1)
def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@_gate.add(swiglu=1)
def gelu_erf(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.gelu(gate)


@_gate.add(swiglu=1)
def gelu_new(gate: Tensor, up: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


@_gate.add(swiglu=1)
def gelu_of_erf(gate: Tensor, up: Tensor) -> Tensor:
    return gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0))) * up


@_gate.add(swiglu=1)
def quick_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate) * up


@_gate.add(swiglu=1)
def sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate) * up


@_gate.add(swiglu=1)
def relu(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate) * up


@_gate.add(swiglu=1)
def relu_squared(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate).square() * up


@_gate.add(swiglu=1)
def tanh(gate: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(gate) * up


@_gate.add(swiglu=1)
def mish(gate: Tensor, up: Tensor) -> Tensor:
    return F.mish(gate) * up


@_gate.add(swiglu=1)
def sigmoid_by_silu(gate: Tensor, up: Tensor) -> Tensor:
    """A gate over an activated branch."""
    return torch.sigmoid(gate) * F.silu(up)


@_gate.add(swiglu=1)
def residual(gate: Tensor, up: Tensor) -> Tensor:
    return up + torch.sigmoid(gate) * up.sin()


@_gate.add(swiglu=1, rms_norm=1)
def norm_of_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.rms_norm(F.silu(gate) * up, (48,))


@_gate.add(swiglu=1)
def clamped_oai(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss: clamped, and one is added to the other branch."""
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@_packed.add(swiglu=1)
def chunked(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


@_packed.add(swiglu=1)
def chunked_gate_second(y: Tensor) -> Tensor:
    up, gate = y.chunk(2, dim=-1)
    return up * F.gelu(gate)


@_packed.add(swiglu=1)
def split_by_size(y: Tensor) -> Tensor:
    gate, up = torch.split(y, 48, dim=-1)
    return up * F.silu(gate)


@_packed.add(swiglu=1)
def sliced(y: Tensor) -> Tensor:
    half = y.shape[-1] // 2
    return F.silu(y[..., :half]) * y[..., half:]


@_packed.add(swiglu=1)
def interleaved(y: Tensor) -> Tensor:
    return F.silu(y[..., ::2]) * y[..., 1::2]


@_packed.add(swiglu=1)
def reshaped(y: Tensor) -> Tensor:
    gate, up = y.unflatten(-1, (2, 48)).unbind(-2)
    return F.silu(gate) * up


@_packed.add(swiglu=1)
def glu_call(y: Tensor) -> Tensor:
    return F.glu(y, dim=-1)


@_gate.add(wrap=False, swiglu=1)
class ExpertsInOneProduct(nn.Module):
    """Every expert sees every token: batched products and a gate, then a router's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.gate_up = nn.Parameter(torch.randn(4, DIM, 32) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 16, DIM) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        gate, up = torch.bmm(flat.expand(4, -1, -1), self.gate_up).chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), self.down)
        weights = self.router(flat).softmax(-1)
        return (out * weights.t()[:, :, None]).sum(0).view_as(x)


@_gate.add(wrap=False, swiglu=1)
class LowRankUpdates(nn.Module):
    """LoRA beside both projections."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)
        self.a, self.b = nn.Linear(DIM, 4, bias=False), nn.Linear(4, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x) + 2.0 * self.b(self.a(x))
        return self.down(F.silu(gate) * self.up(x))
