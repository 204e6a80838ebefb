"""Lowering of infuse::gated_rms_norm: the decomposition, inlined, unless the CUDA kernel wins in the graph."""

from __future__ import annotations

from typing import Any

from infuse.lowering import norm_kernels
from infuse.ops import gated_rms_norm as op


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    """For the kernel, which is told the activation by a flag."""
    return {
        ("gate_is_silu" if name == "activation" else name): number == "silu" if name == "activation" else number
        for name, number in given.items()
    }


NORM = norm_kernels.register(
    "gated_rms_norm",
    rows=2,
    vectors=1,
    results=1,
    formula=op.gated_rms_norm_ref,
    fake=op.gated_rms_norm_fake,
    can_run=op.can_run,
    numbers=_numbers,
)
