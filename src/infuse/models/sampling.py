"""The next token from logits: the likeliest, or drawn from the likeliest with a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature: 0 takes the likeliest token; more divides the logits. top_k: None, or how many tokens may be drawn.

    Raises ValueError for a temperature that is negative or not finite and a top_k below 1.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"sampling: got temperature={self.temperature}, expected at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling: got top_k={self.top_k}, expected None or at least 1")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Tokens [B] int64 for logits [B, V], which are drawn in fp32. generator: on the logits' device."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        return logits.argmax(-1)
    best, index = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]), -1)
    drawn = torch.multinomial(torch.softmax(best.float() / sampling.temperature, -1), 1, generator=generator)
    return index.gather(-1, drawn).squeeze(-1)
