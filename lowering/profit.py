"""Whether a kernel pays in the graph, with its neighbours, not alone."""

from __future__ import annotations

from collections.abc import Mapping

# A kernel that is not at least this much faster stays out: measurements repeat to about 2%.
MARGIN = 0.97


def cost_in_context(kernel_ms: float, formula_ms: float, formula_passes: float, lost_passes: int) -> float:
    """Milliseconds of a kernel and of what its neighbours can no longer fuse.

    formula_ms: time of the formula alone, which moves `formula_passes` tensors; so one pass over a tensor of that size
        costs formula_ms / formula_passes on this device, launch included.
    lost_passes: passes that the formula would save by fusing with its neighbours.
    """
    return kernel_ms + lost_passes * formula_ms / formula_passes


def choose(
    timings: Mapping[str, float], formula: str, formula_passes: float, lost_passes: int
) -> tuple[str, dict[str, float]]:
    """The candidate to take and every candidate's cost in context; the formula unless a kernel wins by the margin."""
    if formula not in timings:
        return formula, {}
    formula_ms = timings[formula]
    costs = {
        label: ms if label == formula else cost_in_context(ms, formula_ms, formula_passes, lost_passes)
        for label, ms in timings.items()
    }
    best = min(costs, key=costs.__getitem__)
    return (best if costs[best] < MARGIN * formula_ms else formula), costs
