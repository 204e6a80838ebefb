"""Lowering of infuse::gated_rms_norm: the decomposition, inlined."""

from __future__ import annotations

import torch

from infuse.lowering import inductor
from infuse.ops import gated_rms_norm as op

inductor.register_inline(torch.ops.infuse.gated_rms_norm.default, op.gated_rms_norm_ref)
inductor.register_inline(torch.ops.infuse.gated_rms_norm_fwd.default, op.gated_rms_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.gated_rms_norm_bwd.default, op.gated_rms_norm_bwd_ref)
