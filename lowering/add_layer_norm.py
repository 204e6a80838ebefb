"""Lowering of infuse::add_layer_norm: the decomposition, inlined."""

from __future__ import annotations

import torch

from infuse.lowering import inductor
from infuse.ops import add_layer_norm as op

inductor.register_inline(torch.ops.infuse.add_layer_norm.default, op.add_layer_norm_ref)
inductor.register_inline(torch.ops.infuse.add_layer_norm_fwd.default, op.add_layer_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.add_layer_norm_bwd.default, op.add_layer_norm_bwd_ref)
