"""One small case of every component: how it is made, what it takes, and the sites that it has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infuse.models.mahia import (
    DynamicNeuroFabric,
    FusionLayer,
    GraphDiffusionMemory,
    HybridEfficientModel,
    HyenaBlock,
    MetaAttentionKernel,
    SparseMoETopK,
    TabularEncoder,
    TextEncoder,
)
from tests.tolerances import assert_close_to_fp64

DIM, LENGTH, VOCAB = 16, 9, 20


@dataclass(frozen=True)
class Case:
    """shapes: of the inputs; an empty one stands for tokens. sites: what Infuse rewrites, in every mode.

    unread: parameters that the forward does not read.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    sites: Mapping[str, int]
    unread: tuple[str, ...] = ()

    def module(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        module = self.make().to(dtype)
        for memory in module.modules():
            if isinstance(memory, GraphDiffusionMemory):  # a cache that holds something
                memory.store(memory.write(torch.randn(3, DIM, dtype=dtype)))
        return module

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Those that the forward reads."""
        return {name: parameter for name, parameter in module.named_parameters() if name not in self.unread}

    def inputs(self, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)
            if shape
            else torch.randint(VOCAB, (2, LENGTH), generator=generator)
            for shape in self.shapes
        )


class DiffusedMemory(nn.Module):
    """Reads a memory as it is after two steps of diffusion and a write, all in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = GraphDiffusionMemory(DIM, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.memory(x, self.memory.write(x, self.memory.diffuse(steps=2)))
        return out


# The components that the others are made of: these are compiled for real.
COMPILED = ("attention", "memory and its steps", "fabric", "experts", "hyena", "fusion")


class Together(nn.Module):
    """Several cases side by side in one graph, so that one compilation serves all."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(case.module() for case in cases)

    def forward(self, inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        return [part(*values) for part, values in zip(self.parts, inputs)]


SEQUENCE, ROWS = (2, LENGTH, DIM), (5, DIM)
CASES = {
    "attention": Case(lambda: MetaAttentionKernel(DIM, num_heads=2), (SEQUENCE,), {"rms_norm": 1, "attention": 1}),
    "attention without Fourier features": Case(
        lambda: MetaAttentionKernel(DIM, use_fourier=False), (SEQUENCE,), {"rms_norm": 1, "attention": 1}
    ),
    "memory of rows": Case(lambda: GraphDiffusionMemory(DIM, 6), (ROWS,), {"attention": 2}, ("adjacency",)),
    "memory of sequences": Case(lambda: GraphDiffusionMemory(DIM, 6), (SEQUENCE,), {"attention": 2}, ("adjacency",)),
    "memory and its steps": Case(DiffusedMemory, (SEQUENCE,), {"attention": 2}),
    "fabric": Case(lambda: DynamicNeuroFabric(DIM, 3), (SEQUENCE,), {"rms_norm": 1, "add_rms_norm": 2, "swiglu": 3}),
    "experts": Case(lambda: SparseMoETopK(DIM, 4, 2), (SEQUENCE,), {"swiglu": 1}),
    "hyena": Case(lambda: HyenaBlock(DIM, 5), (SEQUENCE,), {"rms_norm": 1, "swiglu": 1}),
    "hyena with attention": Case(
        lambda: HyenaBlock(DIM, 5, use_attention=True),
        (SEQUENCE,),
        {"rms_norm": 1, "swiglu": 1, "add_rms_norm": 1, "attention": 1},
    ),
    "fusion": Case(lambda: FusionLayer(DIM), (ROWS, ROWS), {"swiglu": 1}),
    "text encoder": Case(
        lambda: TextEncoder(VOCAB, LENGTH, DIM, kernel_size=5),
        ((),),
        {"rms_norm": 1, "swiglu": 1, "add_rms_norm": 2, "attention": 1},
    ),
    "tabular encoder": Case(lambda: TabularEncoder(7, DIM), ((5, 7),), {"rms_norm": 1, "swiglu": 1, "add_rms_norm": 1}),
    "hybrid": Case(
        lambda: HybridEfficientModel(VOCAB, LENGTH, 7, DIM, num_classes=3, memory_size=6, kernel_size=5),
        ((), (2, 7)),
        {"rms_norm": 2, "swiglu": 6, "add_rms_norm": 6, "attention": 3},
    ),
}


def widened(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for value in values
    )


def results(parts: nn.ModuleList, outs: list[Tensor], inputs: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The COMPILED cases' outputs, and the gradients of weighted sums of them for floating-point inputs, parameters."""
    wanted, total = {}, torch.zeros((), dtype=torch.float64, device=outs[0].device)
    for name, module, out, values in zip(COMPILED, parts, outs, inputs, strict=True):
        total = (
            total
            + (out.double() * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device)).sum()
        )
        wanted |= {f"{name}: input {index}": value for index, value in enumerate(values) if value.requires_grad}
        wanted |= {f"{name}: {key}": parameter for key, parameter in CASES[name].parameters(module).items()}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return {**dict(zip(COMPILED, outs)), **dict(zip(wanted, grads))}


def assert_compiled_trains_right(model: Together, inputs: list[tuple[Tensor, ...]], **bounds: float) -> None:
    """Outputs and gradients of all parts, compiled with Infuse, as near to float64 as eager's. bounds: of the check."""
    wide, wide_inputs = copy.deepcopy(model).double(), [widened(values) for values in inputs]
    exact = results(wide.parts, wide(wide_inputs), wide_inputs)
    eager = results(model.parts, model(inputs), inputs)
    compiled = torch.compile(model, backend="infuse", fullgraph=True)
    for name, got in results(model.parts, compiled(inputs), inputs).items():
        try:
            assert_close_to_fp64(got, eager[name], exact[name], **bounds)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
