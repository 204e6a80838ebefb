"""Lowering of infuse::add_rms_norm: the sum is Inductor's, its norm is lowered as infuse::rms_norm is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.lowering import inductor
from infuse.lowering.rms_norm import lower_in_context
from infuse.ops import add_rms_norm as op


def _add(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual


def lower(
    x: Any, residual: Any, weight: Any, eps: Any, weight_offset: Any = 0.0, cast_before_weight: bool = False
) -> Any:
    """The IR nodes of y and the sum."""
    node = inductor.current_node()
    total = inductor.inline(_add, x, residual)
    fx_y, fx_total = inductor.result(node, 0), inductor.result(node, 1)
    read_elsewhere = fx_total is not None
    y = lower_in_context(total, weight, eps, weight_offset, cast_before_weight, read_elsewhere, fx_y or node)
    return y, total


inductor.register(torch.ops.infuse.add_rms_norm.default, lower)
inductor.register_inline(torch.ops.infuse.add_rms_norm_fwd.default, op.add_rms_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.add_rms_norm_bwd.default, op.add_rms_norm_bwd_ref)
