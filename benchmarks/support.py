"""The README's table of support, asked of the code: which operators there are and what runs them."""

from __future__ import annotations

import importlib
import inspect

import torch

from infuse import build
from infuse.ops import (
    attention_backward_kernels,
    attention_kernels,
    cross_entropy_kernels,
    linear_kernels,
    norm_backward,
    rope_kernels,
)
from infuse.settings import PATTERNS

_KERNELS = (
    rope_kernels,
    norm_backward,
    attention_kernels,
    attention_backward_kernels,
    cross_entropy_kernels,
    linear_kernels,
)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def kernel_dtypes(op: str) -> tuple[str, ...]:
    """The dtypes that an operator's CUDA kernel (by convention `<op>_out`) takes, () without a kernel."""
    for module in _KERNELS:
        if op in module.OPERATORS:
            return tuple(str(dtype).removeprefix("torch.") for dtype in module.DTYPES)
    if not hasattr(torch.ops.infuse, f"{op}_out"):
        return ()
    can_run = importlib.import_module(f"infuse.ops.{op.removesuffix('_bwd')}").can_run
    required = [p for p in inspect.signature(can_run).parameters.values() if p.default is p.empty]
    names = (dtype for dtype in DTYPES if not can_run(*(_example(p.annotation, dtype) for p in required)))
    return tuple(str(dtype).removeprefix("torch.") for dtype in names)


def _example(annotation: str, dtype: torch.dtype) -> object:
    """A value for a parameter: the smallest tensor, nothing where it is optional, a number that means nothing."""
    if "None" in annotation:
        return None
    return torch.empty(1, 1, 1, 8, dtype=dtype) if annotation == "Tensor" else {"bool": False, "int": 1}.get(annotation)


def cell(op: str) -> str:
    return ", ".join(SHORT.get(dtype, dtype) for dtype in kernel_dtypes(op)) or "formula"


def table() -> str:
    """One row an operator: the dtypes of its kernels forward and backward, and before the rows where these run."""
    lines = [
        f"Kernels for {', '.join(build.DEFAULT_ARCHITECTURES)}; everywhere else, for other dtypes and where the table "
        "says so, it is the operator's formula, inlined.",
        "",
        "| operator | forward | backward |",
        "|---|---|---|",
    ]
    for op in PATTERNS:
        importlib.import_module(f"infuse.ops.{op}")
        lines.append(f"| `{op}` | {cell(op)} | {cell(op + '_bwd')} |")
    return "\n".join(lines) + "\n"
