"""Every norm with a kernel: the formula where nothing else may run, the kernel where it is chosen, both right."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import infuse
from infuse.lowering import decisions, profit
from infuse.lowering.heuristics import H200
from infuse.lowering.heuristics import norm as heuristics
from infuse.lowering.policy import NORMS, place
from infuse.ops.add_rms_norm import add_rms_norm_ref
from infuse.settings import Settings

OPS = torch.ops.infuse


def rms(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (OPS.rms_norm(x, None, 1e-6, 0.0, False, True), OPS.rms_norm(x, weight, 1e-6, 1.0))


def layer(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (OPS.layer_norm(x, weight, bias, 1e-5), OPS.layer_norm(x, None, bias, 1e-5, 0.0, True))


def add_rms(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (*OPS.add_rms_norm(x, other, weight, 1e-6, 0.0, True), *OPS.add_rms_norm(other, x, None, 1e-6))


def add_layer(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (*OPS.add_layer_norm(x, other, weight, bias, 1e-6), *OPS.add_layer_norm(other, x, weight, None, 1e-6))


def gated(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (
        OPS.gated_rms_norm(x, other, weight, 1e-6, True, "sigmoid", 2, True, True),
        OPS.gated_rms_norm(x, other, None, 1e-6, False),
    )


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rms_norm": rms,
    "layer_norm": layer,
    "add_rms_norm": add_rms,
    "add_layer_norm": add_layer,
    "gated_rms_norm": gated,
}


def run(function: Callable[..., Any], dtype: torch.dtype = torch.float32, **options: Any) -> str:
    """Compiles and runs, compares with eager; the last code generated."""
    args = [torch.randn(shape).to(dtype) for shape in ((8, 64), (8, 64), (64,), (64,))]
    with torch.no_grad():
        out, codes = run_and_get_code(torch.compile(function, backend="infuse", **options), *args)
        torch.testing.assert_close(out, function(*args), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
        assert [t.stride() for t in out] == [t.stride() for t in function(*args)]
    return str(codes[-1])


def test_the_functions_cover_the_policy() -> None:
    assert set(FUNCTIONS) == set(NORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_kernels_always_takes_the_kernel(cpu_kernel: list[int], kind: str, dtype: torch.dtype) -> None:
    with infuse.override(kernels="always"):
        code = run(FUNCTIONS[kind], dtype)
    assert (cpu_kernel[:2] == [-1, -1] and f"infuse_{kind}" in code) or f"{kind}_kernel" in code
    assert [decision.chosen for decision in decisions.decisions()] == ["kernel_-1"] * 2


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_symbolic_shapes_take_the_kernel_too(cpu_kernel: list[int], kind: str) -> None:
    with infuse.override(kernels="always"):
        run(FUNCTIONS[kind], dynamic=True)
    assert cpu_kernel[:2] == [-1, -1]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_formula_is_inlined_elsewhere(cpu_kernel: list[int], kind: str) -> None:
    with infuse.override(kernels="never"):
        code = run(FUNCTIONS[kind])
    assert "infuse" not in code
    assert {decision.chosen for decision in decisions.decisions()} == {"decomposition"}


@pytest.mark.parametrize("winner", ["kernel_1", "decomposition"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_candidate_is_timed_and_the_winner_taken(
    cpu_kernel: list[int], monkeypatch: pytest.MonkeyPatch, kind: str, winner: str
) -> None:
    timed: list[str] = []

    def choose(timings: dict[str, float], formula: str, passes: int, lost: int) -> tuple[str, dict[str, float]]:
        timed.extend(timings)
        assert passes == {"rms_norm": 2, "layer_norm": 2, "gated_rms_norm": 3}.get(kind, 4)
        return winner, {}

    monkeypatch.setattr(profit, "choose", choose)
    code = run(FUNCTIONS[kind], mode="max-autotune-no-cudagraphs")
    assert sorted(timed) == sorted(["decomposition", "kernel_-1", "kernel_0", "kernel_1"] * 2)
    assert ("infuse" in code) == (winner == "kernel_1")
    assert "infuse_stand_in" not in code


def test_what_is_computed_before_and_behind_an_add_norm_stays_right(cpu_kernel: list[int]) -> None:
    """Inputs that are views or not in memory yet, results that are read at once."""

    def function(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, total = OPS.add_layer_norm((x * 2).t().contiguous().t(), other.relu(), weight, bias, 1e-5)
        return torch.relu(y) + 1, total * y

    with infuse.override(kernels="always"):
        run(function)
    assert cpu_kernel == [-1]


def test_a_sum_that_is_returned_is_read_where_it_was_written(
    cpu_kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the norm behind it, as if the formula stood in the graph, and not computed again from what it was made of."""
    monkeypatch.setattr(profit, "choose", lambda timings, formula, passes, lost: (formula, {}))

    def chain(add_norm: Callable[..., Any], x: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = add_norm(x, other, weight, 1e-6)
        return tuple(add_norm(torch.relu(y), total, weight, 1e-6))

    def loads(add_norm: Callable[..., Any], backend: str) -> int:
        torch._dynamo.reset()
        args = torch.randn(8, 64), torch.randn(8, 64), torch.randn(64)
        function = torch.compile(functools.partial(chain, add_norm), backend=backend, mode="max-autotune-no-cudagraphs")
        with torch.no_grad():
            out, codes = run_and_get_code(function, *args)
            torch.testing.assert_close(out, chain(add_norm, *args))
        return str(codes[-1]).count("::loadu(")

    assert loads(OPS.add_rms_norm, "infuse") == loads(add_rms_norm_ref, "inductor")


def problem_of(case: str) -> heuristics.Problem | None:
    """The heuristic's view of a case of benchmarks/norms.py, None if it is about something else."""
    name, _, shape = case.rpartition(" ")
    kind = {"gate, rms_norm": "gated_rms_norm", "rms_norm, gate": "gated_rms_norm"}.get(name, name.replace(" + ", "_"))
    if name == "q/k norm":
        return heuristics.Problem("rms_norm", 8192 * 40, 128, 2, H200, scattered=True)
    if kind not in NORMS:
        return None
    *rows, row_size = map(int, shape.split("x"))
    return heuristics.Problem(kind, math.prod(rows), row_size, 2, H200, captured=True)


def test_the_heuristic_claims_no_more_than_was_measured() -> None:
    """By the newest stored rows of each case."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "nvidia-h200" / "norms.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    times = {(row["case"], row["impl"]): row["median_ms"] for row in rows}
    claims = {}
    for case in {case for case, impl in times if impl == "infuse-kernel"}:
        if (problem := problem_of(case)) is not None:
            claims[case] = heuristics.factor(problem)
            assert claims[case] == 1 or claims[case] <= times[case, "compile"] / times[case, "infuse-kernel"], case
    assert len([claim for claim in claims.values() if claim > 1]) > 5


def test_the_heuristic_claims_nothing_where_nobody_has_looked() -> None:
    known = heuristics.Problem("layer_norm", 16384, 4096, 2, H200)
    assert heuristics.factor(known) > 1
    for unknown in ({"capability": (8, 6)}, {"itemsize": 4}, {"rows": 100}, {"row_size": 512}):
        assert heuristics.factor(dataclasses.replace(known, **unknown)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True])
def test_the_heuristic_leaves_what_could_fuse_to_inductor(
    cpu_kernel: list[int], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    monkeypatch.setattr(heuristics, "factor", lambda problem: 1.3)

    def function(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (OPS.layer_norm(torch.relu(x) if fused else x, weight, bias, 1e-5),)

    run(function)
    assert cpu_kernel == ([] if fused else [-1])


def test_no_kernel_for_what_it_can_not_take(cpu_kernel: list[int]) -> None:
    x, w = torch.empty(8, 64), torch.empty(64)

    def kernel(kind: str, *args: object) -> str:
        return place(kind, args, False, settings=Settings(), max_autotune=True).kernel

    assert "measured" in kernel("layer_norm", x, w, w, 1e-5)
    assert "weight in torch.float32 and a bias in torch.bfloat16" in kernel(
        "layer_norm", x.bfloat16(), w, w.bfloat16(), 1e-5
    )
    assert "beside" in kernel("gated_rms_norm", x.bfloat16(), x, w, 1e-5, True)
    assert "dimensions and 4 groups" in kernel("gated_rms_norm", *[x.view(1, 2, 4, 64)] * 2, w, 1e-5, True, "silu", 4)
    assert "stride" in kernel("add_rms_norm", x, torch.empty(64, 8).t(), w, 1e-5)


def test_heads_of_a_packed_projection_are_read_where_they_lie(cpu_kernel: list[int]) -> None:
    def function(x: Tensor, projection: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        packed = (x @ projection).view(4, 2, 8, 16)
        q, k = packed[:, :, :4], packed.transpose(1, 2)[:, 4:6]
        return OPS.rms_norm(q, weight, 1e-6).transpose(1, 2), OPS.layer_norm(k, weight, None, 1e-5)

    args = torch.randn(8, 32), torch.randn(32, 128), torch.randn(16)
    with infuse.override(kernels="always"), torch.no_grad():
        out, codes = run_and_get_code(torch.compile(function, backend="infuse"), *args)
        torch.testing.assert_close(out, function(*args))
    assert cpu_kernel == [-1, -1]
    assert "cpp_fused" not in codes[-1].partition("def call")[2]
