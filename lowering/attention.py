"""Lowering of infuse::attention: torch's SDPA, under max-autotune by the backend that is fastest for the shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infuse.lowering import inductor
from infuse.lowering.decisions import Decision, record
from infuse.ops import attention as op

DEFAULT = "sdpa"
_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def formula(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        softcap: float,
        sinks: Tensor | None,
        masked_rows: str,
        *_: object,
    ) -> Tensor:
        with sdpa_kernel(backend):
            return op.heads_inside(op.attention_sdpa(q, k, v, mask, scale, is_causal, masked_rows))

    return formula


def _default(*args: Any) -> Tensor:
    return op.heads_inside(op.attention_inline(*args))


def candidates(args: tuple[Any, ...]) -> dict[str, Callable[..., Tensor]]:
    """SDPA as torch picks its backend, and each other backend that takes these arguments, without repetitions.

    Only the formula computes a softcap and sinks.
    """
    found: dict[str, Callable[..., Tensor]] = {DEFAULT: _default}
    seen = {inductor.code_of(_default, args)}
    softcap, sinks = args[6:8]
    if softcap != 0.0 or sinks is not None:
        return found
    for label, backend in _BACKENDS.items():
        formula = _with_backend(backend)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why a backend cannot run
                code = inductor.code_of(formula, args)
        except RuntimeError:
            continue  # "No available kernel": this backend does not take such shapes, dtypes or masks
        if code not in seen:
            seen.add(code)
            found[label] = formula
    return found


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
    described = f"q {inductor.hints(q)} k {inductor.hints(k)} {q.get_dtype()}"
    tunable = q.get_device().type == "cuda" and inductor.max_autotune() and isinstance(scale, float)
    if not tunable or inductor.settings_in_effect().kernels == "never":
        record(Decision("attention", described, DEFAULT, "torch's choice of backend", site=inductor.current_site()))
        return inductor.inline(_default, *args)
    formulas = candidates(args)
    label, timings = DEFAULT, {}
    if len(formulas) > 1:
        layout = inductor.output_layout(op.attention_fake, args)
        timings = inductor.measure("infuse_attention", {}, formulas, args, layout)
        label = min(timings, key=timings.__getitem__, default=DEFAULT)
    why = f"measured, out of {', '.join(formulas)}" if timings else "the only backend that takes it"
    record(Decision("attention", described, label, why, timings, site=inductor.current_site()))
    return inductor.inline(formulas[label], *args)


inductor.register(torch.ops.infuse.attention.default, lower)
inductor.register_inline(torch.ops.infuse.attention_fwd.default, op.attention_fwd_ref)
inductor.register_inline(torch.ops.infuse.attention_bwd.default, op.attention_bwd_ref)
