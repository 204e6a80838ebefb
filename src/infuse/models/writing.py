"""Token after token from the shards of a decoder, for a batch of prompts, and text from these."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from infuse.models.masks import attention_mask, pad_left, positions
from infuse.models.sampling import Sampling, choose
from infuse.models.sharded import ShardChain
from infuse.models.tokenizer import TextStream


def stream_tokens(
    chain: ShardChain,
    tokens: Tensor,
    max_tokens: int,
    *,
    padding: Tensor | None = None,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continues prompts, yielding [B] int64 as soon as a step has chosen it, at most max_tokens times.

    tokens: [B, P] int64; padding: [B] int64, the slots on the left of each row that hold no token (see `pad_left`).
    A row that has chosen one of stop_tokens repeats it; when every row has, there are no more.
    Raises ValueError at once for a prompt and max_tokens that are longer than the caches, or than the model takes.
    """
    if max_tokens < 1 or tokens.ndim != 2 or 0 in tokens.shape:
        got = f"got tokens {list(tokens.shape)} and max_tokens={max_tokens}"
        raise ValueError(f"stream_tokens: {got}, expected [B, P], neither of them 0, and at least 1")
    needed = tokens.shape[1] + max_tokens - 1  # the last one is not read again
    config = chain.models[0].config
    for model in chain.models:
        room = tokens.shape[1] + model.max_generated_tokens if model.use_cache else config.max_seq_len
        if needed > min(room, config.max_seq_len):
            got = f"got a prompt of {tokens.shape[1]} and {max_tokens} tokens to come"
            limits = f"max_generated_tokens={model.max_generated_tokens}, max_seq_len={config.max_seq_len}"
            raise ValueError(f"stream_tokens: {got}, expected no more than the shards hold, {limits}")
    stop = torch.tensor(sorted(stop_tokens), dtype=torch.int64)
    return _stream(chain, tokens, max_tokens, padding, sampling or Sampling(), stop, generator)


def _stream(
    chain: ShardChain,
    tokens: Tensor,
    max_tokens: int,
    padding: Tensor | None,
    sampling: Sampling,
    stop: Tensor,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    use_cache = all(model.use_cache for model in chain.models)
    start, written = 0, tokens
    stopped = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for step in range(max_tokens):
        logits = _logits(chain, written[:, start:], start, padding)
        chosen = choose(logits, sampling, generator).to(tokens.device)
        chosen = torch.where(stopped, written[:, -1], chosen)
        yield chosen
        stopped = stopped | torch.isin(chosen, stop.to(chosen.device))
        if step + 1 == max_tokens or bool(stopped.all()):
            return
        start = written.shape[1] if use_cache else 0
        written = torch.cat([written, chosen[:, None]], 1)


def _logits(chain: ShardChain, tokens: Tensor, start: int, padding: Tensor | None) -> Tensor:
    """[B, V] after the last of these tokens, which lie in the slots from `start` on."""
    if padding is None:
        return chain.generate(tokens, curr_pos=start)[:, -1]
    length = tokens.shape[1]
    window = chain.models[0].config.sliding_window
    mask = attention_mask(start, length, start + length, padding=padding, window=window)
    return chain.generate(tokens, mask, positions(start, length, padding=padding), curr_pos=start)[:, -1]


def stream_text(
    chain: ShardChain,
    tokenizer: Any,
    prompt: str,
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Continues a text, yielding pieces as they become whole characters; the prompt and a stop token are left out.

    tokenizer: from `load_tokenizer`. Raises what `stream_tokens` raises, at once, and ValueError for a prompt that is
    no token.
    """
    tokens, _ = pad_left([tokenizer.encode(prompt).ids])
    steps = stream_tokens(chain, tokens, max_tokens, sampling=sampling, stop_tokens=stop_tokens, generator=generator)
    return _pieces(steps, TextStream(tokenizer), frozenset(stop_tokens))


def _pieces(steps: Iterator[Tensor], stream: TextStream, stop_tokens: frozenset[int]) -> Iterator[str]:
    for chosen in steps:
        token = int(chosen.item())
        if token in stop_tokens:
            break
        piece = stream.add(token)
        if piece:
            yield piece
    rest = stream.finish()
    if rest:
        yield rest
