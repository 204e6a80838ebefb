"""Lowering of infuse::rope_pair: one kernel for q and k where it wins in the graph, else both formulas, inlined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import graph_neighbours, inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import rope as heuristics
from infuse.lowering.rope import FORMULA, decline
from infuse.ops import library, rope_kernels
from infuse.ops import rope_pair as op

# The formula alone reads q and k and writes both.
FORMULA_PASSES = 4
_TENSORS = 6  # of the operator's arguments, the first ones


def _run(*tensors: Tensor, has_weights: bool, numbers: tuple[Any, ...], out: Tensor) -> Tensor:
    """What a measurement calls: the kernel; it allocates its results itself."""
    weights = () if has_weights else (None, None)
    torch.ops.infuse.rope_pair(*tensors, *weights, *numbers)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_CHOICE = inductor.kernel_choice(f"infuse_rope_pair_{build.source_id()}", _run)


def _measure(args: tuple[Any, ...], problem: heuristics.Problem) -> dict[str, float]:
    """Milliseconds of both formulas and of every configuration."""
    *numbers, _ = args[_TENSORS:]
    keywords = {"has_weights": args[4] is not None}
    kernels = {
        f"kernel_{config}": inductor.Kernel(_CHOICE, {**keywords, "numbers": (*numbers, config)})
        for config in heuristics.configurations(problem, len(library.configurations(rope_kernels.NAME)))
    }
    # Stand-ins are not views of one buffer, as tables that lie side by side are.
    apart = [inductor.stand_in(arg, contiguous=True) if index in (2, 3) else arg for index, arg in enumerate(args)]
    layout = inductor.output_layout(torch.empty_like, (args[0],))
    return inductor.measure("infuse_rope_pair", kernels, {FORMULA: op.rope_pair_ref}, apart, layout)


def lower(*args: Any) -> Any:
    """The IR nodes of both results."""
    tensors, (eps, _, _, interleaved, *_) = args[:_TENSORS], args[_TENSORS:]
    x, other, cos, sin = tensors[:4]
    (rows, row_size), (other_rows, _) = (inductor.rows_and_row_size(tensor) for tensor in (x, other))
    problem = heuristics.Problem(
        *(rows + other_rows, row_size, x.get_dtype().itemsize, interleaved, eps is not None),
        library.capability(x.get_device()),
    )
    described = f"{rows}+{other_rows}x{row_size} {x.get_dtype()}"

    def take(label: str, why: str, timings: Any = None, costs: Any = None) -> Any:
        for site in inductor.current_sites():
            record(Decision("rope_pair", described, label, why, timings or {}, costs or {}, site))
        if label == FORMULA:
            return inductor.inline(op.rope_pair_ref, *args)
        target, numbers = torch.ops.infuse.rope_pair.default, args[_TENSORS:-1]
        # A table of cos and sin side by side is read as it is; it need not be taken apart.
        together = (cos, sin) if inductor.lie_side_by_side(cos, sin) else ()
        config = int(label.removeprefix("kernel_"))
        return inductor.call_operator(target, *tensors, *numbers, config, as_they_lie=together)

    def can_run() -> str:
        examples: list[Any] = [inductor.example(arg) if inductor.is_tensor(arg) else arg for arg in args]
        return op.can_run(*examples)

    if declined := decline(x, can_run):
        return take(FORMULA, declined)
    if inductor.settings_in_effect().kernels == "always":
        return take("kernel_-1", "kernels are always taken")
    lost = graph_neighbours.neighbours([x, other], inductor.current_node(), 2).passes
    if not inductor.max_autotune():
        if lost == 0 and heuristics.pair_runs_well(problem):
            return take("kernel_-1", "heuristic")
        return take(FORMULA, "heuristic" if lost == 0 else f"fusing with the neighbours saves {lost} passes")
    timings = _measure(args, problem)
    label, costs = profit.choose(timings, FORMULA, FORMULA_PASSES, lost)
    return take(label, f"measured; fusing with the neighbours saves {lost} passes", timings, costs)


inductor.register(torch.ops.infuse.rope_pair.default, lower)
