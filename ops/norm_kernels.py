"""What the CUDA kernels of csrc/norm take; the operators that they implement are in the files of the norms."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Leading dimensions that do not lie behind one another in memory.
MAX_LEADING_DIMS = 3


def can_run(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, operand: Tensor | None = None, groups: int = 1
) -> str:
    """Why the kernels cannot take these tensors, "" when they can. Reads shapes, strides and dtypes only.

    operand: the residual or the gate, of x's shape.
    """
    if x.dtype not in DTYPES:
        return f"no kernel for x in {x.dtype}"
    if x.dim() - 1 + (groups > 1) > MAX_LEADING_DIMS:
        return f"no kernel for {x.dim()} dimensions" + (f" and {groups} groups" if groups > 1 else "")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.dtype not in (x.dtype, torch.float32):
            return f"no kernel for a {name} in {vector.dtype} beside x in {x.dtype}"
        if vector is not None and vector.shape[0] > 1 and vector.stride(0) != 1:
            return f"no kernel for a {name} of stride {vector.stride(0)}"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"no kernel for a weight in {weight.dtype} and a bias in {bias.dtype}"
    if operand is not None and operand.dtype != x.dtype:
        return f"no kernel for {x.dtype} beside {operand.dtype}"
    for rows in (x, operand):
        if rows is not None and isinstance(rows.shape[-1], int) and rows.shape[-1] > 1 and rows.stride(-1) != 1:
            return f"no kernel for a last dimension of stride {rows.stride(-1)}"
    return ""


def are_scattered(x: Tensor) -> bool:
    """Whether the rows of x [..., D] do not lie at one distance from each other, as heads inside a packed tensor.

    False where that depends on symbolic sizes.
    """
    leading = [
        (size, stride) for size, stride in zip(x.shape[:-1], x.stride()) if not isinstance(size, int) or size != 1
    ]
    if not all(isinstance(number, int) for pair in leading for number in pair):
        return False
    return any(outer != size * stride for (_, outer), (size, stride) in itertools.pairwise(leading))
