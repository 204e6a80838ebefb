"""Lowering of infuse::swiglu: the decomposition, inlined; it is pointwise, so Inductor fuses it with what is around."""

from __future__ import annotations

import torch

from infuse.lowering import inductor
from infuse.ops import swiglu as op

inductor.register_inline(torch.ops.infuse.swiglu.default, op.swiglu_ref)
inductor.register_inline(torch.ops.infuse.swiglu_bwd.default, op.swiglu_bwd_ref)
