"""Small models that compile in seconds and hold one site of each kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HandWrittenNorm(nn.Module):
    """RMSNorm as Hugging Face's Llama spells it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Block(nn.Module):
    """norm, attention, residual add + norm, gated MLP: one site of each kind."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = HandWrittenNorm(dim), HandWrittenNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*sizes) for sizes in ((dim, 48), (dim, 48), (48, dim)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, 4, dim // 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + out.transpose(1, 2).reshape(batch, length, dim)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


SITES = {"rms_norm": 1, "add_rms_norm": 1, "attention": 1, "swiglu": 1}
