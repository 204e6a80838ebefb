"""Where the measured decoders come from: torchtune, Hugging Face, and gpt-fast's style; weights are random.

A source builds a model of a shape, and says how its author's users call it: for a whole sequence, and for one token
into a static cache. The functions that are compiled hold no more than that call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from device import Device
from gpt_fast import Transformer
from harness import Function, Inputs
from implementations import Later, optional
from model_shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Source:
    """How models of one origin are built and called.

    build: (shape, max_seq_len, batch of the static caches, 0 for none) -> module, on the default device.
    logits: module -> function of tokens [batch, length].
    step: module -> function of what step_inputs makes of (tokens [batch, 1], cache's length, position).
    rewind: the next step writes at that position.
    """

    name: str
    build: Callable[[Shape, int, int], nn.Module]
    logits: Callable[[Any], Function]
    step: Callable[[Any], Function]
    step_inputs: Callable[[Tensor, int, int], Inputs]
    rewind: Callable[[nn.Module, int], None]


class Model:
    """A model of one shape that is built when it is first needed, and its copy in fp64."""

    def __init__(self, source: Source, shape: Shape, device: Device, max_seq_len: int, cache_batch: int = 0) -> None:
        self.source = source
        self.shape = shape
        self.device = device
        self.max_seq_len = max_seq_len
        self.cache_batch = cache_batch
        self._module: nn.Module | None = None

    @property
    def name(self) -> str:
        return f"{self.source.name} {self.shape.name}"

    def get(self) -> nn.Module:
        if self._module is None:
            with self.device.torch_device:
                module = self.source.build(self.shape, self.max_seq_len, self.cache_batch)
            self._module = randomise(module, self.shape.dtype)
        return self._module

    def exact(self) -> nn.Module:
        return copy.deepcopy(self.get()).double()

    def logits(self, module: nn.Module | None = None) -> Function:
        return self.source.logits(module or self.get())

    def loss(self, module: nn.Module | None = None) -> Function:
        return loss_of(self.logits(module))

    def step(self, module: nn.Module | None = None) -> Function:
        return self.source.step(module or self.get())

    def rewind(self, position: int, module: nn.Module | None = None) -> None:
        self.source.rewind(module or self.get(), position)

    def releasing(self, *functions: Later) -> Callable[[], None]:
        """What gives its memory back, functions of it forgotten; it is built anew when it is needed again."""

        def release() -> None:
            for function in functions:
                function.forget()
            self._module = None

        return release


def randomise(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Norm weights around one, as trained ones are, and biases around zero; the rest as its authors initialise it."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
    return module.to(dtype).eval()


def loss_of(logits: Function) -> Function:
    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        found = logits(tokens)
        assert isinstance(found, Tensor)
        return F.cross_entropy(found.flatten(0, 1).float(), targets.flatten())

    return loss


def torchtune_sizes(shape: Shape, max_seq_len: int) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "embed_dim": shape.dim,
        "intermediate_dim": shape.hidden,
        "max_seq_len": max_seq_len,
    }


def torchtune_llama(shape: Shape, max_seq_len: int, cache_batch: int) -> nn.Module:
    llama3 = optional("torchtune.models.llama3").llama3
    module: nn.Module = llama3(**torchtune_sizes(shape, max_seq_len))
    return torchtune_caches(module, shape, max_seq_len, cache_batch)


def torchtune_qwen(shape: Shape, max_seq_len: int, cache_batch: int) -> nn.Module:
    """With biases on q, k and v, and the embedding's matrix as the head's."""
    qwen2 = optional("torchtune.models.qwen2").qwen2
    module: nn.Module = qwen2(**torchtune_sizes(shape, max_seq_len), norm_eps=1e-6, tie_word_embeddings=True)
    nn.init.normal_(module.get_parameter("tok_embeddings.weight"), std=0.02)
    return torchtune_caches(module, shape, max_seq_len, cache_batch)


def torchtune_caches(module: Any, shape: Shape, max_seq_len: int, cache_batch: int) -> nn.Module:
    if cache_batch:
        module.setup_caches(cache_batch, shape.dtype, decoder_max_seq_len=max_seq_len)
    for cache in caches_of(module):
        cache.k_cache.normal_()
        cache.v_cache.normal_()
    assert isinstance(module, nn.Module)
    return module


def caches_of(module: nn.Module) -> list[Any]:
    return [child for child in module.modules() if hasattr(child, "cache_pos")]


def torchtune_rewind(module: nn.Module, position: int) -> None:
    for cache in caches_of(module):
        cache.cache_pos.copy_(torch.arange(cache.cache_pos.numel(), device=cache.cache_pos.device) + position)


def torchtune_logits(module: Any) -> Function:
    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = module(tokens)
        return found

    return logits


def torchtune_step(module: Any) -> Function:
    def step(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = module(tokens, mask=mask, input_pos=positions)
        return found

    return step


def cache_mask(tokens: Tensor, length: int, position: int) -> Tensor:
    """One row over the cache for each sequence, [batch, 1, length]: what is filled, and the token itself."""
    row = torch.arange(length, device=tokens.device) <= position
    return row.expand(tokens.shape[0], 1, length).contiguous()


def torchtune_step_inputs(tokens: Tensor, length: int, position: int) -> Inputs:
    return tokens, cache_mask(tokens, length, position), torch.full_like(tokens, position)


class WithStaticCache(nn.Module):
    """A Hugging Face model and its static cache, which moves and changes its dtype with it."""

    def __init__(self, model: Any, shape: Shape, length: int, batch: int) -> None:
        super().__init__()
        self.model = model
        self.cache = optional("transformers").StaticCache(config=model.config, max_cache_len=length)
        device = torch.get_default_device()
        self.cache.early_initialization(batch, shape.kv_heads, shape.head_dim, shape.dtype, device)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithStaticCache:
        super()._apply(fn, recurse)
        for layer in self.cache.layers:
            layer.keys, layer.values = fn(layer.keys), fn(layer.values)
        return self


def hugging_face_llama(attention: str) -> Callable[[Shape, int, int], nn.Module]:
    def build(shape: Shape, max_seq_len: int, cache_batch: int) -> nn.Module:
        transformers = optional("transformers")
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max_seq_len,
            use_cache=False,
            attn_implementation=attention,
        )
        module: nn.Module = transformers.LlamaForCausalLM(config)
        return WithStaticCache(module, shape, max_seq_len, cache_batch) if cache_batch else module

    return build


def hugging_face_logits(module: Any) -> Function:
    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = module(input_ids=tokens).logits
        return found

    return logits


def hugging_face_step(module: Any) -> Function:
    """As generate() calls it: it makes mask and positions outside the compiled forward."""
    model, cache = module.model, module.cache

    def step(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        return found

    return step


def hugging_face_step_inputs(tokens: Tensor, length: int, position: int) -> Inputs:
    return tokens, cache_mask(tokens, length, position)[:, None], torch.full_like(tokens, position)


def hugging_face_rewind(module: Any, position: int) -> None:
    for layer in module.cache.layers:
        layer.cumulative_length.fill_(position)


def gpt_fast_llama(shape: Shape, max_seq_len: int, cache_batch: int) -> nn.Module:
    module = Transformer(shape, max_seq_len)
    if cache_batch:
        module.set_up_caches(cache_batch)
    return module


def gpt_fast_logits(module: Any) -> Function:
    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = module(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        return found

    return logits


def gpt_fast_step(module: Any) -> Function:
    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = module(tokens, positions)
        return found

    return step


def gpt_fast_step_inputs(tokens: Tensor, length: int, position: int) -> Inputs:
    return tokens, torch.full((1,), position, device=tokens.device)


def _nothing_to_rewind(module: nn.Module, position: int) -> None:
    pass


_TORCHTUNE = (torchtune_logits, torchtune_step, torchtune_step_inputs, torchtune_rewind)
_HUGGING_FACE = (hugging_face_logits, hugging_face_step, hugging_face_step_inputs, hugging_face_rewind)
TORCHTUNE_LLAMA = Source("torchtune", torchtune_llama, *_TORCHTUNE)
TORCHTUNE_QWEN = Source("torchtune", torchtune_qwen, *_TORCHTUNE)
HUGGING_FACE_SDPA = Source("huggingface", hugging_face_llama("sdpa"), *_HUGGING_FACE)
HUGGING_FACE_EAGER = Source("huggingface eager-attention", hugging_face_llama("eager"), *_HUGGING_FACE)
GPT_FAST = Source("gpt-fast", gpt_fast_llama, gpt_fast_logits, gpt_fast_step, gpt_fast_step_inputs, _nothing_to_rewind)
