"""Lowering of infuse::rope: the decomposition, inlined, unless the CUDA kernel wins in the graph.

Also what the lowerings of all operators share that end in a rotation and have one result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import graph_neighbours, inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import rope as heuristics
from infuse.ops import library, rope_kernels
from infuse.ops import rope as op

FORMULA = "decomposition"
# The formula alone reads x and writes y.
FORMULA_PASSES = 2


def run_kernel(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    norm: tuple[float | None, float, bool],
    flags: tuple[bool, bool, bool, bool],
    is_backward: bool,
    kernel_config: int,
    out: Tensor,
) -> Tensor:
    """What generated code calls: the kernel, writing into `out`."""
    torch.ops.infuse.rope_out(x, None, cos, sin, weight, None, *norm, *flags, is_backward, kernel_config, out, None)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_CHOICE = inductor.kernel_choice(f"infuse_rope_{build.source_id()}", run_kernel)


def decline(x: Any, can_run: Callable[[], str]) -> str:
    """Why no kernel may run here, "" when one may. can_run: asked with the compilation's fake mode on."""
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(x.get_device()):
        return reason
    with inductor.fake_mode():
        return can_run()


def choose(
    target: torch._ops.OpOverload,
    formula: Callable[..., Tensor],
    args: Sequence[Any],
    tensors: Sequence[Any],
    keywords: Mapping[str, Any],
    declined: str,
) -> Any:
    """The IR node of the result: the kernel's, called with `tensors` and `keywords`, or the formula's.

    target: the operator, args: its arguments, x first.
    """
    kind, x = target._schema.name.partition("::")[2], args[0]
    rows, row_size = inductor.rows_and_row_size(x)
    has_norm, interleaved = keywords["norm"][0] is not None, keywords["flags"][0]
    capability = library.capability(x.get_device())
    problem = heuristics.Problem(rows, row_size, x.get_dtype().itemsize, interleaved, has_norm, capability)
    layout = inductor.output_layout(target, args)

    def kernel(config: int) -> inductor.Kernel:
        return inductor.Kernel(_CHOICE, {**keywords, "kernel_config": config})

    def take(label: str, why: str, timings: Any = None, costs: Any = None) -> Any:
        described = f"{rows}x{row_size} {x.get_dtype()}"
        record(Decision(kind, described, label, why, timings or {}, costs or {}, inductor.current_site()))
        if label == FORMULA:
            return inductor.inline(formula, *args)
        tables = tensors[1:3]
        # A table of cos and sin side by side is read as it is; it need not be taken apart.
        together = tables if inductor.lie_side_by_side(*tables) else ()
        return inductor.call_kernel(kernel(int(label.removeprefix("kernel_"))), tensors, layout, together)

    if declined:
        return take(FORMULA, declined)
    if inductor.settings_in_effect().kernels == "always":
        return take("kernel_-1", "kernels are always taken")
    lost = graph_neighbours.neighbours([x], inductor.current_node()).passes
    if not inductor.max_autotune():
        if lost == 0 and heuristics.runs_well(problem):
            return take("kernel_-1", "heuristic")
        return take(FORMULA, "heuristic" if lost == 0 else f"fusing with the neighbours saves {lost} passes")
    configs = heuristics.configurations(problem, len(library.configurations(rope_kernels.NAME)))
    kernels = {f"kernel_{config}": kernel(config) for config in configs}
    # Stand-ins are not views of one buffer, as tables that lie side by side are.
    apart = [inductor.stand_in(arg, contiguous=True) if any(arg is t for t in tensors[1:3]) else arg for arg in args]
    timings = inductor.measure(f"infuse_{kind}", kernels, {FORMULA: formula}, apart, layout)
    label, costs = profit.choose(timings, FORMULA, FORMULA_PASSES, lost)
    return take(label, f"measured; fusing with the neighbours saves {lost} passes", timings, costs)


def _lower(target: torch._ops.OpOverload, formula: Callable[..., Tensor], is_backward: bool) -> Callable[..., Any]:
    def lower(x: Any, cos: Any, sin: Any, *flags: bool) -> Any:
        """The IR node of y, or of dx."""
        flags = (*flags, *(False for _ in range(4 - len(flags))))
        keywords = {"norm": (None, 0.0, False), "flags": flags, "is_backward": is_backward}
        tensors = (x, cos, sin)
        declined = decline(x, lambda: rope_kernels.can_rotate(*(inductor.example(tensor) for tensor in tensors)))
        return choose(target, formula, (*tensors, *flags), tensors, keywords, declined)

    return lower


for _target, _formula, _is_backward in (
    (torch.ops.infuse.rope.default, op.rope_ref, False),
    (torch.ops.infuse.rope_bwd.default, op.rope_bwd_ref, True),
):
    inductor.register(_target, _lower(_target, _formula, _is_backward))
inductor.register_inline(torch.ops.infuse.rope_tables_bwd.default, op.rope_tables_bwd_ref)
