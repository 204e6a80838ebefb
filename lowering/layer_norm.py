"""Lowering of infuse::layer_norm: the decomposition, inlined, unless the CUDA kernel wins in the graph."""

from __future__ import annotations

from infuse.lowering import norm_kernels
from infuse.ops import layer_norm as op

NORM = norm_kernels.register(
    "layer_norm", rows=1, vectors=2, results=1, formula=op.layer_norm_ref, fake=op.layer_norm_fake, can_run=op.can_run
)
