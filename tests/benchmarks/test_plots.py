"""The figure of the whole models comes from the rows, and is drawn anew when these change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import plots
import pytest
from rows import append, results_file

from tests.benchmarks.test_tables import row

CASES = ("torchtune llama decode, batch 1, cache 64", "torchtune llama prefill 64", "torchtune llama train 64")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [row(impl, ms, case) for case in CASES for impl, ms in (("compile", 3.0), ("infuse", 2.0))]
    rows += [row(impl, 1.0, "mahia gate train") for impl in ("compile", "infuse")]
    append(results_file(tmp_path, plots.DEVICE, "models"), rows)
    return tmp_path


def test_cases_are_grouped_by_what_they_do(results: Path) -> None:
    groups = plots.pairs(results)
    assert {kind: [stock.case for stock, _ in pairs] for kind, pairs in groups.items()} == {
        "decode": [CASES[0]],
        "prefill": [CASES[1]],
        "train": [CASES[2]],
    }
    assert [plots.label(case, kind) for case, kind in zip(CASES, plots.TITLES)] == [
        "torchtune llama\nbatch 1, cache 64",
        "torchtune llama\n64 tokens",
        "torchtune llama\n64 tokens",
    ]


def test_figure_is_drawn_when_it_is_out_of_date(results: Path) -> None:
    pytest.importorskip("matplotlib")
    path = results / "models.png"
    assert plots.update(results, change=False) == [path] and not path.exists()
    assert plots.update(results, change=True) == [path]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.update(results, change=True) == []
    times = {"compile": 3.0, "infuse": 1.0}
    newer = [dataclasses.replace(row(impl, ms, CASES[0]), run_id="run-2") for impl, ms in times.items()]
    append(results_file(results, plots.DEVICE, "models"), newer)
    assert plots.update(results, change=False) == [path]


def test_without_results_there_is_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.update(tmp_path, change=True) == []
    assert plots.main(["--results", str(tmp_path), "--output", str(tmp_path / "x.png")]) == 1
    assert "no results of models" in capsys.readouterr().out
