"""The cases of MAHIA-X: each component by itself and the classifier made of them, in inference and in training.

On a GPU 65,536 rows of 1,024 features in bf16. Most of the work is in matrix products, which fusing does not shorten;
`percent_of_limit` is of the time that those alone take at the vendor library's rate.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, Device, Function, Impl, Inputs, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, Later
from torch import Tensor, nn

from infuse.models import mahia

_VOCAB, _TAB_DIM, _CLASSES = 256, 32, 10
_NOT_MULTIPLIED = ("adjacency", "tokens.weight", "positions")


@dataclass(frozen=True, slots=True)
class Component:
    """A module of `dim` features on `batch` sequences of `length` rows.

    views: inputs of that shape; 0: tokens and features, of which the module makes one answer a sequence.
    by_sequence: sequences don't mix, so that the reference takes one at a time.
    """

    name: str
    make: Callable[[int, int], nn.Module]  # of dim and length
    batch: int
    length: int
    dim: int
    dtype: torch.dtype
    views: int = 1
    by_sequence: bool = True

    def inputs(self, g: torch.Generator) -> Inputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=g.device).to(self.dtype)

        if not self.views:
            tokens = torch.randint(_VOCAB, (self.batch, self.length), generator=g, device=g.device)
            return tokens, random(self.batch, _TAB_DIM)
        return tuple(random(self.batch, self.length, self.dim) for _ in range(self.views))

    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.dim) if self.views else (self.batch, _CLASSES)

    def module(self, device: torch.device) -> nn.Module:
        with device:
            torch.manual_seed(0)
            module = self.make(self.dim, self.length).to(self.dtype)
        for part in module.modules():
            if isinstance(part, nn.RMSNorm):  # as trained: around one, not one
                nn.init.normal_(part.weight, 1.0, 0.2)
            if isinstance(part, mahia.GraphDiffusionMemory):  # a cache that is full
                nn.init.normal_(part.cache, std=self.dim**-0.5)
        return module

    def flops(self, module: nn.Module) -> int:
        """Of the matrix products and convolutions of one forward. The classifier's few last rows are not counted."""
        parts = module.text if isinstance(module, mahia.HybridEfficientModel) else module
        layers = [part for part in parts.modules() if isinstance(part, mahia.MetaAttentionKernel)]
        attention = 4 * len(layers) * self.batch * self.length**2 * self.dim
        elements = sum(_elements(part) for part in parts.modules())
        if isinstance(module, mahia.HybridEfficientModel):
            elements += _elements(module.experts)
        return 2 * self.batch * self.length * elements + attention


def _elements(module: nn.Module) -> int:
    """Elements of the module's own weights that each row is multiplied with."""
    weights = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() > 1}
    if isinstance(module, mahia.SparseMoETopK):
        return sum(weight.numel() for weight in weights.values()) * module.top_k // module.num_experts
    if isinstance(module, mahia.GraphDiffusionMemory):  # scores and sums, of nodes and cache
        return 2 * (module.nodes.numel() + module.cache.numel())
    if isinstance(module, nn.Embedding):
        return 0
    return sum(weight.numel() for name, weight in weights.items() if name not in _NOT_MULTIPLIED)


@dataclass(slots=True)
class Step:
    """Forward and backward: the output and the gradients of all inputs and parameters that have one."""

    forward: Function
    module: nn.Module

    def __call__(self, *args: Tensor) -> list[Tensor]:
        inputs, dy = _leaves(args[:-1]), args[-1]
        self.module.zero_grad(set_to_none=True)
        y = self.forward(*inputs)
        assert isinstance(y, Tensor)
        y.backward(dy)
        leaves = [*inputs, *self.module.parameters()]
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def saved(self, *args: Tensor) -> tuple[int, int]:
        """Bytes that the forward leaves allocated for the backward, the output not among them, and no gradients."""
        inputs, device = _leaves(args[:-1]), args[0].device
        self.module.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        y = self.forward(*inputs)
        assert isinstance(y, Tensor)
        return max(torch.cuda.memory_allocated(device) - before - y.untyped_storage().nbytes(), 0), 0


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs as tensors of their own that gradients are taken for, where they can have one."""
    return [value.detach().requires_grad_(value.is_floating_point()) for value in inputs]


class Built:
    """A component's module, made when it is first needed, and the functions around it."""

    def __init__(self, component: Component, device: Device) -> None:
        self.component = component
        self.device = device
        self._module: nn.Module | None = None

    def get(self) -> nn.Module:
        if self._module is None:
            self._module = self.component.module(self.device.torch_device)
        return self._module

    def forward(self) -> Function:
        module = self.get()

        def forward(*args: Tensor) -> Tensor:
            y: Tensor = module(*args)
            return y

        return forward

    def reference(self, train: bool) -> Function:
        """In fp64, where it can be one sequence after the other, whose gradients add up."""

        def answer(*args: Tensor) -> list[Tensor]:
            exact = copy.deepcopy(self.get()).double()
            parts = zip(*(value.split(1) for value in args)) if self.component.by_sequence else [args]
            results = [self._exact(exact, train, *part) for part in parts]
            outputs = [torch.cat(values) for values in zip(*results)]
            gradients = [p.grad for p in exact.parameters() if p.grad is not None]
            return [*outputs, *gradients]

        return answer

    def _exact(self, module: nn.Module, train: bool, *args: Tensor) -> list[Tensor]:
        """The output, in training followed by the gradients of floating-point inputs; the parameters' are added up."""
        if not train:
            return [module(*args)]
        inputs = _leaves(args[:-1])
        y = module(*inputs)
        y.backward(args[-1])
        return [y.detach(), *(value.grad for value in inputs if value.grad is not None)]


def case(component: Component, device: Device, *, train: bool, modes: Sequence[tuple[str, str | None]]) -> Case:
    built = Built(component, device)
    with torch.device("meta"):
        shapes = component.make(component.dim, component.length)
    forward = Later(built.forward)
    step = Later(lambda: Step(forward, built.get()))

    def inputs(g: torch.Generator) -> Inputs:
        made = component.inputs(g)
        if not train:
            return made
        return *made, torch.randn(component.output_shape(), generator=g, device=g.device).to(component.dtype)

    def training(impl: Impl) -> Impl:
        return dataclasses.replace(impl, prepare=lambda: Step(impl.prepare(), built.get()))

    impls = [eager(forward, capture=False), *compiled_pairs(forward, *modes, capture=False)]
    elements = math.prod(component.output_shape()) + sum(p.numel() for p in shapes.parameters())
    elements += component.views * component.batch * component.length * component.dim
    sizes = f"{component.batch}x{component.length}x{component.dim}"
    return Case(
        name=f"mahia {component.name} {sizes}{' train' if train else ''}",
        inputs=inputs,
        eager=step if train else forward,
        reference=built.reference(train),
        impls=[training(impl) for impl in impls] if train else impls,
        bytes=(2 if train else 1) * elements * component.dtype.itemsize,
        flops=(3 if train else 1) * component.flops(shapes),
        dtype=component.dtype,
        sets=2,
        calls=4 if train else 8,  # what the host does before the first one is hidden, as in a loop
        grad=train,
        tolerance_factor=3.0,
    )


def components(batch: int, length: int, dim: int, dtype: torch.dtype) -> list[Component]:
    """Each with its default settings. The classifier's texts are a quarter as long and four times as many."""

    def one(name: str, make: Callable[[int, int], nn.Module], **settings: Any) -> Component:
        return Component(name, make, batch, length, dim, dtype, **settings)

    def classifier(dim: int, length: int) -> nn.Module:
        return mahia.HybridEfficientModel(_VOCAB, length, _TAB_DIM, dim, num_classes=_CLASSES)

    whole = one("classifier", classifier, views=0, by_sequence=False)
    return [
        one("attention", lambda dim, length: mahia.MetaAttentionKernel(dim)),
        one("memory", lambda dim, length: mahia.GraphDiffusionMemory(dim)),
        one("experts", lambda dim, length: mahia.SparseMoETopK(dim), by_sequence=False),
        one("hyena", lambda dim, length: mahia.HyenaBlock(dim)),
        one("fusion", lambda dim, length: mahia.FusionLayer(dim), views=2),
        dataclasses.replace(whole, batch=4 * batch, length=max(length // 4, 1)),
        one("fabric", lambda dim, length: mahia.DynamicNeuroFabric(dim)),
    ]


def cases(device: Device, quick: bool) -> Iterator[Case]:
    modes: Sequence[tuple[str, str | None]] = (("", None),)
    if quick:
        every = components(2, 8, 32, torch.float32)
    elif device.type == "cpu":
        every = components(2, 128, 128, torch.float32)
    else:
        every = components(16, 4096, 1024, torch.bfloat16)
        modes = (*modes, ("-max-autotune", NO_CUDAGRAPHS))
    for component in every:
        yield case(component, device, train=False, modes=modes)
        yield case(component, device, train=True, modes=modes)


if __name__ == "__main__":
    from command import main

    raise SystemExit(main("mahia", __doc__, cases))
