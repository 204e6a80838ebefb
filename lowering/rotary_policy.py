"""Which form the rewrite emits of the operators that end in a rotation; see infuse.lowering.policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from infuse.lowering.heuristics import rope as heuristics
from infuse.ops import library, qk_norm_rope, qk_norm_rope_bwd, rope_cache_write, rope_kernels
from infuse.report import Placement
from infuse.settings import Settings

# Where an operator's arguments say that pairs are neighbours.
_INTERLEAVED = {"rope": 3, "qk_norm_rope": 10, "rope_cache_write": 16}
KINDS = tuple(_INTERLEAVED)


def place_rotary(
    kind: str, args: Sequence[object], training: bool, settings: Settings, max_autotune: bool
) -> Placement:
    """A rotation alone is inlined where no kernel may win; the larger operators are then left to their parts."""
    x = args[0]
    assert isinstance(x, Tensor)
    reason = _cannot_run(kind, x, args, training, settings)
    if not reason and settings.kernels == "always":
        return Placement("default", "kernel")
    if not reason:
        problem = _problem(kind, args)
        pairs = kind == "qk_norm_rope" and not training  # one launch, which pays for few rows too
        if kind == "rope_cache_write":
            # Not timed for the user's shapes: its decomposition is several kernels, and writes into the caches.
            if heuristics.is_measured(problem):
                return Placement("default", "kernel")
        elif max_autotune and (pairs or heuristics.is_large(problem)):
            return Placement("default", "kernel or decomposition, measured")
        elif heuristics.pair_runs_well(problem) if pairs else heuristics.runs_well(problem):
            return Placement("default", "kernel, unless its neighbours would lose more by it")
        measured = heuristics.is_measured(problem)
        reason = "Inductor fuses it with its neighbours" if measured else "not measured for this GPU and dtype"
    if kind != "rope":
        return Placement("", "", declined=f"no {kind} kernel: {reason}")
    missing = reason if reason == library.missing(x.device) and x.device.type == "cuda" and not training else ""
    return replace(Placement("inline", f"decomposition ({reason})"), missing=missing)


def _cannot_run(kind: str, x: Tensor, args: Sequence[object], training: bool, settings: Settings) -> str:
    """Why no kernel may run, "" when one may."""
    if settings.kernels == "never":
        return "kernels are off"
    if reason := library.missing(x.device):
        return reason
    if kind == "rope_cache_write":
        return "no backward kernel" if training else rope_cache_write.can_run(*args)  # type: ignore[arg-type]
    if kind == "qk_norm_rope":
        if reason := qk_norm_rope.can_run(*args):  # type: ignore[arg-type]
            return reason
        per_pair = args[_INTERLEAVED[kind] + 1]
        return qk_norm_rope_bwd.can_run(*args[:4], per_pair) if training else ""  # type: ignore[call-arg, arg-type]
    _, cos, sin, *_ = args
    assert isinstance(cos, Tensor) and isinstance(sin, Tensor)
    return rope_kernels.can_rotate(x, cos, sin)


def _problem(kind: str, args: Sequence[object]) -> heuristics.Problem:
    """Symbolic sizes count as 1, as in decoding."""
    x, interleaved = args[0], args[_INTERLEAVED[kind]]
    assert isinstance(x, Tensor)
    *leading, row_size = (size if isinstance(size, int) else 1 for size in x.shape)
    has_norm, capability = kind != "rope", library.capability(x.device)
    return heuristics.Problem(math.prod(leading), row_size, x.dtype.itemsize, bool(interleaved), has_norm, capability)
