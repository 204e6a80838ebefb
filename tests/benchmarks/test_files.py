"""Each file in benchmarks/ imports, and each program among them lists its cases or explains itself without a GPU."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
PROGRAMS = [name for name in FILES if "__main__" in (BENCHMARKS / f"{name}.py").read_text()]
# make bench runs those that share the benchmarks' command line.
MEASURING = [name for name in PROGRAMS if "from command import" in (BENCHMARKS / f"{name}.py").read_text()]


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a file as a program in this process; its exit status."""
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", FILES)
def test_file_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--help", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")


@pytest.mark.parametrize("quick", [(), ("--quick",)], ids=["full", "quick"])
@pytest.mark.parametrize("name", MEASURING)
def test_benchmark_lists_its_cases(
    name: str, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--list", "--device", "cpu", *quick, monkeypatch=monkeypatch) == 0
    cases = capsys.readouterr().out.splitlines()
    assert cases and all(implementations for _, _, implementations in (line.partition(": ") for line in cases))
