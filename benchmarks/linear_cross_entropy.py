"""The loss of a language model's head, rows x hidden x vocabulary, with its gradients: time and peak memory.

    python benchmarks/linear_cross_entropy.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

A step returns the loss and the gradients of the hidden states and the weight. Its floor is arithmetic: three products.
peak_bytes is what a step takes beyond its inputs, those three results among it. The loss is written as models write it:
of the logits as they are or in float32, flattened, and shifted by slicing them, which many training scripts do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from command import main
from harness import Case, Device, Function, Impl, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, optional
from norms import random
from torch import Tensor

MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    batch: int
    tokens: int
    dim: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.batch * self.tokens}x{self.dim}x{self.vocab}"

    @property
    def product(self) -> int:
        """Multiplications and additions of one product."""
        return 2 * self.batch * self.tokens * self.dim * self.vocab

    def inputs(self, g: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Hidden states, weight and targets, one in 17 of which is ignored."""
        x = random(g, dtype, self.batch, self.tokens, self.dim)
        weight = random(g, dtype, self.vocab, self.dim) * self.dim**-0.5
        target = torch.randint(self.vocab, (self.batch, self.tokens), generator=g, device=g.device)
        target[:, ::17] = -100
        return x, weight, target


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


def widened(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


def shifted(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, weight).float()
    logits = logits[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target[..., 1:].contiguous().view(-1))


def step(loss: Function) -> Function:
    """The loss and the gradients of the first two arguments."""

    def run(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
        out = loss(*leaves, target)
        assert isinstance(out, Tensor)
        return (out.detach(), *torch.autograd.grad(out, leaves))

    return run


def in_float64(loss: Loss) -> Loss:
    """The loss without its casts to float32."""

    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if loss is shifted:
            x, target = x[:, :-1], target[:, 1:].contiguous()
        return plain(x.contiguous(), weight, target)

    return run


def liger(loss: Loss) -> Impl:
    """Liger's function, called by hand on the hidden states; it chooses its chunks by itself."""

    def prepare() -> Function:
        fused = optional("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

        def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            if loss is shifted:
                x, target = x[:, :-1], target[:, 1:]
            return fused(x.reshape(-1, x.shape[-1]), weight, target.reshape(-1))  # type: ignore[no-any-return]

        return step(run)

    return Impl("liger", prepare, capture=False, note="called by hand; it asks the device for the number of targets")


def _stepped(impl: Impl) -> Impl:
    return Impl(impl.name, lambda: step(impl.prepare()), capture=impl.capture, note=impl.note)


def step_case(name: str, loss: Loss, shape: Shape, dtype: torch.dtype, on_gpu: bool) -> Case:
    impls = [eager(step(loss)), *map(_stepped, compiled_pairs(loss, *MODES))]
    if on_gpu:
        impls.append(liger(loss))
    tensors = shape.batch * shape.tokens * shape.dim + shape.vocab * shape.dim  # read, and their gradients written
    return Case(
        f"step, {name} {shape}",
        lambda g: shape.inputs(g, dtype),
        step(loss),
        step(in_float64(loss)),
        impls,
        bytes=2 * tensors * dtype.itemsize,
        flops=3 * shape.product,
        dtype=dtype,
        sets=1,
        grad=True,
    )


def loss_case(shape: Shape, dtype: torch.dtype) -> Case:
    """The loss alone, as in an evaluation."""
    tensors = shape.batch * shape.tokens * shape.dim + shape.vocab * shape.dim
    return Case(
        f"loss alone, float {shape}",
        lambda g: shape.inputs(g, dtype),
        widened,
        in_float64(widened),
        [eager(widened), *compiled_pairs(widened, *MODES)],
        bytes=tensors * dtype.itemsize,
        flops=shape.product,
        dtype=dtype,
        sets=1,
    )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    large, tied = Shape(2, 4096, 4096, 128256), Shape(1, 4096, 896, 151936)
    if quick or not on_gpu:
        large = tied = Shape(2, 65, 64, 4099)
    yield step_case("plain", plain, large, dtype, on_gpu)
    yield step_case("float", widened, large, dtype, on_gpu)
    yield step_case("float, shifted", shifted, large, dtype, on_gpu)
    if tied is not large:
        yield step_case("float, shifted", shifted, replace(large, batch=4), dtype, on_gpu)
        yield step_case("float", widened, tied, dtype, on_gpu)
    yield loss_case(large, dtype)


if __name__ == "__main__":
    raise SystemExit(main("linear_cross_entropy", __doc__, cases))
