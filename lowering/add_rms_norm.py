"""Lowering of infuse::add_rms_norm: the decomposition, inlined, unless the CUDA kernel wins in the graph."""

from __future__ import annotations

from infuse.lowering import norm_kernels
from infuse.ops import add_rms_norm as op

NORM = norm_kernels.register(
    "add_rms_norm",
    rows=2,
    vectors=1,
    results=2,
    formula=op.add_rms_norm_ref,
    fake=op.add_rms_norm_fake,
    can_run=op.can_run,
)
