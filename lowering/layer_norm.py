"""Lowering of infuse::layer_norm: the decomposition, inlined, unless the CUDA kernel wins in the graph."""

from __future__ import annotations

import torch

from infuse.lowering import inductor, norm_kernels
from infuse.ops import layer_norm as op

NORM = norm_kernels.register(
    "layer_norm", rows=1, vectors=2, results=1, formula=op.layer_norm_ref, fake=op.layer_norm_fake, can_run=op.can_run
)
inductor.register_inline(torch.ops.infuse.layer_norm_fwd.default, op.layer_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.layer_norm_bwd.default, op.layer_norm_bwd_ref)
