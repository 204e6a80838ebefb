"""The training step: it learns, its schedule is what it says, differing gradients are seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from infuse.models.training import Recipe, Trainer, gradient_difference, validation_loss

RECIPE = Recipe(steps=100, batch_size=2, seq_len=8, learning_rate=1e-2, warmup_steps=10)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(16, 8), nn.Dropout(0.5), nn.Linear(8, 16))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(16).view(2, 8)
    return tokens, (tokens + 1) % 16


def test_the_rate_warms_up_and_decays_to_its_final_fraction() -> None:
    assert RECIPE.rate(0) == pytest.approx(0.1)
    assert RECIPE.rate(9) == pytest.approx(max(RECIPE.rate(step) for step in range(101)), abs=0.03)
    assert RECIPE.rate(100) == pytest.approx(RECIPE.final_fraction)
    assert RECIPE.rate(1000) == pytest.approx(RECIPE.final_fraction)
    assert dataclasses.replace(RECIPE, steps=1).rate(0) > 0


def test_a_trainer_learns() -> None:
    learner = model()
    learner[1] = nn.Identity()  # type: ignore[index]
    trainer = Trainer(learner, learner, RECIPE)
    losses = []
    for _ in range(60):
        losses.append(trainer.backward(*batch()))
        trainer.update()
    assert losses[-1] < 0.5 * losses[0]


def test_validation_leaves_the_mode_alone_and_ignores_dropout() -> None:
    learner = model().train()
    first, second = (validation_loss(learner, [batch()]) for _ in range(2))
    assert first == second and learner.training


def test_gradient_difference_is_relative_to_the_largest_entry() -> None:
    mine, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    other.weight.grad = torch.tensor([[100.0, 1.0]])
    mine.weight.grad = torch.tensor([[100.0, 1.5]])
    assert gradient_difference(mine, other) == pytest.approx(0.005)
