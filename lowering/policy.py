"""Which form of an operator the rewrite emits: kept whole up to the lowering, or its formula, open to AOTAutograd.

An operator is kept whole only where something other than its formula may run. Everywhere else its formula stands in the
graph before autograd, exactly as if the author had spelled it so: same partitioning, same fusion, no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infuse.lowering.heuristics import rms_norm as norm_heuristics
from infuse.ops import library
from infuse.ops import rms_norm as norm
from infuse.report import Placement
from infuse.settings import Settings

# Operators that stand for several others and would be no faster than those: their sites are left to their parts.
WITHOUT_KERNEL = ("qk_norm_rope", "rope_cache_write", "norm_linear", "packed_linear", "swiglu_linear")
Placer = Callable[[Sequence[object], bool, Settings, bool], Placement]
# Operators from outside the package: (args, training, settings, max_autotune) -> form.
PLACED_ELSEWHERE: dict[str, Placer] = {}


def place(kind: str, args: Sequence[object], training: bool, *, settings: Settings, max_autotune: bool) -> Placement:
    """The form for one site. args: example values (fake tensors, numbers, None) of the operator's arguments."""
    if kind in WITHOUT_KERNEL:
        return Placement("", "", declined=f"no {kind} kernel")
    if settings.kernels == "never":
        return _inline("kernels are off")
    if kind in PLACED_ELSEWHERE:
        return PLACED_ELSEWHERE[kind](args, training, settings, max_autotune)
    first = args[0]
    assert isinstance(first, Tensor)
    if kind == "attention":
        return _place_attention(first, args, training, max_autotune)
    if kind in ("rms_norm", "add_rms_norm"):
        return _place_norm(kind, first, args, training, settings, max_autotune)
    return _inline(f"no {kind} kernel")


def _inline(reason: str) -> Placement:
    return Placement("inline", f"decomposition ({reason})")


def _place_attention(q: Tensor, args: Sequence[object], training: bool, max_autotune: bool) -> Placement:
    if reason := _only_formula(args):
        return Placement("inline", f"decomposition (no kernel for {reason})")
    if q.device.type != "cuda":
        return Placement("inline", f"scaled_dot_product_attention (no kernel for {q.device.type})")
    if training:
        return Placement("inline", "scaled_dot_product_attention (no kernel for training)")
    if not max_autotune:
        return Placement("inline", "scaled_dot_product_attention")
    return Placement("default", "the fastest SDPA backend, measured")


def _only_formula(args: Sequence[object]) -> str:
    """What no kernel of attention takes among a site's arguments; "" if there is nothing."""
    given = dict(zip(("softcap", "sinks", "masked_rows", "dropout_p"), args[6:]))
    if isinstance(given.get("softcap"), torch.SymFloat) or given.get("softcap"):
        return "a softcap"
    if given.get("sinks") is not None:
        return "sinks"
    return "dropout" if isinstance(given.get("dropout_p"), torch.SymFloat) or given.get("dropout_p") else ""


def _place_norm(
    kind: str, x: Tensor, args: Sequence[object], training: bool, settings: Settings, max_autotune: bool
) -> Placement:
    weight, eps, offset = args[-5:-2]
    if reason := library.missing(x.device):
        return replace(_inline(reason), missing=reason if x.device.type == "cuda" and not training else "")
    if training:
        return _inline("no backward kernel")
    if not isinstance(eps, float) or not isinstance(offset, (int, float)):
        return _inline("eps is symbolic")
    assert weight is None or isinstance(weight, Tensor)
    # A sum is written contiguously, whatever the strides of its terms.
    taken = x if kind == "rms_norm" else torch.empty_like(x, memory_format=torch.contiguous_format)
    if reason := norm.can_run(taken, weight):
        return _inline(reason)
    # add_rms_norm has no kernel of its own: the sum stays Inductor's, its norm is kept whole.
    whole, part = ("default", "") if kind == "rms_norm" else ("parts", "sum; norm by ")
    if settings.kernels == "always":
        return Placement(whole, part + "kernel")
    if max_autotune:
        return Placement(whole, part + "kernel or decomposition, measured")
    rows = x.numel() // x.shape[-1] if isinstance(x.numel(), int) and x.numel() else 0
    if rows and norm_heuristics.runs_well(norm_heuristics.Problem(rows, int(x.shape[-1]), x.dtype.itemsize)):
        return Placement(whole, part + "kernel")
    return _inline("Inductor fuses it with its neighbours")
