"""Lowering of infuse::rms_norm: the decomposition, inlined, unless the CUDA kernel wins in the graph."""

from __future__ import annotations

from infuse.lowering import norm_kernels
from infuse.ops import rms_norm as op

NORM = norm_kernels.register(
    "rms_norm", rows=1, vectors=1, results=1, formula=op.rms_norm_ref, fake=op.rms_norm_fake, can_run=op.can_run
)
