"""The sizes of the decoders that benchmarks measure, and how much work they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes; vocab_size 0 is no model."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab_size: int
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.kv_heads

    def matmul_weights(self) -> int:
        """Elements of all matrices that a token is multiplied with, the output head's among them."""
        layer = 2 * self.dim * self.dim + 2 * self.dim * self.kv_dim + 3 * self.dim * self.hidden
        return self.layers * layer + self.dim * self.vocab_size

    def cache_elements(self, length: int) -> int:
        """Of the keys and values of one sequence, over all layers."""
        return 2 * self.layers * self.kv_dim * length

    def attention_flops(self, pairs: int) -> int:
        """Both products, over all layers, for that many pairs of a query and a key that it attends to."""
        return 4 * self.layers * self.dim * pairs


def llama_8b(layers: int) -> Shape:
    """Llama-3.1-8B with some of its 32 layers."""
    return Shape(f"llama-8b {layers} layers", 4096, layers, 32, 8, 14336, 128256, torch.bfloat16)


# All of Qwen2.5-0.5B.
QWEN = Shape("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151936, torch.bfloat16)
SMALL = Shape("llama-small 4 layers", 256, 4, 8, 4, 768, 512, torch.float32)
TINY = Shape("llama-tiny 1 layer", 64, 1, 4, 2, 128, 128, torch.float32)
