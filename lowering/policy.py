"""Which form of an operator the rewrite emits: kept whole up to the lowering, or its formula, open to AOTAutograd.

An operator is kept whole only where something other than its formula may run. Everywhere else its formula stands in the
graph before autograd, exactly as if the author had spelled it so: same partitioning, same fusion, no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infuse.lowering import embedding, head_policy, inductor, linear_policy, rotary_policy, trained_norms
from infuse.lowering.heuristics import attention as attention_heuristics
from infuse.lowering.heuristics import norm as norm_heuristics
from infuse.ops import attention_backward_kernels, attention_kernels, library, norm_kernels
from infuse.ops.attention_formulas import has_wide_heads, only_formula
from infuse.report import Placement
from infuse.settings import Settings

# What csrc/norm has kernels for, and where among the operator's arguments its numbers begin.
NORMS = {"rms_norm": 2, "layer_norm": 3, "add_rms_norm": 3, "add_layer_norm": 4, "gated_rms_norm": 3}
Placer = Callable[[Sequence[object], bool, Settings, bool], Placement]
# Operators from outside the package: (args, training, settings, max_autotune) -> form.
PLACED_ELSEWHERE: dict[str, Placer] = {}


def place(kind: str, args: Sequence[object], training: bool, *, settings: Settings, max_autotune: bool) -> Placement:
    """The form for one site. args: example values (fake tensors, numbers, None) of the operator's arguments."""
    if kind == "packed_linear":
        return linear_policy.place_packed(args, training)
    if inductor.writes_cpp():  # which cannot call the kernels
        settings = replace(settings, kernels="never")
    if kind == embedding.KIND:
        return embedding.place(args, training, settings)
    if kind == "gated_mlp":
        return linear_policy.place_gated_mlp(args, training, settings)
    if kind in linear_policy.KINDS:
        return linear_policy.place_linears(kind, args, training, settings, max_autotune)
    if kind in rotary_policy.KINDS:
        return rotary_policy.place_rotary(kind, args, training, settings, max_autotune)
    if settings.kernels == "never":
        return _inline("kernels are off")
    if kind in PLACED_ELSEWHERE:
        return PLACED_ELSEWHERE[kind](args, training, settings, max_autotune)
    if kind == head_policy.KIND:
        return head_policy.place(args, training, settings)
    first = args[0]
    assert isinstance(first, Tensor)
    if kind == "attention":
        return _place_attention(first, args, training, settings, max_autotune)
    if training and kind in trained_norms.KINDS:
        return trained_norms.place(kind, args, settings, max_autotune)
    if kind in NORMS:
        return _place_norm(kind, first, args, settings, max_autotune)
    return _inline(f"no {kind} kernel")


def _inline(reason: str) -> Placement:
    return Placement("inline", f"decomposition ({reason})")


def _place_attention(
    q: Tensor, args: Sequence[object], training: bool, settings: Settings, max_autotune: bool
) -> Placement:
    if training or _drops(args):
        return _place_trained_attention(args, settings, max_autotune)
    if runs := _kernels(args, attention_kernels.can_decode, attention_kernels.can_forward):
        if settings.kernels == "always":
            return Placement("default", "kernel")
        if max_autotune:
            return Placement("default", "kernel or SDPA backend, measured")
        chosen = attention_heuristics.inference(_describe(args), library.capability(q.device))
        if chosen.startswith("decode") and attention_kernels.can_decode in runs:
            return Placement("default", "kernel for few query rows")
        if chosen.startswith("forward") and attention_kernels.can_forward in runs:
            return Placement("default", "kernel")
    if reason := _against_sdpa(args):
        return _inline(reason)
    if q.device.type != "cuda":
        return Placement("inline", f"scaled_dot_product_attention (no kernel for {q.device.type})")
    if not max_autotune:
        return Placement("inline", "scaled_dot_product_attention")
    return Placement("default", "the fastest SDPA backend, measured")


def _place_trained_attention(args: Sequence[object], settings: Settings, max_autotune: bool) -> Placement:
    """Both passes need a kernel. Nothing competes under dropout: torch's kernels draw other random numbers."""
    q = args[0]
    assert isinstance(q, Tensor)
    checks = (attention_kernels.can_forward, attention_backward_kernels.can_backward)
    runs = len(_kernels(args, *checks)) == len(checks)
    if runs and settings.kernels == "always":
        return Placement("default", "kernels, forwards and backwards")
    if runs and attention_heuristics.trains(_describe(args), library.capability(q.device)):
        return Placement("default", "kernels, forwards and backwards")
    if runs and attention_heuristics.expands(_describe(args), library.capability(q.device)):
        return Placement("expanded", "scaled_dot_product_attention, K and V repeated for each head")
    if runs and max_autotune and not _drops(args):
        return Placement("default", "kernel or SDPA backend, measured for each pass")
    if reason := _against_sdpa(args):
        return _inline(reason)
    if q.device.type != "cuda":
        return Placement("inline", f"scaled_dot_product_attention (no kernel for {q.device.type})")
    return Placement("inline", "scaled_dot_product_attention")


def _kernels(args: Sequence[object], *checks: Callable[..., str]) -> list[Callable[..., str]]:
    """Those of the kernels, by their checks in infuse.ops.attention_kernels, that can run here."""
    q, k, v, mask, scale, _, *rest = args
    assert isinstance(q, Tensor)
    if library.missing(q.device):
        return []
    numbers = (*rest, *(0.0, None, "zeros", 0.0)[len(rest) :])[:4]
    return [check for check in checks if not check(q, k, v, mask, scale, *numbers)]


def _drops(args: Sequence[object]) -> bool:
    """Whether a site drops probabilities, as far as is known."""
    return len(args) > 9 and (isinstance(args[9], torch.SymFloat) or args[9] != 0.0)


def _describe(args: Sequence[object]) -> attention_heuristics.Site:
    q, k, _, mask, _, is_causal, *rest = args
    softcap, sinks, masked_rows, dropout_p = (*rest, *(0.0, None, "zeros", 0.0)[len(rest) :])[:4]
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    dtype = mask.dtype if isinstance(mask, Tensor) else None
    formula = only_formula(q.dtype, dtype, softcap, sinks is not None, masked_rows)
    return attention_heuristics.Site(q.shape, k.shape, dtype, bool(is_causal), formula, dropout_p != 0.0)


def _against_sdpa(args: Sequence[object]) -> str:
    """Why a site that no kernel takes stays its formula; "" where torch's SDPA computes it, and well."""
    q, *_ = args
    assert isinstance(q, Tensor)
    given = dict(zip(("softcap", "sinks"), args[6:]))
    if isinstance(given.get("softcap"), torch.SymFloat) or given.get("softcap"):
        return "SDPA has no softcap"
    if given.get("sinks") is not None:
        return "SDPA has no sinks"
    written_out = len(args) > 10 and bool(args[10])
    return "SDPA is slow for heads this wide" if written_out and has_wide_heads(q) else ""


def _place_norm(kind: str, x: Tensor, args: Sequence[object], settings: Settings, max_autotune: bool) -> Placement:
    if reason := library.missing(x.device):
        return replace(_inline(reason), missing=reason if x.device.type == "cuda" else "")
    numbers = args[NORMS[kind] :]
    if any(isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) for number in numbers):
        return _inline("eps is symbolic")
    tensors = [arg if isinstance(arg, Tensor) else None for arg in args[: NORMS[kind]]]
    weight, bias = tensors[-2:] if "layer" in kind else (tensors[-1], None)
    operand = tensors[1] if kind.startswith(("add_", "gated_")) else None
    groups = numbers[3] if kind == "gated_rms_norm" and len(numbers) > 3 else 1
    assert isinstance(groups, int)
    if reason := norm_kernels.can_run(x, weight, bias, operand, groups):
        return _inline(reason)
    if settings.kernels == "always":
        return Placement("default", "kernel")
    if max_autotune:
        return Placement("default", "kernel or decomposition, measured")
    return _place_unmeasured(kind, x)


def _place_unmeasured(kind: str, x: Tensor) -> Placement:
    """By what the kernel can gain at best: whether there will be CUDA graphs is known to the lowering."""
    numel, row_size = x.numel(), x.shape[-1]
    if not isinstance(numel, int) or not isinstance(row_size, int) or numel == 0:
        return _inline("Inductor fuses it with its neighbours")
    problem = norm_heuristics.Problem(
        kind,
        numel // row_size,
        row_size,
        x.dtype.itemsize,
        library.capability(x.device),
        scattered=norm_kernels.are_scattered(x),
        captured=True,
    )
    if norm_heuristics.factor(problem) > 1:
        return Placement("default", "kernel unless Inductor could fuse its neighbours")
    return _inline("Inductor fuses it with its neighbours")
