"""Which positions a token sees, in batches whose shorter prompts are padded on the left.

Slots count from the left, padding included; positions count a row's own tokens from 0. Both grow by one a token, so the
distance of two tokens is the same in slots and in positions, and a window is a window in either.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    start: int,
    length: int,
    num_slots: int,
    *,
    padding: Tensor | None = None,
    window: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """bool [B, length, num_slots] (B is 1 without padding): what the tokens in slots start, start + 1, ... see.

    A token sees itself and what came before, not the padding, and with a window only its last `window` slots.
    padding: [B] int64, how many slots on the left of each row hold no token. A padding slot sees itself alone, so that
    its softmax has a term: without one the row would be 0 / 0, and what it leaves in a cache would spoil others' sums.
    device: of the mask; None for the padding's.
    """
    if padding is not None:
        padding = padding if device is None else padding.to(device)
        device = padding.device
    query = torch.arange(start, start + length, device=device)[:, None]
    key = torch.arange(num_slots, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if padding is None:
        return seen[None]
    return (seen & (key >= padding[:, None, None])) | (key == query)


def positions(start: int, length: int, *, padding: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """int64 [B, length] (B is 1 without padding): positions of the tokens in these slots; 0 for padding."""
    slots = torch.arange(start, start + length, device=device if padding is None else padding.device)[None]
    return slots if padding is None else (slots - padding[:, None]).clamp_min(0)


def pad_left(prompts: list[list[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as tokens [B, longest] int64 and padding [B] int64.

    Raises ValueError when there is no prompt or one is empty.
    """
    if not prompts or not all(prompts):
        raise ValueError(
            f"pad_left: got {[len(prompt) for prompt in prompts]} tokens, expected at least 1 in each prompt"
        )
    longest = max(map(len, prompts))
    rows = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])
