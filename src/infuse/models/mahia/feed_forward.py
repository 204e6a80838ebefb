"""The gated MLP of the fabric's layers and of the tabular encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GatedFeedForward(nn.Module):
    """W_down (silu(W_gate h) * W_up h) with h = rms_norm(x): [..., D] -> [..., D], without the residual."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        out: Tensor = self.down(F.silu(self.gate(h)) * self.up(h))
        return out
