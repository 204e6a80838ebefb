"""A training step: the loss of one sequence and all gradients.

On an H200 a step of 4,096 tokens of Llama 8B's sizes is bound by power. In a loop it draws 690 of 700 W, and the clock
falls from 1,980 MHz to what that allows: 1,520 MHz with stock torch.compile, 1,480 with Infuse, whose kernels leave the
tensor cores idle for less of the time. Products take 52 of 61 ms, so a millisecond saved beside them makes a step about
half a millisecond shorter. Nothing is gained between kernels: the device idles for 0.25 ms of a step, 0.5 with stock,
and CUDA graphs change nothing. (Clock and power by NVML, torch 2.11.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, Function, Impl, compiled_pairs
from implementations import Later, Modes
from model_sources import Model
from prefill_cases import random_tokens
from torch import Tensor, nn

# In one sample, as in a loop: only the first step waits for what Python does before the first kernel. With one step a
# sample the pauses would let the clock rise.
CALLS = 3


@dataclass(slots=True)
class Step:
    """The training step around a compiled or eager loss: all gradients are computed, those of some weights returned."""

    loss: Function
    model: nn.Module

    def __call__(self, *args: Tensor) -> list[Tensor]:
        value = self._forward(*args)
        value.backward()
        return [value.detach(), *self._chosen_gradients()]

    def saved(self, *args: Tensor) -> tuple[int, int]:
        """Bytes of activations that the forward leaves allocated for the backward, and of gradients that are ready."""
        device = next(self.model.parameters()).device
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        value = self._forward(*args)
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device) - before - value.untyped_storage().nbytes()
        gradients = self._gradients_in(value)
        return max(kept - gradients, 0), gradients

    def _gradients_in(self, loss: Tensor) -> int:
        """Bytes of tensors of the head's shape, but the head itself, that a compiled forward keeps: a loss that is
        fused with the head computes the head's gradient at once."""
        weights = [parameter for parameter in self.model.parameters() if parameter.dim() == 2]
        pointers = {weight.data_ptr() for weight in weights}
        kept = getattr(loss.grad_fn, "saved_tensors", ())
        head = max(weights, key=Tensor.numel).shape
        return sum(t.nbytes for t in kept if t.shape == head and t.data_ptr() not in pointers)

    def _forward(self, *args: Tensor) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        value = self.loss(*args)
        assert isinstance(value, Tensor)
        return value

    def _chosen_gradients(self) -> list[Tensor]:
        parameters = list(self.model.parameters())
        vectors = [parameter for parameter in parameters if parameter.dim() == 1]
        matrices = [parameter for parameter in parameters if parameter.dim() == 2]
        gradients = [parameter.grad for parameter in (vectors[0], vectors[-1], matrices[1], matrices[-2])]
        assert all(gradient is not None for gradient in gradients)
        return [gradient for gradient in gradients if gradient is not None]


def train(model: Model, length: int, modes: Modes) -> Case:
    shape = model.shape
    loss = Later(model.loss)
    step = Later(lambda: Step(loss.get(), model.get()))

    def reference(*args: Tensor) -> Any:
        module = model.exact()
        return Step(model.loss(module), module)(*args)

    def training(impl: Impl) -> Impl:
        return dataclasses.replace(impl, prepare=lambda: Step(impl.prepare(), model.get()))

    return Case(
        name=f"{model.name} train {length}",
        inputs=lambda g: tuple(random_tokens(g, shape.vocab_size, length) for _ in range(2)),
        eager=step,
        reference=reference,
        impls=[
            Impl("eager", step.get, capture=False),
            *(training(impl) for impl in compiled_pairs(loss, *modes, capture=False)),
        ],
        bytes=3 * shape.matmul_weights() * shape.dtype.itemsize,
        flops=3 * (2 * shape.matmul_weights() * length + shape.attention_flops(length * length // 2)),
        dtype=shape.dtype,
        sets=2,
        calls=CALLS,
        grad=True,
        reset=lambda: model.get().zero_grad(set_to_none=True),
        tolerance_factor=3.0,
        release=model.releasing(step, loss),
        cold=True,
    )
