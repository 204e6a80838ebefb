"""Hugging Face's decoders with a static cache, and the decoders that Infuse's own commands build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, Inputs, token_ids
from zoo.huggingface import build, configuration, transformers

PROMPT, CACHE, BATCH = 5, 12, 2
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {}),
}


class WithStaticCache(nn.Module):
    """A decoder and its cache, which follows the module's dtype."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cache: Any = None

    def fill(self) -> None:
        """Writes a prompt to a fresh cache."""
        self.cache = transformers().StaticCache(config=self.model.config, max_cache_len=CACHE)
        with torch.no_grad():
            self(token_ids(PROMPT, BATCH))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> WithStaticCache:
        result: WithStaticCache = super()._apply(function, recurse)
        for layer in getattr(self.cache, "layers", ()):
            if layer.is_initialized:
                layer.keys, layer.values = function(layer.keys), function(layer.values)
        return result

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, past_key_values=self.cache, use_cache=True).logits
        return logits


def _fill(module: nn.Module, dtype: torch.dtype) -> None:
    assert isinstance(module, WithStaticCache)
    module.fill()


def _cached(config: str, changes: dict[str, Any], attention: str) -> Callable[[], nn.Module]:
    make = build("AutoModelForCausalLM", lambda: configuration(config, **changes), attention)
    return lambda: WithStaticCache(make())


def _next_token() -> Inputs:
    return (token_ids(1, BATCH),), {}


def _tokens() -> Inputs:
    return (token_ids(8, BATCH),), {}


def _own(make: str) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        from infuse.models import llama

        result: nn.Module = getattr(llama, make)(llama.TINY)
        return result

    return model


def entries() -> Iterator[Entry]:
    for name, (config, changes) in _FAMILIES.items():
        for attention in ("eager", "sdpa"):
            model = _cached(config, changes, attention)
            yield Entry(f"huggingface/{name}-static-cache-{attention}", model, _next_token, trains=False, prepare=_fill)
    for make in ("torchtune_llama3", "hugging_face_llama"):
        yield Entry(f"infuse/{make}", _own(make), _tokens)
