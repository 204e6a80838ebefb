"""The training step that the demo runs eagerly and compiled: AdamW, clipped gradients, warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that shapes a run besides the model, the text and the seed."""

    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_fraction: float = 0.1  # of the learning rate, at the last step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def rate(self, step: int) -> float:
        """The fraction of learning_rate that step 0, 1, ... uses."""
        progress = min(1.0, step / max(1, self.steps))
        cosine = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / self.warmup_steps) * cosine


class Trainer:
    """Trains `model` through `forward`, which is the model itself or its compiled form."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], recipe: Recipe) -> None:
        self.model = model.train()
        self.forward = forward
        self.recipe = recipe
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, recipe.rate)

    def backward(self, tokens: Tensor, targets: Tensor) -> float:
        """The loss of a batch, in nats a token; its gradients are left in the parameters."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = cross_entropy(self.forward, tokens, targets)
        loss.backward()
        return loss.item()

    def update(self) -> None:
        """Applies the gradients."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()


def cross_entropy(forward: Callable[..., Any], tokens: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = forward(tokens)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss of a model, run eagerly in evaluation mode, over batches of one size."""
    training = model.training
    model.eval()
    losses = [cross_entropy(model, tokens, targets).item() for tokens, targets in batches]
    model.train(training)
    return sum(losses) / len(losses)


def gradient_difference(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference of two models' gradients, each relative to the largest entry of its parameter's."""
    worst = 0.0
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        scale = other.grad.abs().max().clamp_min(torch.finfo(other.grad.dtype).tiny)
        worst = max(worst, ((mine.grad - other.grad).abs().max() / scale).item())
    return worst
