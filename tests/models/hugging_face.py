"""Small decoders of transformers with weights that matter, saved as folders: the oracle of the sharded decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse.models.extras import import_extra, quiet_imports

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Name -> architecture and what differs from SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3_scaled": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_biases_gelu": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4},
    ),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("Mistral", {"sliding_window": 6}),
}


def make_model(family: str, seed: int = 0) -> nn.Module:
    """In fp32 and evaluation mode. Every parameter is random, so that a norm, bias or head that is mixed up shows."""
    transformers = import_extra("transformers")
    name, change = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | change, attn_implementation="eager")
    with torch.random.fork_rng(devices=()), quiet_imports():
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            # The scale keeps activations near 1 and makes softmax choose: with 0.02 attention is close to a mean.
            std = 0.3 if "norm" in parameter_name or "bias" in parameter_name else 1.2 * parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=std)
    return model


def save_model(model: nn.Module, folder: Path, max_shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
    return folder


@torch.no_grad()
def reference_logits(model: nn.Module, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
    """[B, S, V] of one pass over whole texts, without a cache; rows are padded on the left."""
    if padding is None:
        output = model(input_ids=tokens, use_cache=False)
    else:
        slots = torch.arange(tokens.shape[1])[None]
        mask = (slots >= padding[:, None]).long()
        place = (slots - padding[:, None]).clamp_min(0)
        output = model(input_ids=tokens, attention_mask=mask, position_ids=place, use_cache=False)
    logits: Tensor = output.logits
    return logits
