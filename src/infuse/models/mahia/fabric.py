"""DynamicNeuroFabric: residual layers, each as strong as the input asks for.

    p = sigmoid(W x + b)                  one probability a layer and row, from the fabric's input
    x = x + p[i] * layer_i(x)             for every layer i in turn

All layers run, whatever p is: the work does not depend on data, and every layer gets a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infuse.models.mahia.checks import require_features, require_positive
from infuse.models.mahia.feed_forward import GatedFeedForward
from infuse.models.mahia.opt_in import opt_in


class DynamicNeuroFabric(nn.Module):
    """x [B, D] or [B, L, D] -> the same shape. hidden_dim: of each layer's gated MLP, by default 2 dim.

    Raises ValueError for sizes that are not positive and for an input of another shape.
    """

    def __init__(
        self, dim: int, max_layers: int = 8, use_cuda_kernels: bool = False, *, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        require_positive("DynamicNeuroFabric", dim=dim, max_layers=max_layers, hidden_dim=hidden_dim)
        self.dim = dim
        self.activation = nn.Linear(dim, max_layers)
        self.layers = nn.ModuleList(GatedFeedForward(dim, hidden_dim) for _ in range(max_layers))
        opt_in(self, use_cuda_kernels)

    def forward(self, x: Tensor) -> Tensor:
        require_features("DynamicNeuroFabric", x, self.dim, (2, 3))
        # A sigmoid for each layer, not views of one: torch 2.11 to 2.13 keep both the tensor and its views for the
        # backward, whose code may then overwrite the one before it reads the other (a wrong gradient, silently).
        logits = self.activation(x).split(1, -1)
        for layer, logit in zip(self.layers, logits):
            x = x + torch.sigmoid(logit) * layer(x)
        return x

    def activations(self, x: Tensor) -> Tensor:
        """How strongly each layer acts on each row, [..., max_layers] in (0, 1)."""
        return torch.sigmoid(self.activation(x))
