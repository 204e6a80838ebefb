"""The CUDA kernel of cross entropy over rows of logits, which leaves their gradient in their place.

cross_entropy_rows: see csrc/cross_entropy/kernel.cuh. logits [rows, vocab], bfloat16, float16 or float32, adjacent
columns, every row aligned to 16 bytes; target int64 [rows]; scale float32, one number, None for 1; loss float32 [rows].
With `gradient` the logits are overwritten with scale times the gradient of each row's own loss. A row whose target is
ignore_index has the loss and the gradient 0, one whose target is not in the vocabulary NaN in both.

scale_unless_one: a contiguous tensor of these dtypes, aligned likewise, times `scale` (float32, one number), in place;
where that is 1 nothing else is read or written.

config: -1 lets the launcher choose, otherwise an index into its table.
"""

from __future__ import annotations

import torch

from infuse.ops.registration import define

# The operators that the kernels serve.
OPERATORS = ("linear_cross_entropy", "linear_cross_entropy_bwd")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT_BYTES = 16

define(
    "cross_entropy_rows(Tensor(a!) logits, Tensor target, Tensor? scale, int ignore_index, float label_smoothing, "
    "float softcap, bool gradient, int config, Tensor(b!) loss) -> ()"
)
define("scale_unless_one(Tensor(a!) tensor, Tensor scale) -> ()")
