"""Sharded decoders against transformers' own with the same weights: prompt and 32 steps, however the layers are cut."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infuse.models.masks import attention_mask, positions

pytest.importorskip("torchtune")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from infuse.models.checkpoint import load_sharded_model
from infuse.models.shard import Shard
from infuse.models.sharded import ShardChain
from tests.models.hugging_face import FAMILIES, SIZES, make_model, reference_logits, save_model

LAYERS = SIZES["num_hidden_layers"]
CUTS = [(3,), (1, 2), (2, 1), (1, 1, 1)]
PROMPT, STEPS = 7, 32
PADDING = torch.tensor([0, 3, 6])

Folder = Callable[[str], tuple[nn.Module, Path]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    @functools.cache
    def make(family: str) -> tuple[nn.Module, Path]:
        model = make_model(family)
        return model, save_model(model, tmp_path_factory.mktemp(family))

    return make


def text(rows: int = 3) -> Tensor:
    return torch.randint(64, (rows, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))


def chain(path: Path, lengths: tuple[int, ...], use_cache: bool = True) -> ShardChain:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    shards = [Shard("m", start, start + length - 1, LAYERS) for start, length in zip(starts, lengths)]
    loaded = [load_sharded_model(path, shard, use_cache=use_cache, max_generated_tokens=STEPS) for shard in shards]
    return ShardChain(loaded)


def logits_of(shards: ShardChain, tokens: Tensor, padding: Tensor | None, use_cache: bool) -> Tensor:
    """[B, S, V]: the prompt's in one call, then one slot a call."""
    window = shards.models[0].config.sliding_window
    found = []
    for end in range(PROMPT, tokens.shape[1] + 1):
        start = end - 1 if use_cache and end > PROMPT else 0
        mask = place = None
        if padding is not None:
            mask = attention_mask(start, end - start, end, padding=padding, window=window)
            place = positions(start, end - start, padding=padding)
        logits = shards.generate(tokens[:, start:end], mask, place, curr_pos=start)
        found.append(logits if end == PROMPT else logits[:, -1:])
    return torch.cat(found, 1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    # fp32 on logits of about 1 to 5: rounding of three layers, whose sums of 48 and 96 terms come in another order.
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lengths", CUTS, ids=str)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(
    folder: Folder, family: str, padding: Tensor | None, use_cache: bool, lengths: tuple[int, ...]
) -> None:
    oracle, path = folder(family)
    tokens = text()
    expected = reference_logits(oracle, tokens, padding)
    got = logits_of(chain(path, lengths, use_cache), tokens, padding, use_cache)
    assert got.dtype == torch.float32 and expected.std() > 0.3
    real = torch.arange(tokens.shape[1]) >= (torch.zeros(3) if padding is None else padding)[:, None]
    assert_close(got[real], expected[real])
