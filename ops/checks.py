"""Argument checks that the operators share. Every message says what, got, expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is float64, float32, bfloat16 or float16."""
    if tensor.dtype not in FLOATS:
        expected = ", ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"infuse::{op}: {name}: got dtype {tensor.dtype}, expected one of {expected}")


def same_dtype(op: str, **tensors: Tensor) -> None:
    """Raises TypeError unless all tensors have one dtype."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"infuse::{op}: got {got}, expected one dtype for all of them")


def equal(op: str, what: str, got: int | torch.SymInt, expected: int | torch.SymInt) -> None:
    """Raises ValueError unless two sizes are equal; symbolic sizes become a runtime check."""
    if isinstance(got, int) and isinstance(expected, int):
        if got != expected:
            raise ValueError(f"infuse::{op}: {what}: got {got}, expected {expected}")
        return
    torch._check(got == expected, lambda: f"infuse::{op}: {what}: got {got}, expected {expected}")


def same_shape(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all tensors have one shape."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dim() != first.dim():
            raise ValueError(
                f"infuse::{op}: {name}: got shape {tuple(tensor.shape)}, expected {first_name}'s {tuple(first.shape)}"
            )
        for dim, (got, expected) in enumerate(zip(tensor.shape, first.shape)):
            equal(op, f"{name}: size of dimension {dim}", got, expected)


def rank(op: str, name: str, tensor: Tensor, expected: int, legend: str) -> None:
    """Raises ValueError unless the tensor has `expected` dimensions."""
    if tensor.dim() != expected:
        raise ValueError(
            f"infuse::{op}: {name}: got {tensor.dim()} dimensions {tuple(tensor.shape)}, expected {expected} {legend}"
        )
