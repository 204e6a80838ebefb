"""Every norm of small Hugging Face models is found: LayerNorm, RMSNorm of each family, gated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.capture import capture

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
HEADS = {"head_dim": 8, "num_key_value_heads": 2}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4}


def tokens() -> Tensor:
    return torch.randint(3, 60, (2, 8))


def text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def text_pair() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens()}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def sound() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens()}


# family: (configuration, its arguments, inputs, norms)
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]], dict[str, int]]] = {
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
        text,
        {"layer_norm": 1, "add_layer_norm": 4},
    ),
    "bert": ("Bert", TEXT, text, {"layer_norm": 1, "add_layer_norm": 4}),
    "opt": ("OPT", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, text, {"add_layer_norm": 5}),
    "vit": ("ViT", {**SIZES, "image_size": 16, "patch_size": 8}, image, {"layer_norm": 1, "add_layer_norm": 4}),
    "clip text": ("CLIPText", {**TEXT, "eos_token_id": 2}, text, {"layer_norm": 1, "add_layer_norm": 4}),
    "whisper": (
        "Whisper",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        sound,
        {"layer_norm": 1, "add_layer_norm": 11},
    ),
    "bart": ("Bart", {**SEQ2SEQ, "max_position_embeddings": 32}, text, {"layer_norm": 1, "add_layer_norm": 11}),
    "t5": (
        "T5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
        text_pair,
        {"rms_norm": 2, "add_rms_norm": 10},
    ),
    "modernbert": ("ModernBert", TEXT, text, {"layer_norm": 1, "add_layer_norm": 4}),
    "gpt_neox": ("GPTNeoX", TEXT, text, {"layer_norm": 3, "add_layer_norm": 2}),
    "olmo": ("Olmo", TEXT, text, {"layer_norm": 1, "add_layer_norm": 4}),
    "olmo2": ("Olmo2", TEXT, text, {"rms_norm": 8, "add_rms_norm": 1}),
    "cohere": ("Cohere", {**TEXT, "use_qk_norm": True}, text, {"layer_norm": 5, "add_layer_norm": 2}),
    "gemma3": ("Gemma3Text", {**TEXT, **HEADS}, text, {"rms_norm": 9, "add_rms_norm": 4}),
    "nemotron": ("Nemotron", {**TEXT, **HEADS}, text, {"layer_norm": 1, "add_layer_norm": 4}),
    "mamba2": ("Mamba2", {**TEXT, **MAMBA2}, text, {"rms_norm": 2, "add_rms_norm": 1, "gated_rms_norm": 2}),
}


def build(family: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    name, arguments, inputs, _ = MODELS[family]
    config = getattr(transformers, f"{name}Config")(**arguments)
    model: nn.Module = getattr(transformers, f"{name}Model")(config).to(dtype).eval()
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs().items()}
    return model, given


@pytest.mark.parametrize("family", MODELS)
def test_every_norm_becomes_an_operator(family: str) -> None:
    model, inputs = build(family, torch.bfloat16)
    captured = capture(lambda given: model(**given).last_hidden_state, inputs)
    assert {kind: count for kind, count in captured.counts.items() if "norm" in kind} == MODELS[family][3]
    refused = [record for record in captured.records if record.status == "refused" and "norm" in record.kind]
    assert refused == []
