"""Lowering of infuse::add_rms_norm: the decomposition, inlined.

Where the norm's kernel may compete, the rewrite emits the overload `parts` (see infuse.lowering.policy), and the sum
is an addition of the user's graph like any other, which Inductor writes to memory, or not, as it would without
Infuse.
"""

from __future__ import annotations

import torch

from infuse.lowering import inductor
from infuse.ops import add_rms_norm as op

inductor.register_inline(torch.ops.infuse.add_rms_norm.default, op.add_rms_norm_ref)
inductor.register_inline(torch.ops.infuse.add_rms_norm_fwd.default, op.add_rms_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.add_rms_norm_bwd.default, op.add_rms_norm_bwd_ref)
