"""Lowering of infuse::attention: SDPA, or a kernel for few query rows; under max-autotune the fastest of all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infuse import build
from infuse.lowering import inductor
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import attention as heuristics
from infuse.ops import attention as op
from infuse.ops import attention_kernels, library

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


def run_decode(
    q: Tensor, k: Tensor, v: Tensor, *optional: Tensor, has_mask: bool, out: Tensor, **keywords: Any
) -> Tensor:
    """What generated code calls: the decode kernel, writing into `out`. optional: mask and sinks, if they are there."""
    mask, sinks = (optional[0] if has_mask else None), (optional[int(has_mask)] if len(optional) > has_mask else None)
    return attention_kernels.decode(q, k, v, mask, sinks, out, **keywords)


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_DECODE = inductor.kernel_choice(f"infuse_attention_decode_{build.source_id()}", run_decode)


def _cannot_decode(args: tuple[Any, ...]) -> str:
    """Why the decode kernel may not run here, "" when it may."""
    q, k, v, mask, scale, _, softcap, sinks, masked_rows, dropout_p, _ = args
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(q.get_device()):
        return reason
    with inductor.fake_mode():
        examples: list[Any] = [None if node is None else inductor.example(node) for node in (q, k, v, mask, sinks)]
        q, k, v, mask, sinks = examples
        return attention_kernels.can_decode(q, k, v, mask, scale, softcap, sinks, masked_rows, dropout_p)


def _decode_kernels(args: tuple[Any, ...], configs: Sequence[int]) -> dict[str, inductor.Kernel]:
    _, _, _, mask, scale, is_causal, softcap, _, masked_rows, *_ = args
    keywords = {
        "has_mask": mask is not None,
        "scale": float(scale),
        "is_causal": is_causal,
        "softcap": float(softcap),
        "masked_rows": masked_rows,
    }
    return {f"decode_{config}": inductor.Kernel(_DECODE, {**keywords, "config": config}) for config in configs}


def _measured(kernels: dict[str, inductor.Kernel], args: tuple[Any, ...], layout: Any) -> tuple[str, dict[str, float]]:
    """The fastest of the kernels and torch's backends, and the time of each; the default if there is but one."""
    formulas = candidates(args)
    if len(formulas) + len(kernels) == 1:
        return DEFAULT, {}
    timings = inductor.measure("infuse_attention", kernels, formulas, args, layout)
    return min(timings, key=timings.__getitem__, default=DEFAULT), timings


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
    declined = _cannot_decode(args)
    kernels = {} if declined else _decode_kernels(args, range(-1, len(library.configurations(attention_kernels.NAME))))
    layout = inductor.output_layout(op.attention_fake, args)
    settings = inductor.settings_in_effect()
    timings: dict[str, float] = {}
    tunable = settings.kernels != "never" and isinstance(scale, float) and (kernels or q.get_device().type == "cuda")
    if kernels and settings.kernels == "always":
        label, why = "decode_-1", "kernels are always taken"
    elif tunable and inductor.max_autotune():
        label, timings = _measured(kernels, args, layout)
        why = f"measured, out of {', '.join(timings)}" if timings else "the only backend that takes it"
    elif kernels and heuristics.decodes_well(inductor.hints(q), inductor.hints(k), library.capability(q.get_device())):
        label, why = "decode_-1", "heuristic"
    else:
        label, why = DEFAULT, "torch's choice of backend"
    described = f"q {inductor.hints(q)} k {inductor.hints(k)} {q.get_dtype()}"
    record(Decision("attention", described, label, why, timings, site=inductor.current_site()))
    if label in kernels:
        tensors = [tensor for tensor in (q, k, v, mask, sinks) if tensor is not None]
        return inductor.call_kernel(kernels[label], tensors, layout)
    return inductor.inline(_default if label == DEFAULT else _with_backend(_BACKENDS[label]), *args)


inductor.register(torch.ops.infuse.attention.default, lower)
inductor.register_inline(torch.ops.infuse.attention_fwd.default, op.attention_fwd_ref)
inductor.register_inline(torch.ops.infuse.attention_bwd.default, op.attention_bwd_ref)
