"""Lowering of the norms that have kernels in csrc/norm: the formula, inlined, unless the kernel wins in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import graph_neighbours, inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import norm as heuristics
from infuse.ops import library, norm_kernels

FORMULA = "decomposition"


@dataclass(frozen=True, slots=True)
class Norm:
    """One operator with a kernel `infuse::<kind>_out`, and with `infuse::<kind>_kernel` if it has two results.

    rows, vectors: how many of its arguments, the first ones, are tensors with rows, and how many behind them are
    weight and bias. can_run: why the kernel can't take these, and what else it is told (numbers), "" if it can.
    numbers: the arguments behind the tensors, by the names that the kernel has for them.
    """

    kind: str
    rows: int
    vectors: int
    results: int
    formula: Callable[..., Any]
    fake: Callable[..., Any]
    can_run: Callable[..., str]
    numbers: Callable[[dict[str, Any]], dict[str, Any]]
    choice: Any

    @property
    def passes(self) -> int:
        """Tensors that the formula alone reads and writes."""
        return self.rows + self.results

    def split(self, args: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The tensors, None where one is missing, and the kernel's numbers."""
        names = [argument.name for argument in getattr(torch.ops.infuse, self.kind).default._schema.arguments]
        tensors = self.rows + self.vectors
        return list(args[:tensors]), self.numbers(dict(zip(names[tensors:], args[tensors:])))


def register(
    kind: str,
    *,
    rows: int,
    vectors: int,
    results: int,
    formula: Callable[..., Any],
    fake: Callable[..., Any],
    can_run: Callable[..., str],
    numbers: Callable[[dict[str, Any]], dict[str, Any]] = lambda numbers: numbers,
) -> Norm:
    """Gives `infuse::<kind>` its lowering."""

    def run(*tensors: Tensor, out: Tensor, given: str, kernel_config: int, **numbers: Any) -> Tensor:
        """What generated code calls: the kernel, writing into `out`. given: which tensors there are, "1" and "0"."""
        remaining = iter(tensors)
        every = [next(remaining) if flag == "1" else None for flag in given]
        # Only when candidates are timed: `<kind>_kernel` is what goes into a graph.
        more = [torch.empty_like(every[0], memory_format=torch.contiguous_format)] if results == 2 else []  # type: ignore[arg-type]
        getattr(torch.ops.infuse, f"{kind}_out")(*every, *numbers.values(), kernel_config, out, *more)
        return out

    # The source's id is in the name, which is part of the key of Inductor's autotuning cache.
    choice = inductor.kernel_choice(f"infuse_{kind}_{build.source_id()}", run)
    norm = Norm(kind, rows, vectors, results, formula, fake, can_run, numbers, choice)
    inductor.register(getattr(torch.ops.infuse, kind).default, lambda *args: lower(norm, args))
    return norm


def _with_defaults(norm: Norm, args: Sequence[Any]) -> tuple[Any, ...]:
    schema = getattr(torch.ops.infuse, norm.kind).default._schema.arguments
    return (*args, *(argument.default_value for argument in schema[len(args) :]))


def decline(norm: Norm, args: Sequence[Any]) -> str:
    """Why no kernel may run here, "" when one may."""
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(args[0].get_device()):
        return reason
    tensors, numbers = norm.split(args)
    if not all(isinstance(number, (bool, int, float, str)) for number in numbers.values()):
        return "a number is symbolic"
    with inductor.fake_mode():
        examples = [None if tensor is None else inductor.example(tensor) for tensor in tensors]
        return norm.can_run(*examples, **({"groups": numbers["groups"]} if "groups" in numbers else {}))


def lower(norm: Norm, given: Sequence[Any]) -> Any:
    """The IR node, or nodes, of the results."""
    args = _with_defaults(norm, given)
    x = args[0]
    with inductor.fake_mode():
        scattered = norm_kernels.are_scattered(inductor.example(x))
    problem = heuristics.Problem(
        norm.kind,
        *inductor.rows_and_row_size(x),
        x.get_dtype().itemsize,
        library.capability(x.get_device()),
        scattered=scattered,
        captured=inductor.cuda_graphs(),
    )
    described = f"{problem.rows}x{problem.row_size} {x.get_dtype()}"

    def take(
        label: str, why: str, timings: Mapping[str, float] | None = None, costs: Mapping[str, float] | None = None
    ) -> Any:
        record(Decision(norm.kind, described, label, why, timings or {}, costs or {}, inductor.current_site()))
        return inductor.inline(norm.formula, *args) if label == FORMULA else _call(norm, args, _config_of(label))

    if reason := decline(norm, args):
        return take(FORMULA, reason)
    if inductor.settings_in_effect().kernels == "always":
        return take("kernel_-1", "kernels are always taken")
    around = graph_neighbours.neighbours(args[: norm.rows], inductor.current_node(), norm.results)
    if inductor.max_autotune():
        timings, how = _measure(norm, args, problem), "measured"
    else:
        timings, how = heuristics.expected_times(problem, norm.passes), "by stored measurements"
    # The formula may read tensors twice: a pass that fusing would save costs what one costs the fastest.
    passes = norm.passes * timings.get(FORMULA, 0.0) / min(timings.values(), default=1.0)
    label, costs = profit.choose(timings, FORMULA, passes, around.passes)
    why = f"{how}; fusing with the neighbours saves {around.passes} passes"
    return take(label, why, timings if how == "measured" else None, costs if how == "measured" else None)


def _measure(norm: Norm, args: Sequence[Any], problem: heuristics.Problem) -> Mapping[str, float]:
    """Milliseconds of the formula and of every configuration."""
    configs = heuristics.configurations(problem, len(library.configurations("norm")))
    kernels = {f"kernel_{config}": _kernel(norm, args, config) for config in configs}
    layout = inductor.output_layout(norm.fake, args)
    return inductor.measure(f"infuse_{norm.kind}", kernels, {FORMULA: norm.formula}, args, layout)


def _config_of(label: str) -> int:
    return int(label.removeprefix("kernel_"))


def _kernel(norm: Norm, args: Sequence[Any], config: int) -> inductor.Kernel:
    tensors, numbers = norm.split(args)
    given = "".join("0" if tensor is None else "1" for tensor in tensors)
    return inductor.Kernel(norm.choice, {"given": given, "kernel_config": config, **numbers})


def _call(norm: Norm, args: Sequence[Any], config: int) -> Any:
    tensors, numbers = norm.split(args)
    if norm.results == 1:
        present = [tensor for tensor in tensors if tensor is not None]
        return inductor.call_kernel(_kernel(norm, args, config), present, inductor.output_layout(norm.fake, args))
    operator = getattr(torch.ops.infuse, f"{norm.kind}_kernel").default
    return inductor.call_operator(operator, *tensors, *numbers.values(), config)
