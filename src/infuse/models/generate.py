"""Text generation over torchtune's KV cache, one token a step, with the step function given: eager or compiled.

The prompt goes through the same step, token by token, so that there is one graph to compile and no shape ever changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infuse.models.sampling import Sampling, choose

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens [B, 1] int64, mask [B, 1, T] bool, input_pos [1] int64) -> logits [B, 1, V]; T is the cache's length."""


@dataclass(frozen=True, slots=True)
class Generated:
    """tokens: [B, P + N] int64, the prompt included. logits: [B, N, V] that chose the new ones; None if not kept."""

    tokens: Tensor
    logits: Tensor | None


def decode_step(model: Callable[..., Any]) -> Step:
    """The step of a torchtune decoder, to call or to compile."""

    def step(tokens: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        logits: Tensor = model(tokens, mask=mask, input_pos=input_pos)
        return logits

    return step


def set_up_cache(model: nn.Module, batch_size: int, length: int) -> nn.Module:
    """Gives a torchtune decoder caches of `length` positions in its weights' dtype; returns it in evaluation mode."""
    weight = next(model.parameters())
    with weight.device:
        model.setup_caches(batch_size, weight.dtype, decoder_max_seq_len=length)  # type: ignore[operator]
    return model.eval()


@torch.no_grad()
def generate(
    model: nn.Module,
    step: Step,
    prompt: Tensor,
    num_tokens: int,
    *,
    top_k: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    keep_logits: bool = False,
) -> Generated:
    """Continues prompts of one length, each token the likeliest (top_k=1) or drawn from the top_k likeliest.

    model: a torchtune decoder with caches (see `set_up_cache`); they are emptied first. step: what computes it.
    prompt: [B, P] int64 with P >= 1.
    Raises ValueError for an empty prompt, a top_k or temperature not above 0, more tokens than the cache has.
    """
    length = model.decoder_max_cache_seq_len
    if not isinstance(length, int) or prompt.shape[1] + num_tokens > length:
        got = f"a prompt of {prompt.shape[1]} and {num_tokens} tokens to come"
        raise ValueError(f"generate: got {got}, expected a cache that holds both, this one holds {length}")
    if prompt.shape[1] < 1 or top_k < 1 or temperature <= 0:
        got = f"got {prompt.shape[1]} prompt tokens, top_k={top_k}, temperature={temperature}"
        raise ValueError(f"generate: {got}, expected at least 1, at least 1, more than 0")
    sampling = Sampling(temperature, top_k)
    model.reset_caches()  # type: ignore[operator]
    tokens = torch.empty(prompt.shape[0], prompt.shape[1] + num_tokens, dtype=torch.int64, device=prompt.device)
    tokens[:, : prompt.shape[1]] = prompt
    # Written in place: their addresses, shapes and strides stay the same over all steps.
    token, input_pos = prompt[:, :1].clone(), torch.zeros(1, dtype=torch.int64, device=prompt.device)
    mask = torch.zeros(prompt.shape[0], 1, length, dtype=torch.bool, device=prompt.device)
    kept = []
    for position in range(tokens.shape[1] - 1):
        token.copy_(tokens[:, position : position + 1])
        input_pos.fill_(position)
        mask[:, :, position] = True
        logits = step(token, mask, input_pos)
        if position + 1 < prompt.shape[1]:
            continue
        tokens[:, position + 1] = choose(logits[:, -1], sampling, generator)
        if keep_logits:
            kept.append(logits[:, -1].clone())
    return Generated(tokens, torch.stack(kept, 1) if kept else None)
