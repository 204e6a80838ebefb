"""What the demo's stages agree on: sizes, device, seed, and how a broken promise ends it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from infuse.models import llama
from infuse.models.llama import LlamaConfig
from infuse.models.training import Recipe


class DemoFailed(Exception):
    """Something that the demo shows turned out not to be so."""


def promise(holds: bool, otherwise: str) -> None:
    """Raises DemoFailed, saying `otherwise`, unless it holds."""
    if not holds:
        raise DemoFailed(otherwise)


@dataclass(frozen=True, slots=True)
class Plan:
    """validate_every: steps between validation losses, of validation_batches batches each.
    rounds: how often each variant generates new_tokens tokens, in turns.
    """

    config: LlamaConfig
    recipe: Recipe
    device: torch.device
    seed: int
    output: Path
    validate_every: int
    validation_batches: int
    prompt: str
    new_tokens: int
    rounds: int
    quick: bool


def full_plan(steps: int | None, device: torch.device, seed: int, output: Path) -> Plan:
    """For two cores: under five minutes."""
    return Plan(
        config=llama.SMALL,
        recipe=Recipe(steps=steps or 500, batch_size=8, seq_len=llama.SMALL.max_seq_len),
        device=device,
        seed=seed,
        output=output,
        validate_every=100,
        validation_batches=8,
        prompt="class Queue:\n    def __init__(self, ",
        new_tokens=90,
        rounds=7,
        quick=False,
    )


def quick_plan(steps: int | None, device: torch.device, seed: int, output: Path) -> Plan:
    """A toy, to test that the demo runs: its speeds mean nothing and it learns next to nothing."""
    return dataclasses.replace(
        full_plan(steps, device, seed, output),
        config=dataclasses.replace(llama.TINY, num_layers=2),  # one a shard
        recipe=Recipe(steps=steps or 8, batch_size=2, seq_len=32, warmup_steps=2),
        validate_every=4,
        validation_batches=1,
        prompt="def f(",
        new_tokens=10,
        rounds=2,
        quick=True,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
