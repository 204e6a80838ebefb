"""Random compositions of right and wrong steps: whatever is rewritten has to give the source's results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.patterns.capture import composite_overload, default_overload, inline_overload
from tests.patterns.random_programs import attention, blocks, gates, norms, rotations
from tests.patterns.random_programs.tracing import Case, Choices, check, rewritten

PROGRAMS = 160
FAMILIES = {
    "attention": attention.calls,
    "sdpa": attention.sdpa,
    "rms_norm": norms.rms_norms,
    "layer_norm": norms.layer_norms,
    "norm calls": norms.norm_calls,
    "gated MLP": gates.gates,
    "rope": rotations.rotations,
    "blocks": blocks.blocks,
}
# As if there were kernels for everything; half as many programs, which are larger than the others.
LARGER = ("blocks",)
# torch's own attention is right however it is called, and a wrong gate or rotation is mostly another right one.
MOSTLY_RIGHT = ("sdpa", "gated MLP", "rope", "norm calls", "blocks")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rewritten_programs_give_the_sources_results(name: str, dtype: torch.dtype, training: bool) -> None:
    make: Callable[[Choices, torch.dtype], Case] = FAMILIES[name]
    outcomes: Counter[str] = Counter()
    programs = PROGRAMS // 2 if name in LARGER else PROGRAMS
    places = (composite_overload,) if name in LARGER else (inline_overload, default_overload)

    @settings(
        max_examples=programs, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        choose = Choices(data.draw)
        captured = rewritten(make(choose, dtype), training, choose(*places))
        if captured.counts:
            check(captured, training)
        outcomes["rewritten" if captured.counts else "left"] += 1

    run()
    assert outcomes["rewritten"] >= programs // 10, dict(outcomes)
    assert outcomes["left"] >= programs // 40 or name in MOSTLY_RIGHT, dict(outcomes)
