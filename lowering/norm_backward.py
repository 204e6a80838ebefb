"""Lowering of the norms' backward operators: one kernel for dx, dweight and dbias, or the formula, inlined.

Their forward is opened to AOTAutograd: its formula stands in the joint graph as if the author had spelled it, so that
the partitioner saves what it would save without Infuse, and computes y again in the backward where it would. What is
left of the operator is its backward, which reads the input, that lives anyway, and rstd (and mean).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import graph_neighbours, inductor, inductor_sums, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import norm_backward as heuristics
from infuse.ops import add_layer_norm, add_rms_norm, gated_rms_norm, layer_norm, library, norm_backward, rms_norm

FORMULA = "decomposition"
KERNEL = "kernel_-1"


# The order of the tensors, in which a measurement hands over those that are there.
TENSORS = ("dy", "dy_1", "dy_2", "dsum", "x", "gate", "weight", "bias", "mean", "rstd")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the kernels are given: IR nodes, or tensors where they are measured, None for what is not there."""

    dy: Any
    x: Any
    weight: Any
    rstd: Any
    dsum: Any = None
    gate: Any = None
    bias: Any = None
    mean: Any = None
    dy_1: Any = None
    dy_2: Any = None
    weight_offset: Any = 0.0
    minimum: Any = None
    gate_first: bool = False
    gate_is_silu: bool = False

    @property
    def numbers(self) -> dict[str, Any]:
        names = ("weight_offset", "minimum", "gate_first", "gate_is_silu")
        return {name: getattr(self, name) for name in names}

    @property
    def num_gradients(self) -> int:
        return 1 + sum(tensor is not None for tensor in (self.gate, self.weight, self.bias))

    def call(self, config: int) -> tuple[Any, tuple[Any, ...]]:
        """The kernel's operator and its arguments."""
        if self.gate is not None:
            gated = (self.dy, self.x, self.gate, self.weight, self.rstd, self.gate_first, self.gate_is_silu)
            return torch.ops.infuse.gated_norm_backward.default, (*gated, config, self.dy_1, self.dy_2)
        tensors = (self.dy, self.dsum, self.x, self.weight, self.bias, self.mean, self.rstd)
        numbers = (self.weight_offset, config, self.dy_1, self.dy_2, self.minimum or 0.0)
        return torch.ops.infuse.norm_backward.default, (*tensors, *numbers)


def _rms_norm(dy: Any, x: Any, weight: Any, rstd: Any, offset: Any, cast: bool, minimum: Any = None) -> Arguments:
    return Arguments(dy, x, weight, rstd, weight_offset=offset, minimum=minimum)


def _add_rms_norm(dy: Any, dsum: Any, *rest: Any) -> Arguments:
    return replace(_rms_norm(dy, *rest), dsum=dsum)


def _layer_norm(dy: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, offset: Any, cast: bool) -> Arguments:
    return Arguments(dy, x, weight, rstd, bias=bias, mean=mean, weight_offset=offset)


def _add_layer_norm(dy: Any, dsum: Any, *rest: Any) -> Arguments:
    return replace(_layer_norm(dy, *rest), dsum=dsum)


def _gated_rms_norm(
    dy: Any, x: Any, gate: Any, weight: Any, rstd: Any, norm_before_gate: bool, activation: str, *rest: Any
) -> Arguments:
    is_silu = activation == "silu"
    return Arguments(dy, x, weight, rstd, gate=gate, gate_first=not norm_before_gate, gate_is_silu=is_silu)


@dataclass(frozen=True, slots=True)
class Folded:
    """The operator with what the kernel does beside it: dy's additions, and the one that reads dx.

    args: the formula's, dy's terms (None for those that are not there) and the other term of dx in front of the rest.
    total: the node of that addition.
    """

    arguments: Arguments
    formula: Callable[..., Any]
    args: tuple[Any, ...]
    num_terms: int
    total: torch.fx.Node | None


def _fold(formula: Callable[..., Any], arguments: Arguments, args: tuple[Any, ...]) -> Folded:
    node, dy, total, other = inductor.current_node(), [arguments.dy], None, None
    if inductor.settings_in_effect().numerics != "exact":
        dy = inductor_sums.terms(arguments.dy, node, norm_backward.MAX_DY_TERMS, arguments.x.get_dtype())
        if arguments.dsum is None and arguments.gate is None and (found := inductor_sums.sum_behind(node)):
            total, other = found
    padded = (*dy, None, None)[:3]

    def whole(dy: Tensor, dy_1: Tensor | None, dy_2: Tensor | None, other: Tensor | None, *rest: Any) -> Any:
        for term in (dy_1, dy_2):
            dy = dy if term is None else dy + term
        dx, *gradients = formula(dy, *rest)
        return (dx if other is None else dx + other, *gradients)

    terms = {"dy": padded[0], "dy_1": padded[1], "dy_2": padded[2]}
    dsum = arguments.dsum if other is None else other
    return Folded(replace(arguments, **terms, dsum=dsum), whole, (*padded, other, *args[1:]), len(dy), total)


def _run(*tensors: Tensor, given: str, config: int, out: Tensor, **numbers: Any) -> Tensor:
    """What a measurement calls: the kernel, which allocates its results itself. given: which tensors there are."""
    remaining = iter(tensors)
    present: dict[str, Any] = {name: next(remaining) if flag == "1" else None for name, flag in zip(TENSORS, given)}
    for name in ("mean", "rstd"):
        present[name] = None if present[name] is None else present[name].contiguous()
    operator, args = Arguments(**present, **numbers).call(config)
    operator(*args)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_CHOICE = inductor.kernel_choice(f"infuse_norm_backward_{build.source_id()}", _run)


def decline(arguments: Arguments) -> str:
    """Why no kernel may run here, "" when one may, if it can take the tensors."""
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(arguments.x.get_device()):
        return reason
    if not isinstance(arguments.weight_offset, (int, float)) or not isinstance(arguments.minimum or 0.0, (int, float)):
        return "a number is symbolic"
    if graph_neighbours.results_taken(inductor.current_node()) < arguments.num_gradients:
        return "not every gradient is needed"
    return ""


def _cannot_run(arguments: Arguments) -> str:
    """Why the kernel cannot take these tensors, "" when it can."""
    with inductor.fake_mode():
        names = ("dy", "dsum", "x", "weight", "bias", "gate")
        tensors = {name: getattr(arguments, name) for name in names}
        examples: dict[str, Any] = {
            name: None if tensor is None else inductor.example(tensor) for name, tensor in tensors.items()
        }
        groups = 1 if arguments.gate is None else inductor.example(arguments.rstd).shape[-1]
        return norm_backward.can_run(**examples, groups=groups)


def _measure(folded: Folded) -> Mapping[str, float]:
    """Milliseconds of the formula and of every configuration, with the additions that the kernel does too."""
    given = "".join("0" if getattr(folded.arguments, name) is None else "1" for name in TENSORS)
    kernels = {
        f"kernel_{config}": inductor.Kernel(_CHOICE, {"given": given, "config": config, **folded.arguments.numbers})
        for config in heuristics.configurations(len(library.configurations("norm_backward")))
    }
    layout = inductor.output_layout(torch.empty_like, (folded.arguments.x,))
    return inductor.measure("infuse_norm_backward", kernels, {FORMULA: folded.formula}, folded.args, layout)


def lower(kind: str, formula: Callable[..., Any], parse: Callable[..., Arguments], *args: Any) -> Any:
    """The IR nodes of dx [, dgate], dweight and, for LayerNorm, dbias."""
    arguments = parse(*args)
    x = arguments.x
    described = f"{'x'.join(map(str, inductor.rows_and_row_size(x)))} {x.get_dtype()}"

    def record_choice(label: str, why: str, timings: Any = None, costs: Any = None) -> None:
        record(Decision(kind, described, label, why, timings or {}, costs or {}, inductor.current_site()))

    if reason := decline(arguments):
        record_choice(FORMULA, reason)
        return inductor.inline(formula, *args)
    folded = _fold(formula, arguments, args)
    if reason := _cannot_run(folded.arguments):
        label = FORMULA
        record_choice(label, reason)
    elif inductor.settings_in_effect().kernels == "always":
        label = KERNEL
        record_choice(label, "kernels are always taken")
    else:
        label, *told = _choose(folded)
        record_choice(label, *told)
    if label == FORMULA:
        return inductor.inline(formula, *args)
    found = _call(folded, int(label.removeprefix("kernel_")))
    if folded.total is not None:
        inductor_sums.replace(folded.total, found[0])
    return found if arguments.mean is not None or arguments.gate is not None else found[:2]


def _call(folded: Folded, config: int) -> tuple[Any, ...]:
    """The kernel's results. dx takes the memory of a term of dy where it can, as it would in Inductor's own kernel."""
    arguments = folded.arguments
    mean = None if arguments.mean is None else inductor.contiguous(arguments.mean)
    operator, args = replace(arguments, mean=mean, rstd=inductor.contiguous(arguments.rstd)).call(config)
    terms = [term for term in (arguments.dy, arguments.dy_1, arguments.dy_2) if term is not None]
    out = None if arguments.gate is not None else inductor_sums.overwritable(terms, inductor.current_node())
    if out is None:
        return inductor.call_operator(operator, *args)
    return (out, *inductor.call_operator(torch.ops.infuse.norm_backward_into.default, out, *args))


def _choose(folded: Folded) -> tuple[str, str, Any, Any]:
    """Label, why, timings and costs (None where nothing was measured)."""
    arguments, node = folded.arguments, inductor.current_node()
    is_add = arguments.dsum is not None
    rows, row_size = inductor.rows_and_row_size(arguments.x)
    tensors = 3 + (folded.num_terms - 1) + is_add + 2 * (arguments.gate is not None)
    itemsize = arguments.x.get_dtype().itemsize
    problem = heuristics.Problem(
        rows, row_size, itemsize, tensors, arguments.mean is not None, arguments.gate is not None
    )
    dy = arguments.dy if folded.num_terms == 1 else None
    # In the order of the formula's arguments. An x that the partitioner has computed again counts, too.
    more = (arguments.dsum,) if is_add and folded.total is None else ()
    read = (dy, *more, arguments.x, *(() if arguments.gate is None else (arguments.gate,)))
    results = 1 if arguments.gate is None else 2
    around = graph_neighbours.neighbours(read, node, results, folded.total)
    if inductor.max_autotune():
        timings, how = _measure(folded), "measured"
    else:
        timings, how = heuristics.expected_times(problem, library.capability(arguments.x.get_device())), "heuristic"
    # The formula reads some tensors twice: a pass that fusing would save costs what one costs the fastest.
    passes = problem.tensors * timings.get(FORMULA, 0.0) / min(timings.values(), default=1.0)
    label, costs = profit.choose(timings, FORMULA, passes, around.passes)
    also = [f"dy's {folded.num_terms} terms"] if folded.num_terms > 1 else []
    also += ["the sum with dx"] if folded.total is not None else []
    why = f"{how}; fusing with the neighbours saves {around.passes} passes"
    why += f"; takes {' and '.join(also)}" if also and label != FORMULA else ""
    return (label, why, timings, costs) if how == "measured" else (label, why, None, None)


_FORMS: dict[str, tuple[Any, Callable[..., Arguments]]] = {
    "rms_norm": (rms_norm, _rms_norm),
    "layer_norm": (layer_norm, _layer_norm),
    "add_rms_norm": (add_rms_norm, _add_rms_norm),
    "add_layer_norm": (add_layer_norm, _add_layer_norm),
    "gated_rms_norm": (gated_rms_norm, _gated_rms_norm),
}
for _kind, (_module, _parse) in _FORMS.items():
    inductor.decompose(getattr(torch.ops.infuse, f"{_kind}_fwd").default, getattr(_module, f"{_kind}_fwd_ref"))
    _bwd = f"{_kind}_bwd"
    inductor.register(
        getattr(torch.ops.infuse, _bwd).default, partial(lower, _bwd, getattr(_module, f"{_bwd}_ref"), _parse)
    )
