"""What turns text and tabular features into vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infuse.models.mahia.attention import MetaAttentionKernel
from infuse.models.mahia.checks import require_features, require_mask, require_positive
from infuse.models.mahia.feed_forward import GatedFeedForward
from infuse.models.mahia.hyena import HyenaBlock


class TextEncoder(nn.Module):
    """tokens [B, L] int64, L at most seq_len -> [B, L, D]: embeddings, then HyenaBlock and MetaAttentionKernel in turn.

    mask: bool [B, L], true where there is a token. Padding may stand before or behind a text, not inside: a text gives
    what it gives alone, and what stands in the padding's place means nothing.
    Raises ValueError for sizes that are not positive and for tokens or a mask of another shape, length or dtype; a
    token outside the vocabulary is IndexError on the CPU.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        dim: int,
        num_layers: int = 1,
        kernel_size: int = 31,
        use_cuda_kernels: bool = False,
    ) -> None:
        super().__init__()
        require_positive("TextEncoder", vocab_size=vocab_size, seq_len=seq_len, dim=dim, num_layers=num_layers)
        self.seq_len = seq_len
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.randn(seq_len, dim) * 0.1)
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            self.layers.append(HyenaBlock(dim, kernel_size))
            self.layers.append(MetaAttentionKernel(dim, use_cuda_kernels=use_cuda_kernels))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if tokens.dim() != 2 or not 0 < tokens.shape[1] <= self.seq_len:
            raise ValueError(f"TextEncoder: tokens: got shape {tuple(tokens.shape)}, expected [B, 1..{self.seq_len}]")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"TextEncoder: tokens: got {tokens.dtype}, expected torch.int64 or torch.int32")
        require_mask("TextEncoder", mask, tokens.shape)
        positions = self.positions[: tokens.shape[1]]
        if mask is not None:
            positions = positions[(mask.cumsum(-1) - 1).clamp(min=0)]
        x: Tensor = self.tokens(tokens) + positions
        for layer in self.layers:
            x = layer(x, mask)
        out: Tensor = self.norm(x)
        return out


class TabularEncoder(nn.Module):
    """features [B, tab_dim] -> [B, D]: a linear, residual gated MLPs, a norm.

    Raises ValueError for sizes that are not positive and for features of another shape.
    """

    def __init__(self, tab_dim: int, dim: int, num_layers: int = 1) -> None:
        super().__init__()
        require_positive("TabularEncoder", tab_dim=tab_dim, dim=dim, num_layers=num_layers)
        self.tab_dim = tab_dim
        self.proj = nn.Linear(tab_dim, dim)
        self.layers = nn.ModuleList(GatedFeedForward(dim, 2 * dim) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        require_features("TabularEncoder", features, self.tab_dim, (2,), "features")
        x: Tensor = self.proj(features)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.norm(x)
        return out
