"""What `use_cuda_kernels=True` does to a component."""

from __future__ import annotations

import torch
from torch import nn


def gpu_is_there() -> bool:
    """Whether this process can use an NVIDIA GPU; touches none."""
    return torch.cuda.is_available() and torch.version.hip is None


def opt_in(module: nn.Module, use_cuda_kernels: bool) -> None:
    """Compiles this module alone with Infuse, as `infuse.fuse` does; without a GPU it stays plain.

    Called at the end of a component's constructor. Under an outer torch.compile the outer backend decides.
    """
    if use_cuda_kernels and gpu_is_there():
        from infuse.decorator import fuse  # imports Inductor, which takes seconds

        fuse(module)
