"""Token after token from the shards of a decoder, for a batch of prompts, and text from these."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from infuse.models.masks import attention_mask, pad_left, positions
from infuse.models.sampling import Sampling, choose
from infuse.models.sharded import ShardedGeneralModel
from infuse.models.tokenizer import TextStream


class Engine(Protocol):
    """What computes logits: a `ShardChain`, or one process of several that hold the shards of a decoder together."""

    @property
    def models(self) -> Sequence[ShardedGeneralModel]:
        """The shards that this process holds, at least one."""
        ...

    def generate(
        self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None, curr_pos: int = 0
    ) -> Tensor:
        """Logits [B, S, vocab_size] fp32, as `ShardChain.generate` gives them; in several processes each gets them."""
        ...


def stream_tokens(
    engine: Engine,
    tokens: Tensor,
    max_tokens: int,
    *,
    padding: Tensor | None = None,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    eager_prompt: bool = False,
) -> Iterator[Tensor]:
    """Continues prompts, yielding [B] int64 as soon as a step has chosen it, at most max_tokens times.

    tokens: [B, P] int64; padding: [B] int64, the slots on the left of each row that hold no token (see `pad_left`).
    A row that has chosen one of stop_tokens repeats it; when every row has, there are no more.
    generator: on the device of the logits. eager_prompt: compiled decoders take the prompt as if they were not, so that
    only the steps of one token, which all have the same shapes, are compiled.
    Raises ValueError at once for a prompt and max_tokens that are longer than the caches, or than the model takes.
    """
    if max_tokens < 1 or tokens.ndim != 2 or 0 in tokens.shape:
        got = f"got tokens {list(tokens.shape)} and max_tokens={max_tokens}"
        raise ValueError(f"stream_tokens: {got}, expected [B, P], neither of them 0, and at least 1")
    needed = tokens.shape[1] + max_tokens - 1  # the last one is not read again
    config = engine.models[0].config
    for model in engine.models:
        room = tokens.shape[1] + model.max_generated_tokens if model.use_cache else config.max_seq_len
        if needed > min(room, config.max_seq_len):
            got = f"got a prompt of {tokens.shape[1]} and {max_tokens} tokens to come"
            limits = f"max_generated_tokens={model.max_generated_tokens}, max_seq_len={config.max_seq_len}"
            raise ValueError(f"stream_tokens: {got}, expected no more than the shards hold, {limits}")
    text = _Text(engine, tokens, padding, sampling or Sampling(), frozenset(stop_tokens), generator, eager_prompt)
    return _stream(text, max_tokens)


@dataclass(slots=True)
class _Text:
    """What a batch of texts is made from. tokens: [B, slots] int64, all so far."""

    engine: Engine
    tokens: Tensor
    padding: Tensor | None
    sampling: Sampling
    stop_tokens: frozenset[int]
    generator: torch.Generator | None
    eager_prompt: bool


def _stream(text: _Text, max_tokens: int) -> Iterator[Tensor]:
    """On a GPU the host reads a token while the device computes the next one, which may turn out not to be needed."""
    device = text.engine.models[0].device
    given, ahead = text.tokens.device, int(device.type == "cuda")
    text.tokens = text.tokens.to(device)
    text.padding = None if text.padding is None else text.padding.to(device)
    arriving: deque[_OnItsWay] = deque()
    for step in range(max_tokens + ahead):
        if step < max_tokens:
            arriving.append(_OnItsWay(_choose_next(text, first=step == 0)))
        if step < ahead:
            continue
        chosen = arriving.popleft().wait()
        yield chosen.to(given)
        if text.stop_tokens and text.stop_tokens.issuperset(chosen.tolist()):
            return


def _choose_next(text: _Text, *, first: bool) -> Tensor:
    """[B] int64 on the first shard's device, which become part of the text."""
    use_cache = all(model.use_cache for model in text.engine.models)
    start = text.tokens.shape[1] - 1 if use_cache and not first else 0
    eager = torch.compiler.set_stance("force_eager") if first and text.eager_prompt else contextlib.nullcontext()
    if text.tokens.is_cuda:
        # A step may run several CUDA graphs, one a shard: what one returns lives until the next step begins.
        torch.compiler.cudagraph_mark_step_begin()
    with eager:
        logits = _logits(text.engine, text.tokens[:, start:], start, text.padding)
    chosen = choose(logits, text.sampling, text.generator).to(text.tokens.device)
    if text.stop_tokens and not first and len(chosen) > 1:
        before = text.tokens[:, -1]
        stopped = torch.stack([before == token for token in text.stop_tokens]).any(0)
        chosen = torch.where(stopped, before, chosen)
    text.tokens = torch.cat([text.tokens, chosen[:, None]], 1)
    return chosen


class _OnItsWay:
    """A copy to the host that waits for what the device was given before, and not for what it is given after."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def _logits(engine: Engine, tokens: Tensor, start: int, padding: Tensor | None) -> Tensor:
    """[B, V] after the last of these tokens, which lie in the slots from `start` on."""
    if padding is None:
        return engine.generate(tokens, curr_pos=start)[:, -1]
    length = tokens.shape[1]
    window = engine.models[0].config.sliding_window
    mask = attention_mask(start, length, start + length, padding=padding, window=window)
    return engine.generate(tokens, mask, positions(start, length, padding=padding), curr_pos=start)[:, -1]


def stream_text(
    engine: Engine,
    tokenizer: Any,
    prompt: str,
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    eager_prompt: bool = False,
) -> Iterator[str]:
    """Continues a text, yielding pieces as they become whole characters; the prompt and a stop token are left out.

    tokenizer: from `load_tokenizer`; for the others see `stream_tokens`, whose errors are raised at once here too, and
    ValueError for a prompt that is no token.
    """
    tokens, _ = pad_left([tokenizer.encode(prompt).ids])
    steps = stream_tokens(
        engine,
        tokens,
        max_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        generator=generator,
        eager_prompt=eager_prompt,
    )
    return pieces(steps, tokenizer, stop_tokens)


def pieces(steps: Iterator[Tensor], tokenizer: Any, stop_tokens: Collection[int] = ()) -> Iterator[str]:
    """The text of one row's tokens ([1] int64 each, as from `stream_tokens`), up to a stop token."""
    stream = TextStream(tokenizer)
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
