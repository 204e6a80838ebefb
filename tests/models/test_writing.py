"""Tokens and text as they come: greedy ones are those that transformers writes, however the layers are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infuse.models.masks import pad_left
from infuse.models.sampling import Sampling

pytest.importorskip("torchtune")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infuse.models.checkpoint import load_sharded_model
from infuse.models.shard import split_layers
from infuse.models.sharded import ShardChain
from infuse.models.writing import stream_text, stream_tokens
from tests.models.hugging_face import make_model, save_model

PROMPTS = [[5, 9, 33, 2], [7], [60, 1]]
Chains = Callable[..., ShardChain]


@pytest.fixture(scope="module", params=["llama3_scaled", "mistral_window"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = make_model(request.param)
    return model, save_model(model, tmp_path_factory.mktemp(request.param))


def chain(folder: Path, num_shards: int = 1, use_cache: bool = True) -> ShardChain:
    shards = split_layers("m", 3, num_shards)
    loaded = [load_sharded_model(folder, each, use_cache=use_cache, max_generated_tokens=24) for each in shards]
    return ShardChain(loaded)


def written(steps: object) -> list[list[int]]:
    return torch.stack(list(steps), 1).tolist()  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_greedy_tokens_are_those_that_transformers_writes(
    saved: tuple[nn.Module, Path], num_shards: int, use_cache: bool
) -> None:
    model, folder = saved
    tokens, padding = pad_left(PROMPTS)
    mask = (torch.arange(4)[None] >= padding[:, None]).long()
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    expected: Tensor = model.generate(tokens, attention_mask=mask, **options)  # type: ignore[operator]
    got = written(stream_tokens(chain(folder, num_shards, use_cache), tokens, 20, padding=padding))
    assert got == expected[:, 4:].tolist()


def test_a_row_that_stops_repeats_its_stop_token(saved: tuple[nn.Module, Path]) -> None:
    shards = chain(saved[1])
    tokens, padding = pad_left(PROMPTS)
    free = written(stream_tokens(shards, tokens, 20, padding=padding))
    stop = free[0][3]
    expected = []
    for row in free:
        end = row.index(stop) if stop in row else 20
        expected.append(row[:end] + [stop] * (20 - end))
    got = written(stream_tokens(shards, tokens, 20, padding=padding, stop_tokens=[stop]))
    steps = len(got[0])
    assert got == [row[:steps] for row in expected]
    assert steps == 20 or all(row[steps - 1] == stop for row in got)
    assert len(list(stream_tokens(shards, tokens[:1], 20, stop_tokens=[stop]))) == free[0].index(stop) + 1


def test_drawn_tokens_follow_from_the_seed(saved: tuple[nn.Module, Path]) -> None:
    shards = chain(saved[1])

    def draw(seed: int) -> list[list[int]]:
        sampling, generator = Sampling(temperature=2.0, top_k=5), torch.Generator().manual_seed(seed)
        return written(stream_tokens(shards, torch.tensor([[1, 2]]), 20, sampling=sampling, generator=generator))

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(("length", "max_tokens"), [(2, 26), (80, 18), (2, 0), (0, 2)])
def test_what_does_not_fit_is_refused_before_the_first_token(
    saved: tuple[nn.Module, Path], length: int, max_tokens: int
) -> None:
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"a prompt of {length} and {max_tokens} |got tokens .1, {length}."):
        stream_tokens(chain(saved[1]), tokens, max_tokens)


def test_the_longest_text_that_fits_is_written(saved: tuple[nn.Module, Path]) -> None:
    for length, max_tokens in ((2, 25), (80, 17)):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        assert len(list(stream_tokens(chain(saved[1]), tokens, max_tokens))) == max_tokens


def test_text_streams_and_joins_to_the_decoded_tokens(saved: tuple[nn.Module, Path]) -> None:
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:64])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shards, prompt = chain(saved[1]), "HELLO"
    ids = tokenizer.encode(prompt).ids
    expected = written(stream_tokens(shards, torch.tensor([ids]), 20))[0]
    pieces = list(stream_text(shards, tokenizer, prompt, 20))
    assert "".join(pieces) == tokenizer.decode(expected) and len(pieces) > 10
    stop = expected[10]
    shorter = "".join(stream_text(shards, tokenizer, prompt, 20, stop_tokens=[stop]))
    assert shorter == tokenizer.decode(expected[: expected.index(stop)])
    with pytest.raises(ValueError, match="expected at least 1 in each prompt"):
        stream_text(shards, tokenizer, "", 20)
