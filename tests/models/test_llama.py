"""The decoders of both libraries: the sizes that were asked for, the same weights for the same seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from infuse.models.llama import TINY, LlamaConfig, hugging_face_llama, num_parameters, torchtune_llama3

pytest.importorskip("torchtune")
pytest.importorskip("transformers")


def expected_parameters(config: LlamaConfig) -> int:
    kv_dim = config.num_kv_heads * config.head_dim
    attention = 2 * config.embed_dim * (config.embed_dim + kv_dim)
    layer = attention + 3 * config.embed_dim * config.intermediate_dim + 2 * config.embed_dim
    return config.num_layers * layer + 2 * config.vocab_size * config.embed_dim + config.embed_dim


@pytest.mark.parametrize("make", [torchtune_llama3, hugging_face_llama])
def test_decoder_has_the_sizes_of_its_config(make: object) -> None:
    config = dataclasses.replace(TINY, num_layers=2)
    model = make(config)  # type: ignore[operator]
    assert num_parameters(model) == expected_parameters(config)
    tokens = torch.zeros(2, config.max_seq_len, dtype=torch.int64)
    output = model(tokens)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    assert logits.shape == (2, config.max_seq_len, config.vocab_size)


def test_weights_follow_from_the_seed_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (torchtune_llama3(TINY, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"num_kv_heads": 3}, "num_heads, num_kv_heads: got 4 and 3"),
        ({"num_heads": 5, "num_kv_heads": 5}, "embed_dim, num_heads: got 32 and 5"),
        ({"embed_dim": 12}, "got 3, expected an even number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
