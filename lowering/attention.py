"""Lowering of infuse::attention in inference: SDPA or a kernel; under max-autotune the fastest of all.

Few query rows that are known to run well in the kernel take it unmeasured: alone, one call after another, kernels take
other times than in a decoder, where what counts is how soon each can begin behind the one before it.
"""

from __future__ import annotations

from typing import Any

import torch

from infuse.lowering import attention_backends as backends
from infuse.lowering import attention_candidates, inductor
from infuse.lowering.attention_candidates import Candidate
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import attention as heuristics
from infuse.ops import attention as op
from infuse.ops import library

# Places among the tensors of a site. Few query rows read a cache that was last read a step ago; a static one, of which
# a mask opens what is there, is half full on average over its use.
_CACHES, _MASK = (1, 2), 3


def _measured(candidates: dict[str, Candidate], args: tuple[Any, ...], layout: Any) -> tuple[str, dict[str, float]]:
    """The fastest of the kernels and torch's backends, and the time of each; the default if there is but one."""
    formulas = backends.inference(args)
    if len(formulas) + len(candidates) == 1:
        return backends.DEFAULT, {}
    kernels = {label: candidate.kernel((args[3], None, args[7])) for label, candidate in candidates.items()}
    of_cache = any(label.startswith("decode") for label in candidates)
    values = {_MASK: inductor.half_open} if of_cache and args[3] is not None else {}
    cold = _CACHES if of_cache else ()
    timings = inductor.measure("infuse_attention", kernels, formulas, args, layout, values=values, cold=cold)
    return min(timings, key=timings.__getitem__, default=backends.DEFAULT), timings


def _by_heuristic(candidates: dict[str, Candidate], args: tuple[Any, ...]) -> str:
    """The kernel that is taken without a measurement, "" for torch's."""
    site = attention_candidates.describe(args)
    chosen = heuristics.inference(site, library.capability(args[0].get_device()))
    return chosen if chosen in candidates else ""


def _choose(candidates: dict[str, Candidate], args: tuple[Any, ...], layout: Any) -> tuple[str, str, dict[str, float]]:
    """Label, why, and what was measured."""
    settings = inductor.settings_in_effect()
    if candidates and settings.kernels == "always":
        return next(iter(candidates)), "kernels are always taken", {}
    tunable = isinstance(args[4], float) and (candidates or args[0].get_device().type == "cuda")
    known = _by_heuristic(candidates, args)
    if tunable and settings.kernels != "never" and inductor.max_autotune() and not known.startswith("decode"):
        label, timings = _measured(candidates, args, layout)
        why = f"measured, out of {', '.join(timings)}" if timings else "the only backend that takes it"
        return label, why, timings
    if known:
        return known, "heuristic", {}
    return backends.DEFAULT, "torch's choice of backend", {}


def lower(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scale: Any,
    is_causal: bool = False,
    softcap: Any = 0.0,
    sinks: Any = None,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    round_scores: bool = False,
) -> Any:
    """The IR node of out."""
    args = (q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, round_scores)
    candidates = attention_candidates.inference(args)
    layout = inductor.output_layout(op.attention_fake, args)
    label, why, timings = _choose(candidates, args, layout)
    described = f"q {inductor.hints(q)} k {inductor.hints(k)} {q.get_dtype()}"
    record(Decision("attention", described, label, why, timings, site=inductor.current_site()))
    if label in candidates:
        return candidates[label].call(args, layout)
    return inductor.inline(backends.formula_of(label), *args)


inductor.register(torch.ops.infuse.attention.default, lower)
