"""GraphDiffusionMemory: rows look up nodes and a small cache of what was seen; both change in steps of their own.

    r = softmax(x M^T) M + softmax(x C^T) C          each is attention with K = V, one head and no scale
    read: W [x, r] + b
    diffuse: M' = (1 - rate) M + rate softmax(A) M    A: the learned adjacency of the nodes
    write: one row of C becomes the mean of the rows given, the oldest first

Reading changes nothing. A step maps one state to the next one, so it can be trained through; `store` keeps a state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from infuse.models.mahia.checks import require_features, require_positive
from infuse.models.mahia.opt_in import opt_in


class MemoryState(NamedTuple):
    """nodes [N, D]; cache [C, D], in which a row that was never written is zero; position: int64, the next row."""

    nodes: Tensor
    cache: Tensor
    position: Tensor


class GraphDiffusionMemory(nn.Module):
    """x [B, D] or [B, L, D] -> the same shape.

    memory_size: nodes. cache_size: rows of the cache. diffusion_rate: how far a step moves the nodes, above 0, up to 1.
    Raises ValueError for sizes that are not positive, another rate, an input or a state of another shape.
    """

    nodes: nn.Parameter
    cache: Tensor
    position: Tensor

    def __init__(
        self,
        dim: int,
        memory_size: int = 64,
        use_cuda_kernels: bool = False,
        *,
        cache_size: int = 16,
        diffusion_rate: float = 0.1,
    ) -> None:
        super().__init__()
        require_positive("GraphDiffusionMemory", dim=dim, memory_size=memory_size, cache_size=cache_size)
        if not 0 < diffusion_rate <= 1:
            raise ValueError(
                f"GraphDiffusionMemory: diffusion_rate: got {diffusion_rate}, expected above 0 and at most 1"
            )
        self.dim = dim
        self.diffusion_rate = diffusion_rate
        self.nodes = nn.Parameter(torch.randn(memory_size, dim) * dim**-0.5)
        self.adjacency = nn.Parameter(torch.randn(memory_size, memory_size) * memory_size**-0.5)
        self.fusion = nn.Linear(2 * dim, dim)
        self.register_buffer("cache", torch.zeros(cache_size, dim))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        opt_in(self, use_cuda_kernels)

    def state(self) -> MemoryState:
        """The state that is kept: the parameters and buffers themselves."""
        return MemoryState(self.nodes, self.cache, self.position)

    def forward(self, x: Tensor, state: MemoryState | None = None) -> Tensor:
        """Reads the state, by default the one that is kept."""
        require_features("GraphDiffusionMemory", x, self.dim, (2, 3))
        nodes, cache, _ = self.state() if state is None else self._checked(state)
        retrieved = look_up(x, nodes) + look_up(x, cache)
        out: Tensor = self.fusion(torch.cat((x, retrieved), -1))
        return out

    def diffuse(self, state: MemoryState | None = None, steps: int = 1) -> MemoryState:
        """The state after the nodes have moved towards their neighbours; gradients reach nodes and adjacency."""
        require_positive("GraphDiffusionMemory.diffuse", steps=steps)
        nodes, cache, position = self.state() if state is None else self._checked(state)
        neighbours = torch.softmax(self.adjacency, -1)
        for _ in range(steps):
            nodes = (1 - self.diffusion_rate) * nodes + self.diffusion_rate * (neighbours @ nodes)
        return MemoryState(nodes, cache, position)

    def write(self, x: Tensor, state: MemoryState | None = None) -> MemoryState:
        """The state after the mean of all rows of x [B, D] or [B, L, D] has replaced the oldest row of the cache."""
        require_features("GraphDiffusionMemory.write", x, self.dim, (2, 3))
        nodes, cache, position = self.state() if state is None else self._checked(state)
        size = cache.shape[0]
        here = torch.arange(size, device=cache.device) == position
        cache = torch.where(here.unsqueeze(-1), x.reshape(-1, self.dim).mean(0).to(cache.dtype), cache)
        return MemoryState(nodes, cache, (position + 1) % size)

    @torch.no_grad()
    def store(self, state: MemoryState) -> None:
        """Keeps the values of a state; from here on `state()` has them, and the state_dict too.

        Call it after the backward pass of what read the former ones, as an optimiser's step.
        """
        for kept, new in zip(self.state(), self._checked(state)):
            kept.copy_(new)

    def _checked(self, state: MemoryState) -> MemoryState:
        for name, kept, new in zip(MemoryState._fields, self.state(), state):
            if new.shape != kept.shape:
                got, expected = tuple(new.shape), tuple(kept.shape)
                raise ValueError(f"GraphDiffusionMemory: state.{name}: got shape {got}, expected {expected}")
        return state


def look_up(x: Tensor, memory: Tensor) -> Tensor:
    """softmax(x M^T) M: x [..., D], M [N, D] -> [..., D]."""
    return torch.softmax(x @ memory.transpose(0, 1), -1) @ memory
