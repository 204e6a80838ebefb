"""HybridEfficientModel: a classifier of a text and a row of tabular features that belong together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infuse.models.mahia.checks import require_positive
from infuse.models.mahia.encoders import TabularEncoder, TextEncoder
from infuse.models.mahia.experts import SparseMoETopK
from infuse.models.mahia.fabric import DynamicNeuroFabric
from infuse.models.mahia.fusion import FusionLayer
from infuse.models.mahia.memory import GraphDiffusionMemory


class HybridEfficientModel(nn.Module):
    """tokens [B, L] int64, features [B, tab_dim] -> logits [B, num_classes].

    mask: bool [B, L], true where there is a token, for texts of several lengths; see TextEncoder.
    The text's rows pass the experts and are averaged; that and the features are fused, look up the memory and pass the
    fabric. use_cuda_kernels: compiles attention, memory and fabric each by itself where there is a GPU.
    Raises ValueError for sizes that are not positive or don't fit, and for inputs that differ in batch size or shape.
    """

    def __init__(
        self,
        vocab_size: int,
        text_seq_len: int,
        tab_dim: int,
        embed_dim: int,
        *,
        num_classes: int = 2,
        num_text_layers: int = 1,
        kernel_size: int = 31,
        num_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float = 1.25,
        memory_size: int = 64,
        max_layers: int = 2,
        use_cuda_kernels: bool = False,
    ) -> None:
        super().__init__()
        require_positive("HybridEfficientModel", embed_dim=embed_dim, num_classes=num_classes)
        self.text = TextEncoder(vocab_size, text_seq_len, embed_dim, num_text_layers, kernel_size, use_cuda_kernels)
        self.tabular = TabularEncoder(tab_dim, embed_dim)
        self.experts = SparseMoETopK(embed_dim, num_experts, top_k, capacity_factor)
        self.fusion = FusionLayer(embed_dim)
        self.memory = GraphDiffusionMemory(embed_dim, memory_size, use_cuda_kernels)
        self.fabric = DynamicNeuroFabric(embed_dim, max_layers, use_cuda_kernels)
        self.norm = nn.RMSNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, tokens: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        joint = self.embed(tokens, features, mask)
        # The memory is read as it will be after its next step, so that training reaches the adjacency.
        joint = joint + self.memory(joint, self.memory.diffuse())
        logits: Tensor = self.head(self.norm(self.fabric(joint)))
        return logits

    def embed(self, tokens: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text and features as one vector each, [B, embed_dim], before memory and fabric."""
        if tokens.shape[:1] != features.shape[:1]:
            raise ValueError(
                f"HybridEfficientModel: got {tuple(tokens.shape)} tokens and {tuple(features.shape)} features, "
                "expected one batch size"
            )
        text = self.text(tokens, mask)
        text = text + self.experts(text, mask)
        joint: Tensor = self.fusion(_mean(text, mask), self.tabular(features))
        return joint

    @torch.no_grad()
    def update_memory(self, tokens: Tensor, features: Tensor, mask: Tensor | None = None) -> None:
        """One step of the memory: its nodes diffuse, and the batch's mean is written to its cache.

        Call it between training steps, after the backward pass; `forward` leaves the memory as it is.
        """
        self.memory.store(self.memory.write(self.embed(tokens, features, mask), self.memory.diffuse()))

    def enable_torch_compile(self, mode: str | None = "max-autotune") -> HybridEfficientModel:
        """Compiles the model in place, with backend "infuse" and as one graph; returns it.

        Compilation happens at the first call, and what it raises is raised there: nothing falls back to eager code.
        Raises ValueError at once for a mode that Inductor does not know.
        """
        from infuse.backend import options  # imports Inductor, which takes seconds

        options(mode)  # raises for a wrong mode
        self.compile(backend="infuse", mode=mode, fullgraph=True)
        return self


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B, D] of the rows of x [B, L, D] that are no padding, zero where all are."""
    if mask is None:
        return x.mean(1)
    total = x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)
