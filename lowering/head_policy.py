"""Which form of the loss of a language model's head the rewrite emits: in chunks of rows, or the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infuse.ops import chunked_cross_entropy, library
from infuse.report import Placement
from infuse.settings import Settings

KIND = "linear_cross_entropy"
# Below this the logits take less memory than what is around them, and products of few rows leave a device idle.
MIN_ROWS = 2048
MIN_LOGITS_BYTES = 256 << 20
MEASURED = (9, 0)


def place(args: Sequence[object], training: bool, settings: Settings) -> Placement:
    """args: example values of the operator's arguments."""
    x, weight, bias = args[:3]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if reason := chunked_cross_entropy.cannot_run(x, weight, bias):
        missing = reason if x.device.type == "cuda" and library.missing(x.device) else ""
        return Placement("inline", f"decomposition ({reason})", missing=missing)
    if training and x.dtype == torch.float16:
        # A loss is scaled against underflow, which only the backward knows.
        return Placement("inline", "decomposition (float16 gradients need the loss's scale)")
    if training and settings.numerics == "exact":
        return Placement("inline", "decomposition (chunks round the weight's gradient more than once)")
    if settings.kernels != "always" and (reason := _declines(x, weight)):
        return Placement("inline", f"decomposition ({reason})")
    return Placement("default", "kernel, in chunks of rows" + (", with the gradients" if training else ""))


def _declines(x: Tensor, weight: Tensor) -> str:
    """Why it would not pay, "" where it does. A number of rows that is not known counts as large."""
    if library.capability(x.device) != MEASURED:
        return "not measured on this device"
    if x.dtype == torch.float32:
        return "not measured in float32"
    rows: int | torch.SymInt = x.numel() // x.shape[-1]
    vocab: int | torch.SymInt = weight.shape[0]
    if not isinstance(rows, int) or not isinstance(vocab, int):
        return ""
    if rows < MIN_ROWS or rows * vocab * x.dtype.itemsize < MIN_LOGITS_BYTES:
        return f"the logits of {rows} rows are small"
    return ""
