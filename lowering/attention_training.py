"""Lowering of attention in training: out with the log-sum-exp, and the gradients, each by a kernel or by torch's own.

Both passes are chosen apart: they exchange q, k, v, out and the log-sum-exp, whoever computes them. The formula, which
holds all scores in memory, is left for what no kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import attention_backends as backends
from infuse.lowering import inductor
from infuse.lowering.attention_candidates import cannot_run, describe
from infuse.lowering.attention_tile_maps import tile_map
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import attention as heuristics
from infuse.ops import attention as op
from infuse.ops import attention_backward_kernels, attention_kernels, library
from infuse.ops import attention_training as _operators  # noqa: F401  (defines the kernels' operators)

FORMULA = "decomposition"
_OPTIONAL = ("mask", "tile_map", "sinks", "seed")


@dataclass(frozen=True, slots=True)
class Site:
    """The arguments of infuse::attention_fwd; IR nodes for tensors, None for those that are not there."""

    q: Any
    k: Any
    v: Any
    mask: Any
    scale: Any
    is_causal: bool
    softcap: Any
    sinks: Any
    masked_rows: str
    dropout_p: Any
    seed: Any

    @property
    def inference_args(self) -> tuple[Any, ...]:
        """As infuse::attention has them."""
        first = (self.q, self.k, self.v, self.mask, self.scale, self.is_causal, self.softcap, self.sinks)
        return (*first, self.masked_rows, self.dropout_p, False)

    @property
    def keywords(self) -> dict[str, Any]:
        """What a kernel is given beside tensors."""
        numbers = {"scale": float(self.scale), "softcap": float(self.softcap), "dropout_p": float(self.dropout_p)}
        return {**numbers, "is_causal": self.is_causal, "nan": self.masked_rows in ("nan", "softmax")}

    def map(self) -> Any:
        """The map of the mask's tiles in the graph, None without a mask."""
        return None if self.mask is None else tile_map(self.mask, self.q.get_size()[2], self.k.get_size()[2])


def _map_of(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else attention_kernels.tile_map(mask, q.shape[2], k.shape[2])


def _run_forward(
    *tensors: Tensor,
    given: tuple[str, ...],
    scale: float,
    is_causal: bool,
    softcap: float,
    nan: bool,
    dropout_p: float,
    config: int,
    out: Tensor,
) -> Tensor:
    """What a measurement calls: the kernel, which allocates its results itself."""
    q, k, v, *optional = tensors
    named = dict(zip(given, optional))
    mask, sinks, seed = (named.get(name) for name in ("mask", "sinks", "seed"))
    flags = (scale, is_causal, softcap, sinks, nan, dropout_p, seed, config)
    torch.ops.infuse.attention_forward(q, k, v, mask, _map_of(mask, q, k), *flags)
    return out


def _run_backward(
    *tensors: Tensor,
    given: tuple[str, ...],
    scale: float,
    is_causal: bool,
    softcap: float,
    nan: bool,
    dropout_p: float,
    deterministic: bool,
    config: int,
    out: Tensor,
) -> Tensor:
    """The same for the gradients."""
    dout, q, k, v, result, lse, *optional = tensors
    named = dict(zip(given, optional))
    mask, sinks, seed = (named.get(name) for name in ("mask", "sinks", "seed"))
    flags = (scale, is_causal, softcap, sinks, dropout_p, seed, deterministic, config)
    torch.ops.infuse.attention_backward(dout, q, k, v, result, lse, mask, _map_of(mask, q, k), *flags)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_FORWARD = inductor.kernel_choice(f"infuse_attention_forward_lse_{build.source_id()}", _run_forward)
_BACKWARD = inductor.kernel_choice(f"infuse_attention_backward_{build.source_id()}", _run_backward)


@dataclass(frozen=True, slots=True)
class Pass:
    """One of the two passes: its kernels' configurations, and torch's own operators for the same."""

    name: str
    configurations: str  # the table's name
    check: Callable[..., str]
    choice: Any
    contestants: Callable[[tuple[Any, ...]], dict[str, Callable[..., Any]]]


_PASSES = {
    "attention_fwd": Pass(
        "attention_fwd", attention_kernels.FORWARD, attention_kernels.can_forward, _FORWARD, backends.forward
    ),
    "attention_bwd": Pass(
        "attention_bwd",
        attention_backward_kernels.BACKWARD,
        attention_backward_kernels.can_backward,
        _BACKWARD,
        backends.backward,
    ),
}


def _choose(of: Pass, site: Site, tensors: tuple[Any, ...], more: dict[str, Any]) -> tuple[str, Any]:
    """The label of what computes a pass, and its function if that is no kernel. more: keywords of the kernel."""
    declined = cannot_run(site.inference_args, of.check)
    formulas = of.contestants(site.inference_args)
    settings, timings = inductor.settings_in_effect(), {}
    labels = (
        [] if declined else [f"kernel_{config}" for config in range(-1, len(library.configurations(of.configurations)))]
    )
    if labels and settings.kernels == "always":
        label, why = labels[0], "kernels are always taken"
    elif len(labels) + len(formulas) > 1 and inductor.max_autotune():
        timings = _measure(of, site, tensors, labels, formulas, more)
        label, why = min(timings, key=timings.__getitem__, default=FORMULA), f"measured, out of {', '.join(timings)}"
    elif labels and (
        not formulas or heuristics.trains(describe(site.inference_args), library.capability(site.q.get_device()))
    ):
        others = heuristics.backward(describe(site.inference_args)) if of.name == "attention_bwd" else ""
        label, why = others if others in formulas else labels[0], "heuristic"
    else:
        label, why = next(iter(formulas), FORMULA), declined or "torch's own operator"
    described = f"q {inductor.hints(site.q)} k {inductor.hints(site.k)} {site.q.get_dtype()}"
    record(Decision(of.name, described, label, why, timings, site=inductor.current_site()))
    return label, formulas.get(label)


def _measure(
    of: Pass,
    site: Site,
    tensors: tuple[Any, ...],
    labels: list[str],
    formulas: dict[str, Callable[..., Any]],
    more: dict[str, Any],
) -> dict[str, float]:
    """Milliseconds of every candidate. tensors: q, k, v, and before and behind them what the backward pass has more."""
    optional = {"mask": site.mask, "sinks": site.sinks, "seed": site.seed}
    given = tuple(name for name, tensor in optional.items() if tensor is not None)
    kernels = {
        label: inductor.Kernel(
            of.choice, {**site.keywords, **more, "given": given, "config": int(label.removeprefix("kernel_"))}
        )
        for label in labels
    }
    args = (*tensors, *optional.values())
    rest = (site.scale, site.is_causal)
    count = len(tensors) + 1

    def bound(formula: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: formula(*given[:count], *rest)

    layout = inductor.output_layout(torch.empty_like, (site.q,))
    bounds = {label: bound(formula) for label, formula in formulas.items()}
    return inductor.measure(f"infuse_{of.name}", kernels, bounds, args, layout)


def lower_forward(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scale: Any,
    is_causal: bool,
    softcap: Any = 0.0,
    sinks: Any = None,
    masked_rows: str = "zeros",
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Any:
    """The IR nodes of out and the log-sum-exp."""
    site = Site(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)
    label, formula = _choose(_PASSES["attention_fwd"], site, (q, k, v), {})
    if formula is not None:
        return inductor.inline(formula, q, k, v, mask, scale, is_causal)
    if label == FORMULA:
        args = (q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)
        return inductor.inline(op.attention_fwd_ref, *args)
    numbers = site.keywords
    return inductor.call_operator(
        torch.ops.infuse.attention_forward.default,
        *(q, k, v, mask, site.map(), numbers["scale"], is_causal, numbers["softcap"], sinks, numbers["nan"]),
        *(numbers["dropout_p"], seed, int(label.removeprefix("kernel_"))),
    )


def lower_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    mask: Any,
    scale: Any,
    is_causal: bool,
    needs_dmask: bool,
    softcap: Any = 0.0,
    sinks: Any = None,
    masked_rows: str = "zeros",
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Any:
    """The IR nodes of dq, dk, dv, dmask and dsinks."""
    args = (dout, q, k, v, out, lse, mask, scale, is_causal, needs_dmask, softcap, sinks, masked_rows, dropout_p, seed)
    site = Site(q, k, v, mask, scale, is_causal, softcap, sinks, masked_rows, dropout_p, seed)
    if needs_dmask:
        reason = "the mask has a gradient"
        record(Decision("attention_bwd", f"q {inductor.hints(q)}", FORMULA, reason, site=inductor.current_site()))
        return inductor.inline(op.attention_bwd_ref, *args)
    deterministic = torch.are_deterministic_algorithms_enabled()
    more = {"deterministic": deterministic}
    label, formula = _choose(_PASSES["attention_bwd"], site, (dout, q, k, v, out, lse), more)
    if label == FORMULA:
        return inductor.inline(op.attention_bwd_ref, *args)
    if formula is not None:
        found = inductor.inline(formula, dout, q, k, v, out, lse, mask, scale, is_causal)
    else:
        numbers = site.keywords
        found = inductor.call_operator(
            torch.ops.infuse.attention_backward.default,
            *(dout, q, k, v, out, lse, mask, site.map(), numbers["scale"], is_causal, numbers["softcap"], sinks),
            *(numbers["dropout_p"], seed, deterministic, int(label.removeprefix("kernel_"))),
        )
    return (*found, *_gradients_beside(dout, out, lse, sinks))


def _gradients_beside(dout: Any, out: Any, lse: Any, sinks: Any) -> tuple[Any, Any]:
    """dmask, which nobody reads, and dsinks."""
    nothing = inductor.inline(lambda dout: dout.new_empty(0), dout)
    return nothing, nothing if sinks is None else inductor.inline(op.attention_dsinks, dout, out, lse, sinks)


inductor.register(torch.ops.infuse.attention_fwd.default, lower_forward)
inductor.register(torch.ops.infuse.attention_bwd.default, lower_backward)
