"""Llama-3 decoders of any size from torchtune and from Hugging Face, with random weights: nothing is downloaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from infuse.models.extras import import_extra, quiet_imports


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The sizes of a Llama-3 decoder. num_heads is a multiple of num_kv_heads, embed_dim one of num_heads.

    Raises ValueError for sizes that are not positive or don't divide.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_base: int = 500_000

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                raise ValueError(f"LlamaConfig.{name}: got {value}, expected more than 0")
        for whole, part in (("num_heads", "num_kv_heads"), ("embed_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                got = f"got {getattr(self, whole)} and {getattr(self, part)}"
                raise ValueError(
                    f"LlamaConfig: {whole}, {part}: {got}, expected the first to be a multiple of the second"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig: embed_dim / num_heads: got {self.head_dim}, expected an even number (rotary)"
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


# The names that the command line knows: a decoder that learns to write in a minute on two cores, and a toy.
SMALL = LlamaConfig(
    256, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=128, intermediate_dim=512, max_seq_len=128
)
TINY = LlamaConfig(256, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, intermediate_dim=64, max_seq_len=64)


def torchtune_llama3(config: LlamaConfig, seed: int = 0) -> nn.Module:
    """torchtune's Llama-3: tokens [B, S] int64 -> logits [B, S, vocab_size] fp32; the weights follow from the seed.

    Raises ModuleNotFoundError when torchtune (extra `models`) is not installed.
    """
    llama3 = import_extra("torchtune.models.llama3").llama3
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model: nn.Module = llama3(
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            embed_dim=config.embed_dim,
            intermediate_dim=config.intermediate_dim,
            max_seq_len=config.max_seq_len,
            norm_eps=config.norm_eps,
            rope_base=config.rope_base,
        )
        # torchtune expects to load a checkpoint and leaves torch's default, in which training starts slowly.
        nn.init.normal_(model.get_parameter("tok_embeddings.weight"), std=0.02)
    return model


def hugging_face_llama(config: LlamaConfig, seed: int = 0) -> nn.Module:
    """Hugging Face's LlamaForCausalLM with SDPA: input_ids [B, S] int64 -> an output with logits [B, S, vocab_size].

    Raises ModuleNotFoundError when transformers (extra `models`) is not installed.
    """
    transformers = import_extra("transformers")
    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        hidden_size=config.embed_dim,
        intermediate_size=config.intermediate_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rope_base)},
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.random.fork_rng(devices=()), quiet_imports():  # it imports torchao when it makes a model
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(sizes)
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
