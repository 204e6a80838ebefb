"""What the components refuse, with errors that say what they got and what they expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require_positive(owner: str, **sizes: int) -> None:
    """Raises TypeError for a size that is no int, ValueError for one below 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{owner}: {name}: got {size!r}, expected an int")
        if size < 1:
            raise ValueError(f"{owner}: {name}: got {size}, expected at least 1")


def require_features(owner: str, x: Tensor, dim: int, ranks: tuple[int, ...], name: str = "x") -> None:
    """Raises ValueError unless x has one of these ranks, at least one row of dim features, and is floating-point."""
    if x.dim() not in ranks or x.shape[-1] != dim or 0 in x.shape:
        layouts = {2: f"[B, {dim}]", 3: f"[B, L, {dim}]"}
        expected = " or ".join(layouts[rank] for rank in ranks)
        raise ValueError(f"{owner}: {name}: got shape {tuple(x.shape)}, expected {expected}, none of them 0")
    if not x.is_floating_point():
        raise ValueError(f"{owner}: {name}: got {x.dtype}, expected a floating-point dtype")


def require_mask(owner: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    """Raises ValueError for a mask that is not bool or not of this shape, which is that of the rows it marks."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(
            f"{owner}: mask: got {got}, expected torch.bool of shape {tuple(shape)}, true where a row is no padding"
        )
