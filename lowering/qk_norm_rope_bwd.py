"""Lowering of the gradients of normalised, rotated heads: the kernel where it wins in the graph, else the formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import graph_neighbours, inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import rope as heuristics
from infuse.lowering.rope import FORMULA, decline
from infuse.ops import library
from infuse.ops import qk_norm_rope_bwd as op

KERNEL = "kernel_-1"
# Of each tensor the formula reads dy and x, for dweight once more, and writes dx.
FORMULA_PASSES = 5


def _run(*tensors: Tensor, pair: bool, given: tuple[bool, ...], numbers: tuple[Any, ...], out: Tensor) -> Tensor:
    """What a measurement calls: the kernel, with the tensors that are there; it allocates its results itself."""
    remaining = iter(tensors)
    present = [next(remaining) if there else None for there in given]
    name = "qk_norm_rope_pair_bwd" if pair else "qk_norm_rope_bwd"
    getattr(torch.ops.infuse, name)(*present, *numbers)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_CHOICE = inductor.kernel_choice(f"infuse_qk_norm_rope_bwd_{build.source_id()}", _run)


def lower(target: Any, formula: Callable[..., Any], pairs: int, *args: Any) -> Any:
    """The IR nodes of dx and dweight of each tensor. pairs: how many tensors there are."""
    own, (cos, sin, *weights) = args[: 2 * pairs], args[2 * pairs : 3 * pairs + 2]
    tensors, numbers = (*own, cos, sin, *weights), args[3 * pairs + 2 :]
    gradients, xs = own[::2], own[1::2]
    sizes = [inductor.rows_and_row_size(x) for x in xs]
    rows, row_size = sum(size[0] for size in sizes), sizes[0][1]
    capability = library.capability(xs[0].get_device())
    problem = heuristics.Problem(rows, row_size, xs[0].get_dtype().itemsize, bool(numbers[3]), True, capability)
    described = f"{rows}x{row_size} {xs[0].get_dtype()}"
    kind = target._schema.name.partition("::")[2]

    def take(label: str, why: str, timings: Any = None, costs: Any = None) -> Any:
        for site in inductor.current_sites():
            record(Decision(kind, described, label, why, timings or {}, costs or {}, site))
        if label == FORMULA:
            return inductor.inline(formula, *args)
        together = (cos, sin) if inductor.lie_side_by_side(cos, sin) else ()
        return inductor.call_operator(target, *args, as_they_lie=together)

    def can_run() -> str:
        if not all(isinstance(number, (bool, int, float)) for number in numbers):
            return "eps is symbolic"
        tables = inductor.example(cos), inductor.example(sin)
        reasons = (
            op.can_run(
                inductor.example(x),
                *tables,
                None if weight is None else inductor.example(weight),
                numbers[4],
                inductor.example(dy),
            )
            for dy, x, weight in zip(gradients, xs, weights)
        )
        return next(filter(None, reasons), "")

    if declined := decline(xs[0], can_run):
        return take(FORMULA, declined)
    if inductor.settings_in_effect().kernels == "always":
        return take(KERNEL, "kernels are always taken")
    # Of the results only the first dx: the sums for dweight are small.
    lost = graph_neighbours.neighbours(own, inductor.current_node(), 1).passes
    if not inductor.max_autotune():
        return take(KERNEL if lost == 0 and heuristics.runs_well(problem) else FORMULA, "heuristic")
    given = tuple(tensor is not None for tensor in tensors)
    keywords = {"pair": pairs == 2, "given": given, "numbers": numbers}
    layout = inductor.output_layout(torch.empty_like, (xs[0],))
    apart = [inductor.stand_in(arg, contiguous=True) if arg is cos or arg is sin else arg for arg in args]
    timings = inductor.measure(
        f"infuse_{kind}", {KERNEL: inductor.Kernel(_CHOICE, keywords)}, {FORMULA: formula}, apart, layout
    )
    label, costs = profit.choose(timings, FORMULA, FORMULA_PASSES * pairs, lost)
    return take(label, f"measured; fusing with the neighbours saves {lost} passes", timings, costs)


for _name, _formula, _pairs in (
    ("qk_norm_rope_bwd", op.qk_norm_rope_bwd_ref, 1),
    ("qk_norm_rope_pair_bwd", op.qk_norm_rope_pair_bwd_ref, 2),
):
    _target = getattr(torch.ops.infuse, _name).default
    inductor.register(_target, partial(lower, _target, _formula, _pairs))
