"""Lowering of infuse::layer_norm: the decomposition, inlined."""

from __future__ import annotations

import torch

from infuse.lowering import inductor
from infuse.ops import layer_norm as op

inductor.register_inline(torch.ops.infuse.layer_norm.default, op.layer_norm_ref)
inductor.register_inline(torch.ops.infuse.layer_norm_fwd.default, op.layer_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.layer_norm_bwd.default, op.layer_norm_bwd_ref)
