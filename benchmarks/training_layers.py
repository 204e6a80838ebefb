"""Training of a few decoder layers of Llama-3.1-8B's shape, without embedding and head: forward and backward.

    python benchmarks/training_layers.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Between the two the layers' activations are kept. A row's note says how many bytes are allocated there on top of what
was before the forward, peak_bytes how many at the worst moment of the step, gradients included. Infuse must need no
more of either than stock. The layers are spelled out here in plain torch, as Hugging Face rounds them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from command import main
from harness import Case, Device, Function, Impl, Inputs, compiled_pairs, eager
from implementations import Later
from model_shapes import SMALL, TINY, Shape, llama_8b
from model_sources import randomise
from norm_functions import hugging_face
from norms import random
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_BASE = 500_000.0


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.attention_norm = nn.Parameter(torch.ones(shape.dim))
        self.mlp_norm = nn.Parameter(torch.ones(shape.dim))
        self.q, self.o = (nn.Linear(shape.dim, shape.dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(shape.dim, shape.kv_dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(shape.dim, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = hugging_face(x, self.attention_norm)
        q = rotate(self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2), cos, sin)
        k = rotate(self.k(y).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), cos, sin)
        v = self.v(y).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        y = hugging_face(x, self.mlp_norm)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layers(nn.Module):
    """The layers and a last norm. cos, sin: [length, head_dim]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.dim))
        half = torch.arange(0, shape.dim // shape.heads, 2) / (shape.dim // shape.heads)
        angles = torch.outer(torch.arange(length), ROPE_BASE**-half).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return hugging_face(x, self.norm)


def forward_of(model: nn.Module) -> Function:
    def layers(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y

    return layers


@dataclass(slots=True)
class Step:
    """Forward and backward: the output and the gradients of the input, of the norms and of some matrices."""

    forward: Function
    model: nn.Module
    kept_bytes: int = 0  # between the two, on top of what there was before

    def __call__(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        self.model.zero_grad(set_to_none=True)
        x = x.detach().requires_grad_()
        before = allocated(x.device)
        y = self.forward(x)
        assert isinstance(y, Tensor)
        self.kept_bytes = allocated(x.device) - before
        y.backward(dy)
        parameters = dict(self.model.named_parameters())
        chosen = [
            p for name, p in parameters.items() if p.dim() == 1 or name in ("layers.0.k.weight", "layers.0.o.weight")
        ]
        found = [x.grad, *(parameter.grad for parameter in chosen)]
        return [y.detach(), *(gradient for gradient in found if gradient is not None)]

    def remark(self) -> str:
        return f"{self.kept_bytes} bytes kept for the backward" if self.kept_bytes else ""


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def case(shape: Shape, length: int, device: Device) -> Case:
    built: list[nn.Module] = []

    def model() -> nn.Module:
        if not built:
            with device.torch_device:
                built.append(randomise(Layers(shape, length), shape.dtype))
        return built[0]

    def inputs(g: torch.Generator) -> Inputs:
        return random(g, shape.dtype, 1, length, shape.dim), random(g, shape.dtype, 1, length, shape.dim)

    def reference(*args: Tensor) -> Any:
        exact = copy.deepcopy(model()).double()
        return Step(forward_of(exact), exact)(*args)

    def training(impl: Impl) -> Impl:
        return replace(impl, prepare=lambda: Step(impl.prepare(), model()))

    forward = Later(lambda: forward_of(model()))
    step = Later(lambda: Step(forward, model()))
    weights = shape.matmul_weights()
    return Case(
        name=f"{shape.name} without head, train {length}",
        inputs=inputs,
        eager=step,
        reference=reference,
        impls=[
            training(impl)
            for impl in (eager(forward, capture=False), *compiled_pairs(forward, ("", None), capture=False))
        ],
        bytes=3 * weights * shape.dtype.itemsize,
        flops=3 * (2 * weights * length + shape.attention_flops(length * length // 2)),
        dtype=shape.dtype,
        sets=2,
        grad=True,
        tolerance_factor=3.0,
    )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    shape, length = (TINY, 32) if quick else (llama_8b(4), 4096) if on_gpu else (SMALL, 128)
    yield case(replace(shape, vocab_size=0), length, device)


if __name__ == "__main__":
    raise SystemExit(main("training_layers", __doc__, cases))
