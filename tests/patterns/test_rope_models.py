"""The rotary embeddings of small models as their authors wrote them: q's and k's in each layer, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import assert_same_results, capture
from tests.patterns.torchtune_models import torchtune

LAYERS = 2
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "use_cache": False,
}
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4, "n_positions": 64, "n_ctx": 64}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": LAYERS,
}
HALVES, INTERLEAVED = "halves, x * cos + rotated * sin", "interleaved, x * cos + rotated * sin"
HUGGING_FACE: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, HALVES),
    "gpt_neox": ({"hidden_size": 64, "rotary_pct": 0.25}, f"{HALVES}, 4 of 16 elements"),
    "gptj": (GPT, f"{INTERLEAVED}, 4 of 8 elements"),
    "codegen": (GPT, f"{INTERLEAVED}, 4 of 8 elements"),
    "phi": ({}, f"{HALVES}, 4 of 8 elements"),
    "qwen3": ({"head_dim": 8}, HALVES),
    "gemma3_text": ({"head_dim": 8}, HALVES),
    "cohere": ({}, INTERLEAVED),
    "glm": ({"head_dim": 8}, f"{INTERLEAVED}, 4 of 8 elements"),
    "deepseek_v3": (LATENT, "halves, x1 * cos - x2 * sin"),
    "llama4_text": ({"head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": []}, "interleaved, complex"),
}


def hugging_face(name: str, sizes: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **sizes})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().to(dtype)


def check(function: Any, spelling: str, training: bool, dynamic: bool) -> None:
    tokens = torch.randint(1, 32, (2, 8))
    captured = capture(function, tokens, training=training, dynamic=dynamic, settings=Settings(patterns=("rope",)))
    assert captured.counts == {"rope": 2 * LAYERS} and captured.refusals == []
    assert {words.removesuffix(", in float32") for words in captured.spellings} == {spelling}
    assert_same_results(captured, training)


@pytest.mark.parametrize(("name", "sizes", "spelling"), [(k, *v) for k, v in HUGGING_FACE.items()], ids=HUGGING_FACE)
@pytest.mark.parametrize("training", [False, True])
def test_hugging_face(name: str, sizes: dict[str, Any], spelling: str, training: bool) -> None:
    model = hugging_face(name, sizes, torch.float32 if training else torch.bfloat16)

    def logits(tokens: Tensor) -> Tensor:
        return model(tokens).logits  # type: ignore[no-any-return]

    check(logits, spelling, training, dynamic=not training)


@pytest.mark.parametrize(
    ("name", "spelling"), [("llama3", "interleaved, x1 * cos - x2 * sin"), ("qwen2", HALVES), ("phi3", HALVES)]
)
@pytest.mark.parametrize("training", [False, True])
def test_torchtune(name: str, spelling: str, training: bool) -> None:
    check(torchtune(name, torch.bfloat16 if training else torch.float32), spelling, training, dynamic=training)
