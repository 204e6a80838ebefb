"""Hugging Face's models from tiny configurations: the names of sizes that a configuration knows are set, no more."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry, Inputs, token_ids

# Sizes by the names that configurations use. intermediate differs from all else, so that no shape fits by chance.
SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    "vocab_size": 128,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 16,
    "patch_size": 4,
}
DROPOUTS = (
    "dropout attention_dropout hidden_dropout activation_dropout attn_pdrop embd_pdrop resid_pdrop dropout_rate "
    "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout qa_dropout seq_classif_dropout drop_path_rate "
    "emb_pdrop attn_drop layerdrop encoder_layerdrop decoder_layerdrop embedding_dropout mlp_dropout "
    "hidden_dropout_rate feat_proj_dropout final_dropout attention_probs_dropout drop_rate attn_dropout "
    "feat_quantizer_dropout mask_time_prob mask_feature_prob resid_dropout embed_dropout mlp_drop embd_drop "
    "resid_drop"
)


def transformers() -> Any:
    return importlib.import_module("transformers")


def configuration(config_class: str, **changes: Any) -> Any:
    """A tiny configuration: SIZES and zero dropout where the class knows the name, then the changes."""
    cls = getattr(transformers(), config_class)
    known = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "attribute_map", {}))
    values = {name: value for name, value in {**SIZES, **dict.fromkeys(DROPOUTS.split(), 0.0)}.items() if name in known}
    mapped = set(getattr(cls, "attribute_map", {}).values())
    values = {
        name: value
        for name, value in values.items()
        if not (name in getattr(cls, "attribute_map", {}) and cls.attribute_map[name] in values and name not in mapped)
    }
    return cls(**{**values, **changes})


def build(model_class: str, config: Callable[[], Any], attention: str) -> Callable[[], nn.Module]:
    """A model of a class (an Auto class or a model's own) with random weights."""

    def make() -> nn.Module:
        cls = getattr(transformers(), model_class)
        made = config()
        extra = {"attn_implementation": attention} if attention else {}
        model: nn.Module = (
            cls.from_config(made, **extra) if model_class.startswith("Auto") else _direct(cls, made, attention)
        )
        return model

    return make


def _direct(cls: Any, config: Any, attention: str) -> nn.Module:
    if attention:
        config._attn_implementation = attention
    model: nn.Module = cls(config)
    return model


def text(length: int = 8, **more: Any) -> Callable[[], Inputs]:
    """input_ids, and what else the model wants, made by calling it if it can be called."""
    return lambda: ((), {"input_ids": token_ids(length), **_made(more)})


def padded_text(length: int = 8, **more: Any) -> Callable[[], Inputs]:
    """input_ids with an attention mask that hides the first two tokens of the second row."""

    def inputs() -> Inputs:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :2] = 0
        return (), {"input_ids": token_ids(length), "attention_mask": mask, **_made(more)}

    return inputs


def pixels(size: int = 16, channels: int = 3, **more: Any) -> Callable[[], Inputs]:
    return lambda: ((), {"pixel_values": torch.randn(2, channels, size, size), **_made(more)})


def _made(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in values.items()}


def family(
    name: str,
    config_class: str,
    model_class: str,
    inputs: Callable[[], Inputs],
    attentions: tuple[str, ...] = ("eager", "sdpa"),
    discrete: bool = False,
    random: bool = False,
    **changes: Any,
) -> list[Entry]:
    """One entry for each attention implementation."""
    config = lambda: configuration(config_class, **_made(changes))  # noqa: E731
    return [
        Entry(
            f"huggingface/{name}" + (f"-{attention}" if attention else ""),
            build(model_class, config, attention),
            inputs,
            discrete=discrete,
            random=random,
        )
        for attention in attentions
    ]
