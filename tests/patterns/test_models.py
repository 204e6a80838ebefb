"""Small models as their authors wrote them: exact counts, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.capture import MODES, assert_same_results, capture
from tests.patterns.torchtune_models import torchtune

COUNTS = {"rms_norm": 1, "add_rms_norm": 4, "swiglu": 2, "attention": 2, "rope": 4}


def hugging_face_llama(dtype: torch.dtype, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        use_cache=False,
        attn_implementation=attention,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(dtype)


def ids(length: int = 8) -> Tensor:
    return torch.randint(0, 32, (2, length))


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_torchtune_llama3(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(torchtune("llama3", dtype), ids(), training=training, dynamic=dynamic)
    assert captured.counts == COUNTS
    assert captured.refusals == []
    assert_same_results(captured, training)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchtune_llama3_with_a_cache(dtype: torch.dtype, length: int) -> None:
    model = torchtune("llama3", dtype)
    model.setup_caches(2, dtype)  # type: ignore[operator]
    mask = torch.ones(16, 16, dtype=torch.bool).tril()[:length].expand(2, length, 16)
    positions = torch.arange(length).expand(2, length)
    captured = capture(model, ids(length), mask=mask, input_pos=positions)
    assert captured.counts == COUNTS
    assert captured.refusals == []
    assert "add_" in captured.targets()  # the cache's position
    assert_same_results(captured)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES[1:3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face_llama(attention: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    model = hugging_face_llama(dtype, attention)
    captured = capture(lambda tokens: model(tokens).logits, ids(), training=training, dynamic=dynamic)
    assert captured.counts == COUNTS
    assert captured.refusals == []
    assert_same_results(captured, training)


def test_attention_weights_that_are_returned_are_refused() -> None:
    attention = hugging_face_llama(torch.float32, "eager").model.layers[0].self_attn  # type: ignore[union-attr]
    rotary = torch.ones(2, 8, 8)
    captured = capture(lambda x: attention(x, (rotary, rotary), None), torch.randn(2, 8, 32))  # type: ignore[operator]
    assert captured.counts == {"rope": 2}
    assert captured.refusals == ["the attention probabilities are read elsewhere"]
    assert_same_results(captured)
