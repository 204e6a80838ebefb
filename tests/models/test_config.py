"""What a model's name decides where the configuration says nothing, and values that are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from infuse.models.config import has_attention_bias, has_tied_head, rotates_halves
from tests.models.configs import CONFIG


@pytest.mark.parametrize(
    ("model_id", "halves", "bias", "tied"),
    [
        ("meta-llama/Llama-3.1-8B", False, False, False),
        ("llama-3.2-1b", False, False, True),
        ("Qwen/Qwen2.5-0.5B-Instruct", True, True, True),
        ("qwen-2.5-7b", True, True, False),
        ("mistral-7b", False, False, False),
    ],
)
def test_the_name_decides_what_the_configuration_leaves_open(
    model_id: str, halves: bool, bias: bool, tied: bool
) -> None:
    assert rotates_halves(CONFIG, model_id) is halves
    assert has_attention_bias(CONFIG, model_id) is bias
    assert has_tied_head(CONFIG, model_id) is tied


def test_the_configuration_comes_before_the_name() -> None:
    config = dataclasses.replace(CONFIG, model_type="llama", attn_bias=False, tie_word_embeddings=False)
    name = "distilled-qwen-0.5b"
    assert not rotates_halves(config, name)
    assert not has_attention_bias(config, name)
    assert not has_tied_head(config, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"norm_eps": -1.0}, "norm_eps: got -1.0"),
        ({"num_kv_heads": 3}, "num_heads, num_kv_heads: got 4 and 3"),
        ({"embed_dim": 50}, "embed_dim, num_heads: got 50 and 4"),
        ({"head_dim": 11}, "head_dim: got 11, expected an even"),
        ({"hidden_act": "tanh"}, "hidden_act: got 'tanh', expected one of silu"),
        ({"torch_dtype": torch.float64}, "torch_dtype: got torch.float64"),
        ({"attn_dropout": 1.0}, "attn_dropout: got 1.0"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"sliding_window": 4, "model_type": "llama"}, "a Llama has no window"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor: got 0.5"),
        ({"rope_scaling_factor": 8.0, "rope_low_freq_factor": 4.0}, "got 4.0 and 4.0, expected 0 < low < high"),
    ],
)
def test_values_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
