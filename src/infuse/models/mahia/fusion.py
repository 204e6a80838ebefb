"""FusionLayer: two views of one thing become one, sigmoid(W_g z + b_g) * silu(W_v z + b_v) with z = [first, second]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.models.mahia.checks import require_features, require_positive


class FusionLayer(nn.Module):
    """first, second: each [B, D] or [B, L, D], of one shape -> that shape.

    Raises ValueError for a dim that is not positive, inputs of another shape or of different ones.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_positive("FusionLayer", dim=dim)
        self.dim = dim
        self.gate = nn.Linear(2 * dim, dim)
        self.value = nn.Linear(2 * dim, dim)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        require_features("FusionLayer", first, self.dim, (2, 3), "first")
        require_features("FusionLayer", second, self.dim, (2, 3), "second")
        if first.shape != second.shape:
            raise ValueError(
                f"FusionLayer: got shapes {tuple(first.shape)} and {tuple(second.shape)}, expected the same"
            )
        both = torch.cat((first, second), -1)
        return torch.sigmoid(self.gate(both)) * F.silu(self.value(both))
