"""The harness keeps its promises: honest statistics, checked answers, nothing above the roofline, append-only data."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coverage_rows
import norms
import pytest
import torch
from command import main
from device import Ceilings, describe_device
from harness import AboveRoofline, Case, CaseFailed, Impl, Options, Row, Session, Unavailable, WrongAnswer, load
from implementations import compiled, fresh
from rows import CACHE_RESIDENT, append, results_file, slug
from timing import Calls, Sampler, Timed, paired_ratio, percentile, summarise
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DEVICE = describe_device("cpu")
VALID = Row(
    run_id="20240229T000000Z-abcdef",
    case="add 8x8",
    impl="eager",
    median_ms=1.0,
    p20_ms=0.9,
    p80_ms=1.2,
    bytes=1024,
    flops=64,
    percent_of_limit=50.0,
    max_error=1e-6,
    peak_bytes=None,
    gpu="nvidia-h200",
    torch="2.11.0",
    commit="0123456789ab",
)


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def one_element_wrong(x: Tensor) -> Tensor:
    y = x + 1
    y.view(-1)[-1] += 0.01
    return y


def one_element_unwritten(x: Tensor) -> Tensor:
    y = torch.full_like(x, float("nan"))
    y.view(-1)[1:] = x.view(-1)[1:] + 1
    return y


class WrongAfter:
    """Right for the first `calls` calls, wrong from then on: only a check of the timed run can tell."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, x: Tensor) -> Tensor:
        self.calls -= 1
        return x + 1 if self.calls >= 0 else x


def implementation(name: str, function: Callable[..., Any]) -> Impl:
    return Impl(name, lambda: function)


def plus_one_case(impls: Sequence[Impl], **changes: Any) -> Case:
    case = Case(
        name="plus one 64x64",
        inputs=lambda g: (torch.randn(64, 64, generator=g),),
        eager=plus_one,
        reference=plus_one,
        impls=impls,
        bytes=2 * 64 * 64 * 4,
        flops=64 * 64,
        dtype=torch.float32,
    )
    return dataclasses.replace(case, **changes)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """With invented ceilings, so that no test depends on the machine's."""
    monkeypatch.setattr(Ceilings, "__post_init__", lambda self: setattr(self, "bandwidth", 1e12))
    monkeypatch.setattr(Ceilings, "rate", lambda self, dtype: 1e13)
    monkeypatch.setattr(Ceilings, "again", lambda self: None)
    return Session("plus_one", Options(output=tmp_path, quick=True), DEVICE)


def recorded(session: Session) -> list[Row]:
    assert session.path is not None
    return load(session.path) if session.path.exists() else []


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert percentile([7.0], 0.8) == 7.0


def test_summary_keeps_the_order_of_the_rounds() -> None:
    stats = summarise([3.0, 1.0, 2.0])
    assert (stats.median_ms, stats.samples) == (2.0, (3.0, 1.0, 2.0))
    assert stats.p20_ms == pytest.approx(1.4)
    assert stats.p80_ms == pytest.approx(2.6)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_paired_ratio_cancels_a_drift_that_hits_both() -> None:
    drift = [1.0, 2.0, 4.0, 8.0]
    ratio = paired_ratio([1.1 * d for d in drift], drift)
    assert ratio.p20_ms == pytest.approx(1.1)
    assert ratio.p80_ms == pytest.approx(1.1)


def test_rounds_interleave_in_changing_order() -> None:
    events: list[str] = []

    class Noted(Timed):
        def run(self) -> None:
            events.append(self.name)

        def poison(self) -> None:
            events.append("poison")

        def keep(self) -> None:
            events.append("keep")

    contestants = [Noted(name, 1) for name in "abc"]
    stats = Sampler(DEVICE, lambda: events.append("reset")).rounds(contestants, 8)
    assert {name: len(result.samples) for name, result in stats.items()} == {"a": 8, "b": 8, "c": 8}
    runs = [event for event in events if event in "abc"]
    rounds = ["".join(runs[start : start + 3]) for start in range(0, 24, 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    # Reset before each sample; in the last round poisoned before it and kept after it.
    assert events[:-12] == [event for run in runs[:-3] for event in ("reset", run)]
    assert events[-12:] == [event for run in runs[-3:] for event in ("reset", "poison", run, "keep")]


def test_calls_go_over_all_input_sets() -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(int(x))
        return x

    timed = Calls("a", note, [(torch.tensor(number),) for number in range(3)], calls=4)
    timed.run()
    assert seen == [0, 1, 2, 0]
    assert [index for index, _ in timed.last] == [0]


def test_right_answers_are_recorded_with_one_run_id(session: Session) -> None:
    impls = [implementation("eager", plus_one), implementation("other", lambda x: 1 + x)]
    rows = session.measure(plus_one_case(impls))
    rows += session.measure(plus_one_case(impls, name="plus one again"))
    assert recorded(session) == rows
    assert [row.impl for row in rows] == ["eager", "other"] * 2
    assert {row.run_id for row in rows} == {session.run_id}
    assert all(row.max_error is not None and row.max_error < 1e-6 for row in rows)
    assert Session("plus_one", session.options, DEVICE).run_id != session.run_id


@pytest.mark.parametrize("wrong", [one_element_wrong, one_element_unwritten, lambda x: x[:-1] + 1, WrongAfter(8)])
def test_wrong_answer_raises_and_is_not_recorded(session: Session, wrong: Callable[..., Any]) -> None:
    with pytest.raises(CaseFailed, match="wrong: WrongAnswer") as failed:
        session.measure(plus_one_case([implementation("wrong", wrong), implementation("eager", plus_one)]))
    assert isinstance(failed.value.failures["wrong"], WrongAnswer)
    assert [row.impl for row in recorded(session)] == ["eager"]


def test_only_wrong_answers_leave_no_file(session: Session) -> None:
    with pytest.raises(CaseFailed):
        session.measure(plus_one_case([implementation("wrong", one_element_wrong)]))
    assert session.path is not None
    assert not session.path.exists()


def test_faster_than_the_roofline_raises_and_is_not_recorded(session: Session) -> None:
    impossible = plus_one_case([implementation("eager", plus_one)], bytes=10**12)
    with pytest.raises(CaseFailed) as failed:
        session.measure(impossible)
    assert isinstance(failed.value.failures["eager"], AboveRoofline)
    assert recorded(session) == []


def test_ceiling_that_was_measured_too_low_is_measured_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ceilings, "again", lambda self: setattr(self, "bandwidth", 1e20))
    (row,) = session.measure(plus_one_case([implementation("eager", plus_one)], bytes=10**12))
    assert row.percent_of_limit is not None
    assert 0 < row.percent_of_limit < 105


def test_declared_cache_resident_case_may_exceed_the_memorys_roofline(session: Session) -> None:
    case = plus_one_case([implementation("eager", plus_one)], bytes=10**12, cache_resident=True)
    (row,) = session.measure(case)
    assert row.percent_of_limit is not None
    assert row.percent_of_limit > 105
    assert CACHE_RESIDENT in row.note


def test_crash_of_one_implementation_keeps_the_others(session: Session) -> None:
    def crash(x: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(CaseFailed, match="crash: ZeroDivisionError: on purpose"):
        session.measure(plus_one_case([implementation("crash", crash), implementation("eager", plus_one)]))
    assert [row.impl for row in recorded(session)] == ["eager"]


def test_unavailable_implementation_is_left_out(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    def prepare() -> Callable[..., Any]:
        raise Unavailable("no such library")

    rows = session.measure(plus_one_case([Impl("library", prepare), implementation("eager", plus_one)]))
    assert [row.impl for row in rows] == ["eager"]
    assert "library: left out: no such library" in capsys.readouterr().out


def test_infuse_row_tells_its_paired_ratio_to_stock(session: Session) -> None:
    rows = session.measure(plus_one_case([implementation("compile-x", plus_one), implementation("infuse-x", plus_one)]))
    assert "of compile-x's time, paired" in rows[1].note
    assert rows[0].note == CACHE_RESIDENT


def test_implementations_of_one_function_are_compiled_apart() -> None:
    seen = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append([tuple(x.shape) for x in example_inputs])
        return gm.forward

    first, second = (torch.compile(fresh(plus_one, name), backend=backend, dynamic=False) for name in ("a", "b"))
    for size in (3, 4):
        for function in (first, second):
            function(torch.ones(size))
    assert seen == [[(3,)], [(3,)], [(4,)], [(4,)]]


def test_recompilation_during_timing_is_a_failure(session: Session) -> None:
    sizes = iter([64, 32])
    case = plus_one_case(
        [compiled(plus_one, "compile", backend="eager")], inputs=lambda g: (torch.randn(next(sizes), 8),), sets=2
    )
    with pytest.raises(CaseFailed, match=r"[Rr]ecompil"):
        session.measure(case)


def test_rows_survive_the_way_through_a_file(tmp_path: Path) -> None:
    path = results_file(tmp_path, VALID.gpu, "add")
    rows = [VALID, dataclasses.replace(VALID, impl="other", note="a note")]
    append(path, rows)
    assert path == tmp_path / "nvidia-h200" / "add.jsonl"
    assert load(path) == rows
    assert set(json.loads(path.read_text().splitlines()[0])) == {
        *("run_id", "case", "impl", "median_ms", "p20_ms", "p80_ms", "bytes", "flops"),
        *("percent_of_limit", "max_error", "peak_bytes", "gpu", "torch", "commit"),
    }


def test_appending_leaves_what_is_there_untouched(tmp_path: Path) -> None:
    path = tmp_path / "add.jsonl"
    path.write_text("not even json\n")
    append(path, [VALID])
    assert path.read_text() == "not even json\n" + VALID.to_json() + "\n"
    append(path, [])
    with pytest.raises(ValueError, match=r"add\.jsonl:1"):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"median_ms": 0.5},
        {"p20_ms": 0.0},
        {"p80_ms": float("nan")},
        {"median_ms": "1.0"},
        {"bytes": 1.5},
        {"bytes": True},
        {"flops": -1},
        {"max_error": float("inf")},
        {"percent_of_limit": 105.1},
        {"percent_of_limit": 0.0},
        {"run_id": ""},
        {"commit": None},
        {"gpu": "NVIDIA H200"},
    ],
)
def test_row_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="Row"):
        dataclasses.replace(VALID, **changes)


def test_unknown_and_missing_fields_are_refused() -> None:
    values = json.loads(VALID.to_json())
    with pytest.raises(ValueError, match=r"unknown fields \['speedup'\]"):
        Row.from_json(json.dumps({**values, "speedup": 2}))
    del values["max_error"]
    with pytest.raises(ValueError, match=r"missing fields \['max_error'\]"):
        Row.from_json(json.dumps(values))


def test_device_names_become_folders() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD EPYC(TM) 9654 96-Core") == "amd-epyc-tm-9654-96-core"


def test_committed_results_are_valid() -> None:
    for path in (BENCHMARKS / "results").glob("*/*.jsonl"):
        rows = coverage_rows.load(path) if path.name.startswith("coverage") else load(path)
        assert {row.gpu for row in rows} <= {path.parent.name}, path


def test_quick_run_of_the_norms_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    chosen = ["--impl", "^(eager|compile)$", "--cases", "^residual chain 64x256$"]
    assert main("norms", "", norms.cases, [*arguments, *chosen]) == 0
    rows = load(tmp_path / DEVICE.name / "norms.jsonl")
    measured = [(row.case, row.impl) for row in rows if not row.case.startswith("ceiling")]
    assert measured == [("residual chain 64x256", "eager"), ("residual chain 64x256", "compile")]
    assert {row.case for row in rows if row.case.startswith("ceiling")} >= {"ceiling copy", "ceiling read"}
    assert len({row.run_id for row in rows}) == 1
    assert DEVICE.name in capsys.readouterr().out.splitlines()[0]


def test_benchmark_runs_as_a_script_from_the_root() -> None:
    listing = subprocess.run(
        [sys.executable, "benchmarks/norms.py", "--list", "--quick", "--impl", "^infuse$"],
        cwd=BENCHMARKS.parent,
        text=True,
        capture_output=True,
        check=True,
    )
    assert "rms_norm 64x256: infuse" in listing.stdout.splitlines()
