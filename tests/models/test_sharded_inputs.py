"""The caches of a shard over several texts, its compiled form, and inputs that are refused before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.configs import CONFIG

pytest.importorskip("torchtune")

from infuse.models.shard import Shard, split_layers, whole_model
from infuse.models.sharded import ShardChain, ShardedGeneralModel

WHOLE = whole_model("m", 3)


def model(shard: Shard = WHOLE, **options: Any) -> ShardedGeneralModel:
    config = dataclasses.replace(CONFIG, num_layers=shard.n_layers)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return ShardedGeneralModel(config, shard, **{"max_generated_tokens": 8} | options)


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(of: ShardedGeneralModel, tokens: Tensor, **options: Any) -> Tensor:
    hidden, found = of.generate(tokens, **options)
    assert hidden is None and found is not None
    return found


def caches(of: ShardedGeneralModel) -> list[Tensor]:
    return [buffer for name, buffer in of.named_buffers() if name.endswith(("k_cache", "v_cache"))]


def test_each_shard_gives_hidden_states_but_the_last() -> None:
    first, last = (model(shard) for shard in split_layers("m", 3, 2))
    hidden, none = first.generate(text(2, 5))
    assert none is None and hidden is not None and hidden.shape == (2, 5, CONFIG.embed_dim)
    none, found = last.generate(hidden_state=hidden)
    assert none is None and found is not None and found.shape == (2, 5, CONFIG.vocab_size)
    assert torch.equal(ShardChain([first, last]).generate(text(2, 5)), found)


def test_a_shard_has_caches_for_its_own_layers_only() -> None:
    first, last = (model(shard) for shard in split_layers("m", 3, 2))
    ShardChain([first, last]).generate(text(2, 5))
    for shard, num_layers in ((first, 2), (last, 1)):
        assert [list(cache.shape) for cache in caches(shard)] == [[2, 2, 13, 12]] * 2 * num_layers
    without = model(use_cache=False)
    without.generate(text(2, 5))
    assert caches(without) == []


def test_a_second_text_does_not_see_the_first() -> None:
    used = model()
    logits(used, text(2, 5, seed=1))
    logits(used, text(2, 1, seed=1), curr_pos=5)
    assert torch.equal(logits(used, text(2, 4)), logits(model(max_generated_tokens=9), text(2, 4)))


def test_caches_are_kept_while_they_fit_and_made_anew_when_not() -> None:
    used = model()
    logits(used, text(2, 5))
    before = [cache.data_ptr() for cache in caches(used)]
    logits(used, text(2, 3))
    assert [cache.data_ptr() for cache in caches(used)] == before and used.cache_length == 13
    for rows, length in ((2, 6), (3, 6)):
        found = logits(used, text(rows, length))
        assert used.cache_length == length + 8
        torch.testing.assert_close(found, logits(model(use_cache=False), text(rows, length)), atol=1e-5, rtol=1e-5)


def test_caches_are_no_longer_than_the_model_allows() -> None:
    used = model(max_generated_tokens=1000)
    logits(used, text(1, 5))
    assert used.cache_length == CONFIG.max_seq_len


def test_a_prompt_in_parts_is_the_prompt() -> None:
    used, tokens = model(), text(2, 9)
    parts = [logits(used, tokens[:, :4]), logits(used, tokens[:, 4:9], curr_pos=4)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model(use_cache=False), tokens), atol=1e-5, rtol=1e-5)


def test_a_mask_may_have_the_length_of_the_caches() -> None:
    used, tokens = model(), text(1, 3)
    short = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    long = torch.nn.functional.pad(short, (0, 8))
    assert torch.equal(logits(used, tokens, mask=short), logits(used, tokens, mask=long))
    assert torch.equal(logits(used, tokens, mask=short), logits(used, tokens))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("infuse", marks=pytest.mark.slow)])
def test_the_compiled_decoder_writes_the_same(backend: str) -> None:
    plain, compiled, tokens = model(whole_model("m", 1)), model(whole_model("m", 1)), text(2, 6)
    compiled.model.compile(backend=backend, fullgraph=True, dynamic=False)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        got, expected = (logits(each, tokens[:, start:end], curr_pos=start) for each in (compiled, plain))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": None}, "expected tokens and no hidden_state"),
        ({"hidden_state": torch.zeros(1, 3, 48)}, "expected tokens and no hidden_state"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"got tokens \[3\] of int64, expected \[B, S\]"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, r"got tokens \[1, 0\]"),
        ({"tokens": torch.zeros(1, 3)}, r"got tokens \[1, 3\] of float32"),
        ({"curr_pos": -1}, "got curr_pos=-1"),
        ({"curr_pos": 4}, "got curr_pos=4 and 1 rows, expected what the caches hold, 5 slots of 1 rows"),
        ({"curr_pos": 5, "tokens": text(2, 1)}, "got curr_pos=5 and 2 rows"),
        ({"curr_pos": 5, "tokens": text(1, 9)}, "got 9 tokens after 5, expected no more than the caches hold, 13"),
        ({"tokens": text(1, 65)}, "got a prompt of 65 tokens, expected no more than the caches hold, 64"),
        ({"mask": torch.ones(1, 3, 3)}, r"a mask \[1, 3, 3\] of float32, expected bool \[1, 3, 3 or 13\]"),
        ({"mask": torch.ones(1, 3, 4, dtype=torch.bool)}, r"a mask \[1, 3, 4\]"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"a mask \[3, 3\]"),
        ({"mask": torch.ones(2, 3, 3, dtype=torch.bool)}, r"a mask \[2, 3, 3\]"),
        ({"input_pos": torch.zeros(2, dtype=torch.int64)}, r"input_pos \[2\] of int64, expected int64 \[1, 3\]"),
        ({"input_pos": torch.zeros(3)}, "input_pos .* of float32"),
    ],
)
def test_wrong_inputs_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    used = model()
    logits(used, text(1, 5))
    before = [cache.clone() for cache in caches(used)]
    with pytest.raises(ValueError, match=message):
        used.generate(**{"tokens": text(1, 3)} | options)
    assert all(torch.equal(now, then) for now, then in zip(caches(used), before))
    logits(used, text(1, 1), curr_pos=5)  # the text goes on


def test_a_later_shard_needs_hidden_states() -> None:
    last = model(Shard("m", 1, 2, 3))
    for hidden, message in ((None, "layers 1-2: got no hidden_state"), (torch.zeros(1, 3, 47), r"\[1, 3, 47\]")):
        with pytest.raises(ValueError, match=message):
            last.generate(text(1, 3), hidden_state=hidden)


def test_without_caches_each_call_takes_the_whole_text() -> None:
    with pytest.raises(ValueError, match="got curr_pos=3, expected 0 without caches"):
        model(use_cache=False).generate(text(1, 1), curr_pos=3)
    with pytest.raises(ValueError, match="expected no more than the model takes, 64"):
        model(use_cache=False).generate(text(1, 65))


def test_after_a_failure_half_way_a_text_has_to_begin_anew() -> None:
    used = model()
    logits(used, text(1, 5))
    with pytest.raises(IndexError):
        used.generate(torch.tensor([[64]]), curr_pos=5)  # no such token
    with pytest.raises(ValueError, match="expected what the caches hold, nothing"):
        used.generate(text(1, 1), curr_pos=5)
    assert torch.equal(logits(used, text(1, 5)), logits(model(), text(1, 5)))


def test_a_chain_of_shards_that_is_no_model_is_refused() -> None:
    first, last = (model(shard) for shard in split_layers("m", 3, 2))
    with pytest.raises(ValueError, match="layers 0-1 are missing"):
        ShardChain([last, first])
    other = ShardedGeneralModel(dataclasses.replace(CONFIG, norm_eps=1e-6), last.shard)
    with pytest.raises(ValueError, match="different configurations"):
        ShardChain([first, other])


def test_no_tokens_to_generate_are_refused() -> None:
    with pytest.raises(ValueError, match="max_generated_tokens: got 0"):
        model(max_generated_tokens=0)
