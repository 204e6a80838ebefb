"""infuse::embedding: torch's lookup, and a gradient that is written out where it is leaner than Inductor's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infuse.lowering import inductor
from infuse.ops import embedding as op
from infuse.report import Placement
from infuse.settings import Settings

KIND = "embedding"
# Inductor adds wider dtypes into the gradient itself.
_NARROW = (torch.bfloat16, torch.float16)
_ROWS_AN_INDEX = 4


def place(args: Sequence[object], training: bool, settings: Settings) -> Placement:
    """Whether the operator stands in the graph. args: example values of weight and indices."""
    weight, indices, *_ = args
    assert isinstance(weight, Tensor)
    assert isinstance(indices, Tensor)
    if reason := _cannot_gain(weight, indices.numel(), training, settings):
        return Placement("", "", declined=reason)
    return Placement("default", "its gradient without a table of float32")


def _cannot_gain(weight: Tensor, num_indices: object, training: bool, settings: Settings) -> str:
    if not training or not weight.requires_grad:
        return "no gradient"
    if settings.kernels == "never":
        return "kernels are off"
    if weight.device.type != "cuda" or weight.dtype not in _NARROW:
        return "Inductor's gradient has no second table"
    if torch.are_deterministic_algorithms_enabled():
        return "its sums come in any order"
    rows = weight.shape[0]
    if not isinstance(num_indices, int) or not isinstance(rows, int) or _ROWS_AN_INDEX * num_indices > rows:
        return "most rows change"
    return ""


inductor.decompose(torch.ops.infuse.embedding.default, op.embedding_ref)
