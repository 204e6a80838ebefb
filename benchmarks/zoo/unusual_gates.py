"""Gated units as research code spells them now and then, and what only resembles them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import DIM, Plain, Register, image


class _Widened(nn.Module):
    """One projection to twice the width, a core that divides it, another projection."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core, self.wide, self.narrow = core, nn.Linear(DIM, 96, bias=False), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.narrow(self.core(self.wide(x)))  # type: ignore[operator]
        return result


class _TwoProjections(nn.Module):
    def __init__(self, core: object) -> None:
        super().__init__()
        self.core, self.a, self.b, self.c = core, nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.core(self.a(x), self.b(x)))  # type: ignore[operator]
        return result


_packed = Register("unusual", _Widened)
_gate = Register("unusual", _TwoProjections)
_plain = Register("unusual", Plain)


def entries() -> list[Entry]:
    return [*_packed.entries, *_gate.entries, *_plain.entries]


@_packed.add(swiglu=1)
def unflattened(x: Tensor) -> Tensor:
    gate, up = x.unflatten(-1, (2, -1)).unbind(-2)
    return F.silu(gate) * up


@_packed.add(swiglu=1)
def viewed_and_indexed(x: Tensor) -> Tensor:
    halves = x.view(*x.shape[:-1], 2, x.shape[-1] // 2)
    return halves[..., 1, :] * F.gelu(halves[..., 0, :])


@_packed.add(swiglu=1)
def narrowed(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x.narrow(-1, half, half) * torch.sigmoid(x.narrow(-1, 0, half))


@_packed.add(swiglu=1)
def tensor_split(x: Tensor) -> Tensor:
    a, b = torch.tensor_split(x, 2, dim=-1)
    return F.relu(a).pow(2) * b


@_packed.add(swiglu=1)
def activation_in_place(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    a = F.silu(a.clone(), inplace=True)
    return a.mul_(b)


@_packed.add(swiglu=1)
def written_out(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a / (1 + torch.exp(-a)) * b


@_packed.add(swiglu=1)
def glu_of_swapped_halves(x: Tensor) -> Tensor:
    return F.glu(torch.cat(x.chunk(2, -1)[::-1], dim=-1), dim=-1)


@_packed.add()
def bilinear(x: Tensor) -> Tensor:
    """No activation."""
    a, b = x.chunk(2, dim=-1)
    return a * b


@_gate.add(swiglu=1)
def erf_written_out(a: Tensor, b: Tensor) -> Tensor:
    return b * (0.5 * a * (1.0 + torch.erf(a / math.sqrt(2.0))))


@_gate.add(swiglu=1)
def laplace_of_float(a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(a.float()) * b.float()).to(a.dtype)


@_gate.add(swiglu=1)
def scaled_and_limited(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.clamp(max=7.0), b.clamp(min=-7.0, max=7.0)
    return (b + 1) * (a * torch.sigmoid(1.702 * a))


@_gate.add(swiglu=1)
def residual_between(a: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(a) * b + b


@_gate.add()
def highway(a: Tensor, b: Tensor) -> Tensor:
    """Carry and transform gates of one sigmoid: a mixture of two values, and no gated MLP."""
    t = torch.sigmoid(a)
    return t * b + (1 - t)


@_gate.add(swiglu=1)
def torch_calls(a: Tensor, b: Tensor) -> Tensor:
    return torch.multiply(torch.nn.functional.hardswish(a), b)


@_gate.add()
def sum_of_activations(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) + F.silu(b)


@_plain.add(inputs=image, swiglu=1)
class ChannelGate(nn.Module):
    """A 1 x 1 convolution's halves along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in, self.project_out = nn.Conv2d(DIM, 2 * DIM, 1, bias=False), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.project_in(x).chunk(2, dim=1)
        return self.project_out(F.gelu(x1) * x2)
