"""Whether a kernel pays among its neighbours."""

from __future__ import annotations

from infuse.lowering import profit

FORMULA = "decomposition"


def chosen(kernel_ms: float, lost_passes: int) -> str:
    return profit.choose({FORMULA: 1.0, "kernel": kernel_ms}, FORMULA, 2, lost_passes)[0]


def test_alone_the_faster_one_wins_by_a_margin() -> None:
    assert chosen(0.9, 0) == "kernel"
    assert chosen(0.99, 0) == FORMULA
    assert chosen(1.1, 0) == FORMULA


def test_a_pass_that_the_neighbours_save_costs_the_kernel_half_the_formula() -> None:
    assert profit.cost_in_context(0.9, 1.0, 2, 1) == 1.4
    assert chosen(0.4, 1) == "kernel"
    assert chosen(0.6, 1) == FORMULA
    assert chosen(0.1, 2) == FORMULA


def test_without_a_time_for_the_formula_the_formula_is_taken() -> None:
    assert profit.choose({"kernel": 0.1}, FORMULA, 2, 0) == (FORMULA, {})


def test_the_best_of_several_kernels_wins() -> None:
    timings = {FORMULA: 1.0, "one": 0.8, "two": 0.7}
    assert profit.choose(timings, FORMULA, 2, 0)[0] == "two"
