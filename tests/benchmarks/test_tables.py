"""The README's tables come from the results and from nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tables
from rows import Row, append, results_file

README = """# Title
<!-- results:norms -->
| an old table |
<!-- /results -->
Text between.
<!-- results:models -->
<!-- /results -->
The end.
"""


def row(
    impl: str, median_ms: float, case: str = "rms_norm 8x8", run_id: str = "run-1", gpu: str = "nvidia-h200"
) -> Row:
    return Row(
        run_id=run_id,
        case=case,
        impl=impl,
        median_ms=median_ms,
        p20_ms=median_ms,
        p80_ms=median_ms,
        bytes=1,
        flops=1,
        percent_of_limit=80.0,
        max_error=None,
        peak_bytes=None,
        gpu=gpu,
        torch="2.11.0",
        commit="0123456789ab",
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [
        row("eager", 4.0),
        row("compile", 1.0),
        row("infuse", 0.5),
        row("infuse-max-autotune", 0.8),
        row("infuse-kernel", 0.1),
        row("eager", 1.0, case="only stock"),
    ]
    append(results_file(tmp_path, "nvidia-h200", "norms"), rows)
    return tmp_path


def test_best_against_best_and_raw_kernels_left_out(results: Path) -> None:
    text = tables.update(README, results)
    assert "| `rms_norm 8x8` | compile | 1.00 ms | infuse | 500.0 us | 2.00x | 80% |" in text
    assert "infuse-kernel" not in text
    assert "only stock" not in text
    assert "`nvidia-h200`, torch 2.11.0, commit 0123456789ab" in text


def test_only_what_is_between_the_markers_changes(results: Path) -> None:
    text = tables.update(README, results)
    assert text.startswith("# Title\n<!-- results:norms -->\n")
    assert "an old table" not in text
    assert "<!-- /results -->\nText between.\n<!-- results:models -->\nNo results yet" in text
    assert text.endswith("<!-- /results -->\nThe end.\n")
    assert tables.update(text, results) == text


def test_newest_run_with_both_sides_counts(results: Path) -> None:
    newer = [row("compile", 1.0, run_id="run-2"), row("infuse", 1.25, run_id="run-2")]
    append(results_file(results, "nvidia-h200", "norms"), [*newer, row("infuse", 0.1, run_id="run-3")])
    assert "| infuse | 1.25 ms | 0.80x |" in tables.update(README, results)


def test_runs_with_max_autotune_count_before_newer_ones_without(results: Path) -> None:
    tuned = [
        row(impl, ms, run_id="run-2") for impl, ms in (("compile-max-autotune", 0.9), ("infuse-max-autotune", 0.3))
    ]
    newer = [row("compile", 1.0, run_id="run-3"), row("infuse", 0.7, run_id="run-3")]
    append(results_file(results, "nvidia-h200", "norms"), [*tuned, *newer])
    assert "| compile-max-autotune | 900.0 us | infuse-max-autotune | 300.0 us | 3.00x |" in tables.update(
        README, results
    )


def test_a_marker_names_a_device_and_cases(results: Path) -> None:
    for gpu in ("nvidia-h200", "nvidia-a10"):
        pairs = [row(impl, 2.0, f"{name} 8x8", gpu=gpu) for name in ("relu", "gelu") for impl in ("eager", "infuse")]
        append(results_file(results, gpu, "norms"), pairs)
    text = tables.update(README.replace("results:norms", "results:norms nvidia-h200 (?!rms|gelu)"), results)
    assert "`nvidia-h200`" in text and "`nvidia-a10`" not in text
    assert "relu 8x8" in text and "gelu 8x8" not in text and "rms_norm 8x8" not in text
    assert tables.update(text, results) == text


def test_each_device_has_a_table(results: Path) -> None:
    rows = [dataclasses.replace(row(impl, 2.0), gpu="nvidia-a10") for impl in ("eager", "infuse")]
    append(results_file(results, "nvidia-a10", "norms"), rows)
    text = tables.update(README, results)
    assert text.index("`nvidia-a10`") < text.index("`nvidia-h200`")


def test_check_fails_until_the_readme_is_brought_up_to_date(results: Path) -> None:
    readme = results / "README.md"
    readme.write_text(README)
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0


def test_tables_about_memory_show_it(tmp_path: Path) -> None:
    peaks = {"compile": 3 << 30, "infuse": 1 << 30}
    rows = [dataclasses.replace(row(impl, 2.0, "step"), peak_bytes=peak) for impl, peak in peaks.items()]
    append(results_file(tmp_path, "nvidia-h200", "linear_cross_entropy"), rows)
    append(results_file(tmp_path, "nvidia-h200", "norms"), rows)
    assert "GiB" not in tables.tables("norms", tmp_path)
    lines = tables.tables("linear_cross_entropy", tmp_path).splitlines()
    assert [lines[2].count("|"), lines[3].count("|"), lines[4].count("|")] == [10, 10, 10]
    assert lines[4].endswith("| 3.00 GiB | 1.00 GiB |")


def test_what_was_measured_beside_the_time_has_columns(tmp_path: Path) -> None:
    beside = {"compile": (3 << 30, 40.0), "infuse": (1 << 30, 20.0)}
    rows = [
        dataclasses.replace(row(impl, 2.0, "step"), saved_bytes=saved, compile_s=compiled)
        for impl, (saved, compiled) in beside.items()
    ]
    rows += [row(impl, 2.0, "old llama-8b 2 layers") for impl in beside]
    append(results_file(tmp_path, "nvidia-h200", "models"), [*rows, *(row(impl, 1.0, "plain") for impl in beside)])
    lines = tables.tables("models", tmp_path).splitlines()
    assert lines[2].endswith("| saved for the backward without | with | compiled in without | with |")
    assert lines[4].endswith("| 3.00 GiB | 1.00 GiB | 40.0 s | 20.0 s |")
    assert lines[5].startswith("| `plain` |") and lines[5].endswith("|  |  |  |  |")
    assert len(lines) == 6


def test_models_are_told_against_eager_code_of_the_same_run(tmp_path: Path) -> None:
    sizes = {"eager": (6.0, 4 << 30), "compile": (3.0, 2 << 30), "infuse": (2.0, 1 << 30)}
    rows = [dataclasses.replace(row(impl, ms, "step"), peak_bytes=peak) for impl, (ms, peak) in sizes.items()]
    rows += [row(impl, ms, "slow compile") for impl, ms in (("eager", 2.0), ("compile", 3.0), ("infuse", 1.0))]
    rows += [row(impl, 2.0, "other run", run_id="run-2") for impl in ("compile", "infuse")]
    append(results_file(tmp_path, "nvidia-h200", "models"), [*rows, row("eager", 1.0, "other run", run_id="run-1")])
    lines = tables.tables("models", tmp_path, cases="step|slow").splitlines()
    assert lines[2].endswith("| memory without | with | eager | ratio to it | of its memory |")
    assert lines[4].endswith("| 2.00 GiB | 1.00 GiB | 6.00 ms | 3.00x | 25% |")
    assert lines[5].startswith("| `slow compile` | eager ") and lines[5].endswith("|  |  | 2.00 ms | 2.00x |  |")
    assert len({text.count("|") for text in lines[2:]}) == 1
    everything = tables.tables("models", tmp_path).splitlines()
    assert everything[2].endswith("| memory without | with |") and "`other run`" in everything[6]
