"""Lowering of infuse::rope: the decomposition, inlined; it is pointwise, so Inductor fuses it with what is around."""

from __future__ import annotations

import torch

from infuse.lowering import inductor
from infuse.ops import rope as op

inductor.register_inline(torch.ops.infuse.rope.default, op.rope_ref)
inductor.register_inline(torch.ops.infuse.rope_bwd.default, op.rope_bwd_ref)
inductor.register_inline(torch.ops.infuse.rope_tables_bwd.default, op.rope_tables_bwd_ref)
