"""Inference with a decoder in shards: each takes tokens or hidden states and gives hidden states or logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infuse.models.config import ModelConfig
from infuse.models.decoder import GeneralMHA
from infuse.models.masks import attention_mask, positions
from infuse.models.shard import Shard, check_tiling


class ShardedGeneralModel(nn.Module):
    """One shard of a decoder with, if use_cache, key and value caches for its own layers.

    The caches hold a prompt and max_generated_tokens more, at most config.max_seq_len; they are made with the first
    prompt and made anew only when a prompt needs longer ones or has another batch size. dtype: the weights' and the
    hidden states', None for config.torch_dtype. `model` is the decoder; `model.compile(backend="infuse")` compiles it.
    Raises ValueError when the shard is not of the configuration's model.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_cache: bool = True,
        max_generated_tokens: int = 1024,
    ) -> None:
        super().__init__()
        if max_generated_tokens < 1:
            raise ValueError(f"max_generated_tokens: got {max_generated_tokens}, expected at least 1")
        self.config, self.shard, self.use_cache = config, shard, use_cache
        self.device = torch.device(device or "cpu")
        self.dtype = dtype or config.torch_dtype
        self.max_generated_tokens = max_generated_tokens
        with self.device, _default_dtype(self.dtype):
            self.model = GeneralMHA(config, shard).eval()
        self.cache_length = 0
        self._batch_size = 0
        self._filled: int | None = None  # slots in the caches; None when a call has failed half-way

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        hidden_state: Tensor | None = None,
        curr_pos: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Runs the shard on the slots curr_pos to curr_pos + S - 1.

        tokens: [B, S] int64, for the first shard; the others don't look at it. hidden_state: [B, S, embed_dim], what
        the shard before gave, for all but the first. curr_pos: 0 begins a text, which empties the caches; else how many
        slots they hold. Without caches it is always 0: each call takes the whole text so far.
        mask: bool [B or 1, S, T], true where a token may look, T being curr_pos + S or `cache_length`; None: all that
        came before, within the configuration's window. input_pos: int64 [B, S], [1, S] or [S]; None: the slots.
        Returns (hidden states [B, S, embed_dim], None), and on the last shard (None, logits [B, S, vocab_size] fp32).
        Raises ValueError for an input that is missing or of another shape, a text longer than the caches (or, without,
        than max_seq_len), a curr_pos that does not follow on what the caches hold. Nothing has run then.
        """
        x = self._input(tokens, hidden_state)
        batch_size, length = x.shape[:2]
        self._check_place(batch_size, length, curr_pos)
        num_slots = self._num_slots(length, curr_pos)
        mask = self._mask(mask, batch_size, length, curr_pos, num_slots)
        input_pos = self._positions(input_pos, batch_size, length, curr_pos)
        if self.use_cache and curr_pos == 0:
            self._empty_caches(batch_size, num_slots)
        self._filled = None
        output: Tensor = self.model(x, mask=mask, input_pos=input_pos)
        self._filled = curr_pos + length
        return (None, output) if self.shard.is_last_layer else (output, None)

    def check(
        self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None, curr_pos: int = 0
    ) -> None:
        """Raises what `generate` would for the whole model's arguments, whichever shard this is; runs nothing."""
        _check_tokens("generate", tokens)
        batch_size, length = tokens.shape
        self._check_place(batch_size, length, curr_pos)
        if mask is not None:
            _check_mask(mask, batch_size, length, curr_pos + length, self._num_slots(length, curr_pos))
        if input_pos is not None:
            _check_positions(input_pos, batch_size, length)

    def _input(self, tokens: Tensor | None, hidden_state: Tensor | None) -> Tensor:
        where = f"generate, layers {self.shard.start_layer}-{self.shard.end_layer}"
        if self.shard.is_first_layer:
            if tokens is None or hidden_state is not None:
                raise ValueError(f"{where}: expected tokens and no hidden_state, this is the first shard")
            _check_tokens(where, tokens)
            # A column of a longer text has that text's stride, for which compiled code would be made anew.
            dense: Tensor = tokens.flatten().unflatten(0, tokens.shape)
            return dense.to(self.device)
        if hidden_state is None:
            raise ValueError(f"{where}: got no hidden_state, expected what the shard before gave")
        if hidden_state.ndim != 3 or 0 in hidden_state.shape or hidden_state.shape[2] != self.config.embed_dim:
            expected = f"expected [B, S, {self.config.embed_dim}]"
            raise ValueError(f"{where}: got hidden_state {_spec(hidden_state)}, {expected}")
        return hidden_state.to(self.device, self.dtype)

    def _check_place(self, batch_size: int, length: int, curr_pos: int) -> None:
        if curr_pos < 0:
            raise ValueError(f"generate: got curr_pos={curr_pos}, expected at least 0")
        if not self.use_cache and curr_pos > 0:
            remedy = "expected 0 without caches: give the whole text so far"
            raise ValueError(f"generate: got curr_pos={curr_pos}, {remedy}")
        limit = self.cache_length if curr_pos else self.config.max_seq_len
        if curr_pos and (curr_pos != self._filled or batch_size != self._batch_size):
            filled = "nothing" if self._filled is None else f"{self._filled} slots of {self._batch_size} rows"
            got = f"got curr_pos={curr_pos} and {batch_size} rows"
            raise ValueError(f"generate: {got}, expected what the caches hold, {filled}; curr_pos=0 begins a text")
        if curr_pos + length > limit:
            what = f"{length} tokens after {curr_pos}" if curr_pos else f"a prompt of {length} tokens"
            holder = "the caches hold" if self.use_cache else "the model takes"
            remedy = "a larger max_generated_tokens gives longer caches" if curr_pos else "max_seq_len is the limit"
            raise ValueError(f"generate: got {what}, expected no more than {holder}, {limit}; {remedy}")

    def _num_slots(self, length: int, curr_pos: int) -> int:
        """How many slots a mask tells of."""
        if not self.use_cache:
            return length
        if curr_pos:
            return self.cache_length
        return max(self.cache_length, min(length + self.max_generated_tokens, self.config.max_seq_len))

    def _mask(self, mask: Tensor | None, batch_size: int, length: int, curr_pos: int, num_slots: int) -> Tensor | None:
        if mask is None:
            if not self.use_cache and self.config.sliding_window is None:
                return None  # torchtune's attention is causal then
            return attention_mask(curr_pos, length, num_slots, window=self.config.sliding_window, device=self.device)
        _check_mask(mask, batch_size, length, curr_pos + length, num_slots)
        return F.pad(mask.to(self.device), (0, num_slots - mask.shape[2]))

    def _positions(self, input_pos: Tensor | None, batch_size: int, length: int, curr_pos: int) -> Tensor:
        if input_pos is None:
            return positions(curr_pos, length, device=self.device)
        _check_positions(input_pos, batch_size, length)
        return input_pos.to(self.device)

    def _empty_caches(self, batch_size: int, num_slots: int) -> None:
        if (self._batch_size, self.cache_length) == (batch_size, num_slots):
            self.model.reset_caches()
            return
        for layer in self.model.layers:  # torchtune keeps the caches that it has
            layer.attn.kv_cache = None
        with self.device:
            self.model.setup_caches(batch_size, self.dtype, decoder_max_seq_len=num_slots)
        self._batch_size, self.cache_length = batch_size, num_slots


class ShardChain:
    """The shards of one model in one process, each where it is; hidden states go from one to the next.

    Raises ValueError when they don't hold every layer once, in order, or are of different configurations.
    """

    def __init__(self, models: Sequence[ShardedGeneralModel]) -> None:
        check_tiling([model.shard for model in models])
        if any(model.config != models[0].config for model in models):
            raise ValueError("ShardChain: got shards of different configurations, expected one")
        self.models = list(models)

    def generate(
        self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None, curr_pos: int = 0
    ) -> Tensor:
        """Logits [B, S, vocab_size] fp32, on the last shard's device; see `ShardedGeneralModel.generate`."""
        hidden_state, logits = None, None
        for model in self.models:
            first = model.shard.is_first_layer
            hidden_state, logits = model.generate(tokens if first else None, mask, input_pos, hidden_state, curr_pos)
        assert logits is not None
        return logits


def _check_tokens(where: str, tokens: Tensor) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{where}: got tokens {_spec(tokens)}, expected [B, S] of int64, neither of them 0")


def _check_mask(mask: Tensor, batch_size: int, length: int, so_far: int, num_slots: int) -> None:
    fits = mask.ndim == 3 and mask.shape[0] in (1, batch_size) and mask.shape[1] == length
    if not fits or mask.shape[2] not in (so_far, num_slots) or mask.dtype != torch.bool:
        expected = f"expected bool [{batch_size}, {length}, {so_far} or {num_slots}]"
        raise ValueError(f"generate: got a mask {_spec(mask)}, {expected}")


def _check_positions(input_pos: Tensor, batch_size: int, length: int) -> None:
    if input_pos.shape not in ((length,), (1, length), (batch_size, length)) or input_pos.is_floating_point():
        expected = f"expected int64 [{batch_size}, {length}]"
        raise ValueError(f"generate: got input_pos {_spec(input_pos)}, {expected}")


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _spec(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
