"""Which form of a norm the rewrite emits where gradients flow.

Kept whole up to autograd, its backward stays one operator, which a kernel may run. Its forward is the plain formula
either way (infuse.lowering.norm_backward opens it), so what is saved, computed again or fused is what it would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infuse.lowering.heuristics import norm_backward as heuristics
from infuse.ops import library, norm_backward
from infuse.report import Placement
from infuse.settings import Settings

KINDS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "gated_rms_norm")
MANY_ROWS = 16384  # stands for a number of rows that is not known


def place(kind: str, args: Sequence[object], settings: Settings, max_autotune: bool) -> Placement:
    """args: example values of the operator's arguments."""
    x = args[0]
    assert isinstance(x, Tensor)
    if reason := library.missing(x.device):
        return Placement("inline", f"decomposition ({reason})", missing=reason if x.device.type == "cuda" else "")
    if reason := _cannot_run(kind, x, args):
        return Placement("inline", f"decomposition ({reason})")
    if max_autotune and settings.kernels != "always":
        return Placement("default", "decomposition; backward by kernel or decomposition, measured")
    if settings.kernels == "always" or _runs_well(kind, x):
        return Placement("default", "decomposition; backward by kernel")
    return Placement("inline", "decomposition (Inductor's backward is as fast)")


def _cannot_run(kind: str, x: Tensor, args: Sequence[object]) -> str:
    """Why the backward kernel cannot take this norm's tensors, "" when it can."""
    if kind == "gated_rms_norm":
        return _gated_cannot_run(x, args)
    given = iter(args[2:] if kind.startswith("add_") else args[1:])
    weight = next(given)
    bias = next(given) if kind.endswith("layer_norm") else None
    eps, offset = next(given), next(given)
    if not isinstance(eps, float) or not isinstance(offset, (int, float)):
        return "eps is symbolic"
    assert weight is None or isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    # A sum is written contiguously, whatever the strides of its terms.
    taken = torch.empty_like(x, memory_format=torch.contiguous_format) if kind.startswith("add_") else x
    # The gradient of y has the dtype of y, but behind a cast to x's dtype, as autocast puts there, the lowering finds
    # it in that one.
    return norm_backward.can_run(taken, None, taken, weight, bias)


def _gated_cannot_run(x: Tensor, args: Sequence[object]) -> str:
    gate, weight, eps = args[1:4]
    groups = args[6] if len(args) > 6 else 1
    if not isinstance(eps, float) or not isinstance(groups, int):
        return "eps is symbolic"
    assert isinstance(gate, Tensor) and (weight is None or isinstance(weight, Tensor))
    return norm_backward.can_run(x, None, x, weight, None, gate, groups)


def _runs_well(kind: str, x: Tensor) -> bool:
    numel, row_size = x.numel(), x.shape[-1]
    if not isinstance(row_size, int) or not row_size:
        return False
    rows = numel // row_size if isinstance(numel, int) else MANY_ROWS
    tensors = 4 if kind.startswith("add_") else 5 if kind.startswith("gated_") else 3
    sizes = (rows, row_size, x.dtype.itemsize, tensors)
    problem = heuristics.Problem(*sizes, kind.endswith("layer_norm"), kind.startswith("gated_"))
    return rows > 0 and heuristics.runs_well(problem, library.capability(x.device))
