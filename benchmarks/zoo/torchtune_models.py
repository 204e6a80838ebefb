"""torchtune's families, with and without a KV cache. transformers is imported ahead of stand-ins for torchvision."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import torch
from torch import nn

from zoo.entry import Entry, Inputs, token_ids

LAYERS, LENGTH, BATCH, CACHE = 2, 8, 2, 16
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "num_layers": LAYERS,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": CACHE,
}
# name: (module, builder, what differs from _SIZES)
_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("llama2", "llama2", {"num_kv_heads": 4}),
    "llama3": ("llama3", "llama3", {}),
    "llama3_1": ("llama3_1", "llama3_1", {}),
    "llama3_2": ("llama3_2", "llama3_2", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2_5": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", "mistral", {}),
    "gemma": ("gemma", "gemma", {"head_dim": 16, "num_kv_heads": 1}),
    "gemma2": ("gemma2", "gemma2", {"head_dim": 16, "sliding_window_size": 4, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", "phi3", {}),
    "llama3-lora": (
        "llama3",
        "lora_llama3",
        {
            "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": 4,
            "lora_alpha": 8.0,
        },
    ),
    "qwen2-lora": (
        "qwen2",
        "lora_qwen2",
        {"lora_attn_modules": ["q_proj", "k_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8.0},
    ),
}


def builder(module: str, name: str) -> Callable[..., nn.Module]:
    """A builder of torchtune's; its vision transforms are left out where torchvision isn't installed."""
    path = f"torchtune.models.{module}"
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if "torchvision" not in str(error):
            raise
        importlib.import_module("transformers")  # it asks whether torchvision is installed, once
        names = ["torchvision", "torchvision.transforms"]
        names += [
            "torchvision.transforms.v2",
            "torchvision.transforms.v2.functional",
            "torchvision.transforms.functional",
        ]
        stubs = {stub: mock.MagicMock(__spec__=ModuleSpec(stub, None), __path__=[]) for stub in names}
        with mock.patch.dict(sys.modules, stubs):
            found = importlib.import_module(f"{path}._component_builders")
    return getattr(found, name)  # type: ignore[no-any-return]


def _decoder(module: str, name: str, changes: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: builder(module, name)(**{**_SIZES, **changes})


def _tokens() -> Inputs:
    return (token_ids(LENGTH, BATCH),), {}


def _cached(start: int, length: int) -> Callable[[], Inputs]:
    """`length` tokens that go to positions `start` and on, with a mask over the whole cache."""

    def inputs() -> Inputs:
        mask = torch.ones(CACHE, CACHE, dtype=torch.bool).tril()[start : start + length].expand(BATCH, length, CACHE)
        return (token_ids(length, BATCH),), {
            "mask": mask.contiguous(),
            "input_pos": torch.arange(start, start + length).expand(BATCH, length).contiguous(),
        }

    return inputs


def _set_up_caches(module: nn.Module, dtype: torch.dtype) -> None:
    module.setup_caches(BATCH, dtype, decoder_max_seq_len=CACHE)  # type: ignore[operator]
    for child in module.modules():
        if hasattr(child, "k_cache"):
            torch.nn.init.normal_(child.k_cache)  # type: ignore[arg-type]
            torch.nn.init.normal_(child.v_cache)  # type: ignore[arg-type]


def _set_up_and_move(module: nn.Module, dtype: torch.dtype) -> None:
    """As after a prompt of seven tokens."""
    _set_up_caches(module, dtype)
    for child in module.modules():
        if hasattr(child, "cache_pos"):
            child.cache_pos += 7  # type: ignore[operator]


def entries() -> Iterator[Entry]:
    for name, (module, build, changes) in _DECODERS.items():
        make = _decoder(module, build, changes)
        yield Entry(f"torchtune/{name}", make, _tokens)
        if "lora" not in name:
            yield Entry(f"torchtune/{name}-prefill", make, _cached(0, 7), trains=False, prepare=_set_up_caches)
            yield Entry(f"torchtune/{name}-decode", make, _cached(7, 1), trains=False, prepare=_set_up_and_move)
    yield Entry("torchtune/llama3-mask", _decoder("llama3", "llama3", {}), _masked)
    t5 = {"embed_dim": 64, "mlp_dim": 96, "num_heads": 4, "head_dim": 16, "num_layers": LAYERS, "vocab_size": 128}
    t5 |= {"rel_pos_num_buckets": 8, "rel_pos_max_dist": 16, "norm_eps": 1e-6, "max_seq_len": LENGTH}
    yield Entry("torchtune/t5-encoder", lambda: builder("t5", "t5_encoder")(**t5), _tokens)
    text = {"embed_dim": 64, "num_heads": 4, "num_layers": LAYERS, "vocab_size": 128, "max_seq_len": LENGTH}
    yield Entry("torchtune/clip-text", lambda: builder("clip", "clip_text_encoder")(**text), _tokens)
    vision = {"tile_size": 16, "patch_size": 4, "embed_dim": 64, "num_layers": LAYERS, "num_heads": 4}
    vision |= {"cls_output_dim": 32, "max_num_tiles": 2}
    yield Entry("torchtune/clip-vision", lambda: builder("clip", "clip_vision_encoder")(**vision), _tiles)


def _masked() -> Inputs:
    """A packed batch: a block-diagonal causal mask."""
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool().tril()
    return (token_ids(LENGTH, BATCH),), {"mask": mask.expand(BATCH, LENGTH, LENGTH).contiguous()}


def _tiles() -> Inputs:
    return (torch.randn(1, 1, 2, 3, 16, 16), torch.tensor([[[1, 2]]])), {}
