"""What a model of the zoo is: how it is built, what it is called with, and, where a person counted, its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One model. Nothing is downloaded; weights and inputs are random and follow from a seed.

    name: "group/name". counts: sites by kind as a person counted them; None leaves it to the record of an eager run.
    trains: False where a training step makes no sense (a decode step over a cache). random: draws random numbers in
    training, so that two runs can't be compared. discrete: rounding may change a choice (a router's top k), after
    which two runs differ by more than rounding. prepare: is called with the module in its dtype before a run.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    counts: Mapping[str, int] | None = None
    trains: bool = True
    random: bool = False
    discrete: bool = False
    prepare: Callable[[nn.Module, torch.dtype], None] | None = None
    tags: tuple[str, ...] = field(default=())


def token_ids(length: int = 8, batch: int = 2, vocab: int = 128) -> Tensor:
    """Ids that avoid the first few, which tend to have a meaning."""
    return torch.randint(4, vocab, (batch, length))
