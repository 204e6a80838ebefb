"""Lowering of the norms' backward operators: one kernel for dx, dweight and dbias, or the formula, inlined.

Their forward is opened to AOTAutograd: its formula stands in the joint graph as if the author had spelled it, so that
the partitioner saves what it would save without Infuse, and computes y again in the backward where it would. What is
left of the operator is its backward, which reads the input, that lives anyway, and rstd (and mean).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import norm_backward as heuristics
from infuse.ops import add_layer_norm, add_rms_norm, layer_norm, library, norm_backward, rms_norm

FORMULA = "decomposition"
KERNEL = "kernel_-1"


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of the four operators' backward, IR nodes for tensors."""

    dy: Any
    dsum: Any
    x: Any
    weight: Any
    bias: Any
    mean: Any
    rstd: Any
    weight_offset: Any
    cast_before_weight: bool
    minimum: Any = None

    def of_kernel(self, config: int) -> tuple[Any, ...]:
        tensors = (self.dy, self.dsum, self.x, self.weight, self.bias, self.mean, self.rstd)
        return (*tensors, self.weight_offset, config)


def _rms_norm(
    dy: Any, x: Any, weight: Any, rstd: Any, weight_offset: Any, cast_before_weight: bool, minimum: Any = None
) -> Arguments:
    return Arguments(dy, None, x, weight, None, None, rstd, weight_offset, cast_before_weight, minimum)


def _add_rms_norm(
    dy: Any, dsum: Any, total: Any, weight: Any, rstd: Any, offset: Any, cast: bool, minimum: Any = None
) -> Arguments:
    return Arguments(dy, dsum, total, weight, None, None, rstd, offset, cast, minimum)


def _layer_norm(dy: Any, x: Any, *rest: Any) -> Arguments:
    return Arguments(dy, None, x, *rest)


def _run(*tensors: Tensor, given: tuple[bool, ...], offset: float, config: int, out: Tensor) -> Tensor:
    """What a measurement calls: the kernel, with the tensors that are there; it allocates its results itself."""
    remaining = iter(tensors)
    present = [next(remaining) if there else None for there in given]
    torch.ops.infuse.norm_backward(*present, offset, config)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_CHOICE = inductor.kernel_choice(f"infuse_norm_backward_{build.source_id()}", _run)


def decline(arguments: Arguments, num_gradients: int) -> str:
    """Why no kernel may run here, "" when one may."""
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(arguments.x.get_device()):
        return reason
    if not isinstance(arguments.weight_offset, (int, float)):
        return "weight_offset is symbolic"
    if inductor.results_taken(inductor.current_node()) < num_gradients:
        return "not every gradient is needed"
    with inductor.fake_mode():
        dsum, weight, bias = (
            None if tensor is None else inductor.example(tensor)
            for tensor in (arguments.dsum, arguments.weight, arguments.bias)
        )
        dy, x = inductor.example(arguments.dy), inductor.example(arguments.x)
        return norm_backward.can_run(dy, dsum, x, weight, bias, arguments.minimum)


def _measure(formula: Callable[..., Any], args: tuple[Any, ...], arguments: Arguments) -> Mapping[str, float]:
    """Milliseconds of the formula and of every configuration. Both take the tensors in the same order."""
    given = tuple(tensor is not None for tensor in arguments.of_kernel(-1)[:7])
    keywords = {"given": given, "offset": arguments.weight_offset}
    kernels = {
        f"kernel_{config}": inductor.Kernel(_CHOICE, {**keywords, "config": config})
        for config in heuristics.configurations(len(library.configurations("norm_backward")))
    }
    layout = inductor.output_layout(torch.empty_like, (arguments.x,))
    return inductor.measure("infuse_norm_backward", kernels, {FORMULA: formula}, args, layout)


def lower(kind: str, formula: Callable[..., Any], parse: Callable[..., Arguments], *args: Any) -> Any:
    """The IR nodes of dx, dweight and, for LayerNorm, dbias."""
    arguments = parse(*args)
    x, add, centered = arguments.x, arguments.dsum is not None, arguments.mean is not None
    num_gradients = 1 + (arguments.weight is not None) + (arguments.bias is not None)
    problem = heuristics.Problem(*inductor.rows_and_row_size(x), x.get_dtype().itemsize, add, centered)
    described = f"{problem.rows}x{problem.row_size} {x.get_dtype()}"

    def take(label: str, why: str, timings: Any = None, costs: Any = None) -> Any:
        record(Decision(kind, described, label, why, timings or {}, costs or {}, inductor.current_site()))
        if label == FORMULA:
            return inductor.inline(formula, *args)
        config = int(label.removeprefix("kernel_"))
        found = inductor.call_operator(torch.ops.infuse.norm_backward.default, *arguments.of_kernel(config))
        return found if centered else found[:2]

    if reason := decline(arguments, num_gradients):
        return take(FORMULA, reason)
    if inductor.settings_in_effect().kernels == "always":
        return take(KERNEL, "kernels are always taken")
    gradients = (arguments.dy, arguments.dsum) if add else (arguments.dy,)
    around = inductor.neighbours(gradients, inductor.current_node())
    if inductor.max_autotune():
        timings, how = _measure(formula, args, arguments), "measured"
    else:
        timings, how = heuristics.expected_times(problem, inductor.capability(x)), "heuristic"
    # The formula reads some tensors twice: a pass that fusing would save costs what one costs the fastest.
    passes = problem.passes * timings.get(FORMULA, 0.0) / min(timings.values(), default=1.0)
    label, costs = profit.choose(timings, FORMULA, passes, around.passes)
    why = f"{how}; fusing with the neighbours saves {around.passes} passes"
    return take(label, why, timings if how == "measured" else None, costs if how == "measured" else None)


def _register(kind: str, target: Any, formula: Callable[..., Any], parse: Callable[..., Arguments]) -> None:
    inductor.register(target, partial(lower, kind, formula, parse))


_register("rms_norm_bwd", torch.ops.infuse.rms_norm_bwd.default, rms_norm.rms_norm_bwd_ref, _rms_norm)
_register("layer_norm_bwd", torch.ops.infuse.layer_norm_bwd.default, layer_norm.layer_norm_bwd_ref, _layer_norm)
_register(
    "add_rms_norm_bwd", torch.ops.infuse.add_rms_norm_bwd.default, add_rms_norm.add_rms_norm_bwd_ref, _add_rms_norm
)
_register(
    "add_layer_norm_bwd", torch.ops.infuse.add_layer_norm_bwd.default, add_layer_norm.add_layer_norm_bwd_ref, Arguments
)
inductor.decompose(torch.ops.infuse.rms_norm_fwd.default, rms_norm.rms_norm_fwd_ref)
inductor.decompose(torch.ops.infuse.layer_norm_fwd.default, layer_norm.layer_norm_fwd_ref)
inductor.decompose(torch.ops.infuse.add_rms_norm_fwd.default, add_rms_norm.add_rms_norm_fwd_ref)
inductor.decompose(torch.ops.infuse.add_layer_norm_fwd.default, add_layer_norm.add_layer_norm_fwd_ref)
