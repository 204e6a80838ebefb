"""Lowering of infuse::qk_norm_rope: the CUDA kernel where it wins, else the decomposition, inlined."""

from __future__ import annotations

from typing import Any

import torch

from infuse.lowering import inductor
from infuse.lowering.rope import choose, decline
from infuse.ops import qk_norm_rope as op


def lower(x: Any, cos: Any, sin: Any, weight: Any, bias: Any, eps: Any, centered: bool, *rest: Any) -> Any:
    """The IR node of y."""
    weight_offset, cast_before_weight, _, *flags = rest
    args = (x, cos, sin, weight, bias, eps, centered, *rest)

    def can_run() -> str:
        examples: list[Any] = [inductor.example(arg) if inductor.is_tensor(arg) else arg for arg in args]
        return op.can_run(*examples)

    tensors = [tensor for tensor in (x, cos, sin, weight) if tensor is not None]
    keywords = {"norm": (eps, weight_offset, cast_before_weight), "flags": tuple(flags), "is_backward": False}
    target = torch.ops.infuse.qk_norm_rope.default
    return choose(target, op.qk_norm_rope_ref, args, tensors, keywords, decline(x, can_run))


inductor.register(torch.ops.infuse.qk_norm_rope.default, lower)
