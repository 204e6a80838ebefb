"""Lowering of the pieces of a gated MLP that trains; see infuse.ops.gated_mlp_passes.

The policy keeps such an MLP whole only where the kernel of the forward is faster, so that is taken. What the backward's
pieces are made of is measured under max-autotune, and otherwise taken from stored measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import inductor
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import gated_backward_kernels, library, linear_kernels
from infuse.ops.gated_mlp_passes import (
    linear_gated_bwd_ref,
    linear_pair_ref,
    linear_swiglu_fwd_ref,
    recomputed_gated_bwd_ref,
)

FORMULA = "decomposition"
PASS = "product and one pass"  # torch's product, then the kernel of the activation's gradients


def _cannot_run(x: Any) -> str:
    if inductor.settings_in_effect().kernels == "never" or inductor.writes_cpp():
        return "kernels are switched off"
    return library.missing(x.get_device())


def _take(op: str, x: Any, label: str, why: str, timings: Mapping[str, float] | None = None) -> None:
    described = f"{'x'.join(map(str, inductor.hints(x)))} {x.get_dtype()}"
    record(Decision(op, described, label, why, timings or {}, site=inductor.current_site()))


def lower_forward(x: Any, weights: Sequence[Any], biases: Sequence[Any], order: str, *flags: Any) -> Any:
    """The IR nodes of h and gate_up."""
    args = (x, weights, biases, order, *flags)
    reason = _cannot_run(x)
    if not reason:
        with inductor.fake_mode():
            found, reason = linear_kernels.families("linear_swiglu", inductor.examples(args))
        reason = "" if "gated" in found else reason or "no kernel for training with so few rows"
    if reason:
        _take("linear_swiglu_fwd", x, FORMULA, reason)
        return inductor.inline(linear_swiglu_fwd_ref, *args)
    _take("linear_swiglu_fwd", x, "gated_-1", "by stored measurements")
    operator = torch.ops.infuse.linear_swiglu_fwd_kernel.default
    return inductor.call_operator(operator, x, weights, biases, order, flags[0], -1)


def _product_and_pass(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    activation, *_, wants_h = rest
    dh = dy @ down_weight
    found: tuple[Tensor, Tensor] = torch.ops.infuse.gated_backward(dh, gate_up, activation, wants_h, -1)
    return found


def _run_backward(*tensors: Tensor, out: Tensor, activation: str, wants_h: bool, config: int) -> Tensor:
    """What a measurement calls: the kernel, which allocates its results itself."""
    torch.ops.infuse.linear_gated_backward(*tensors, activation, wants_h, config)
    return out


def _run_pair(*tensors: Tensor, out: Tensor, config: int) -> Tensor:
    """The same for the gradient of x."""
    torch.ops.infuse.linear_pair_product(*tensors, config)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_BACKWARD = inductor.kernel_choice(f"infuse_linear_gated_backward_{build.source_id()}", _run_backward)
_PAIR = inductor.kernel_choice(f"infuse_linear_pair_{build.source_id()}", _run_pair)


def _choose(
    op: str,
    args: Sequence[Any],
    check: Callable[..., str],
    formulas: Mapping[str, Callable[..., Any]],
    choice: Any,
    keywords: Mapping[str, Any],
) -> str:
    """The label of what computes a piece of the backward. formulas: what competes with the kernel, default first."""
    default = next(iter(formulas))
    with inductor.fake_mode():
        reason = check(*inductor.examples(args))
    if reason:
        _take(op, args[0], default, reason)
        return default
    timings: Mapping[str, float] = {}
    if inductor.settings_in_effect().kernels == "always":
        label, why = "kernel_-1", "kernels are always taken"
    elif inductor.max_autotune():
        configs = range(-1, len(library.configurations(gated_backward_kernels.GEMMS)))
        kernels = {f"kernel_{i}": inductor.Kernel(choice, {**keywords, "config": i}) for i in configs}
        layout = inductor.output_layout(formulas[default], args)
        timings = inductor.measure(f"infuse_{op}", kernels, formulas, args, layout, tune_products=True)
        label, why = min(timings, key=timings.__getitem__, default=default), "measured"
    else:
        runs_well = heuristics.backward_runs_well(op, library.capability(args[0].get_device()))
        label, why = "kernel_-1" if runs_well else default, "by stored measurements"
    _take(op, args[0], label, why, timings)
    return label


def lower_backward(dy: Any, down_weight: Any, gate_up: Any, *rest: Any) -> Any:
    """The IR nodes of dgate_up and h."""
    args = (dy, down_weight, gate_up, *rest)
    activation, limit, _, up_offset, wants_h = rest
    reason = _cannot_run(dy) or ("no kernel for a gate with limits" if limit is not None or up_offset else "")
    with inductor.fake_mode():
        reason = reason or gated_backward_kernels.can_differentiate(
            inductor.example(dy), inductor.example(gate_up), activation
        )
    if reason:
        _take("linear_gated_bwd", dy, FORMULA, reason)
        return inductor.inline(linear_gated_bwd_ref, *args)

    def check(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> str:
        return gated_backward_kernels.can_differentiate_linear(dy, down_weight, gate_up, activation)

    formulas = {PASS: _product_and_pass, FORMULA: linear_gated_bwd_ref}
    keywords = {"activation": activation, "wants_h": wants_h}
    label = _choose("linear_gated_bwd", args, check, formulas, _BACKWARD, keywords)
    if label in formulas:
        return inductor.inline(formulas[label], *args)
    operator = torch.ops.infuse.linear_gated_backward.default
    config = int(label.removeprefix("kernel_"))
    return inductor.call_operator(operator, dy, down_weight, gate_up, activation, wants_h, config)


def lower_pair(dgate_up: Any, gate_weight: Any, up_weight: Any) -> Any:
    """The IR node of dx."""
    args = (dgate_up, gate_weight, up_weight)
    formulas = {FORMULA: linear_pair_ref}
    if reason := _cannot_run(dgate_up):
        _take("linear_pair", dgate_up, FORMULA, reason)
        return inductor.inline(linear_pair_ref, *args)
    label = _choose("linear_pair", args, gated_backward_kernels.can_multiply_pair, formulas, _PAIR, {})
    if label in formulas:
        return inductor.inline(linear_pair_ref, *args)
    config = int(label.removeprefix("kernel_"))
    return inductor.call_operator(torch.ops.infuse.linear_pair_product.default, *args, config)[0]


inductor.register(torch.ops.infuse.linear_swiglu_fwd.default, lower_forward)
inductor.register(torch.ops.infuse.linear_gated_bwd.default, lower_backward)
inductor.register(torch.ops.infuse.linear_pair.default, lower_pair)
inductor.register_inline(torch.ops.infuse.recomputed_gated_bwd.default, recomputed_gated_bwd_ref)
