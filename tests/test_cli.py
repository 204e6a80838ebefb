"""The command line: mistakes are one line and exit code 2, explain and doctor say what is so."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from infuse.cli import COMMANDS, bench, main
from infuse.cli.doctor import why_inductor_cannot_compile

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
    def forward(self, x):
        return F.rms_norm(x, (8,), self.weight, 1e-6)

def norm():
    return Norm(), (torch.ones(2, 8),)

def function():
    return F.relu, [torch.ones(2)]

def alone():
    return Norm()

def fails():
    raise KeyError("weights")

def misfit():
    return Norm(), (torch.ones(2, 7),)

number = 3
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake prints."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("infuse: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "command: got none, expected one of demo, generate, explain, lock, doctor, build, bench"),
        (["tune"], "command: got tune, expected one of"),
        (["--verbose"], "--verbose"),
        (["demo", "--steps", "0"], "--steps: got '0', expected a positive integer"),
        (["demo", "--steps", "many"], "--steps: got 'many', expected a positive integer"),
        (["demo", "--seed", "-1"], "--seed: "),
        (["demo", "--device", "tpu"], "--device: "),
        (["demo", "--device"], "see `infuse demo --help`"),
        (["doctor", "now"], "now"),
        (["bench", "nothing"], "bench: got "),
        (["explain"], "MODEL"),
        (["explain", "gpt-5"], "model: got 'gpt-5', expected torchtune-llama3, hf-llama or FILE.py:NAME"),
        (["explain", "missing.py:model"], "model: got missing.py, expected a Python file"),
        (["explain", "hf-llama", "--device", "tpu"], "--device: got 'tpu', expected cpu or cuda"),
        (["explain", "hf-llama", "--json", "no/such/folder.json"], "expected a file in a folder that exists"),
        (["explain", "hf-llama", "--markdown", "no/such/folder.md"], "--markdown: got no/such/folder.md, expected"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "got nothing of that name, expected a function"),
        ("number", "got number = 3, expected a function"),
        ("alone", "alone(): got Norm, expected (model, (argument, ...))"),
        ("fails", "my_model.py:23: raised KeyError: 'weights'"),
        ("misfit", "misfit: tracing it raised "),
    ],
)
def test_what_is_wrong_with_a_users_file_is_one_line(
    capsys: pytest.CaptureFixture[str], model_file: Path, name: str, message: str
) -> None:
    assert message in error_of(capsys, "explain", f"{model_file}:{name}")


def test_a_syntax_error_names_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ny = (\n")
    assert "broken.py:2: raised SyntaxError" in error_of(capsys, "explain", f"{tmp_path / 'broken.py'}:x")


def test_an_unknown_setting_in_the_environment_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_file: Path
) -> None:
    monkeypatch.setenv("INFUSE_KERNELS", "some")
    assert "infuse.kernels: got 'some', expected one of" in error_of(capsys, "explain", f"{model_file}:norm")


def test_a_missing_extra_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    message = error_of(capsys, "demo", "--quick")
    assert "got no matplotlib" in message and "pip install 'infuse[demo]'" in message


def test_explain_reports_a_users_model(capsys: pytest.CaptureFixture[str], model_file: Path, tmp_path: Path) -> None:
    assert main(["explain", f"{model_file}:norm", "--json", str(tmp_path / "report.json")]) == 0
    assert "rewritten: rms_norm 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rewritten"] == {"rms_norm": 1} and report["graphs"] == 1
    assert "my_model.py:11" in report["sites"][0]["source"]


def test_explain_writes_only_the_form_that_was_asked_for_to_the_output(
    capsys: pytest.CaptureFixture[str], model_file: Path, tmp_path: Path
) -> None:
    assert main(["explain", f"{model_file}:norm", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rewritten"] == {"rms_norm": 1}
    assert main(["explain", f"{model_file}:norm", "--markdown", str(tmp_path / "report.md")]) == 0
    assert (tmp_path / "report.md").read_text().startswith("| site | kind |")
    assert "rewritten: rms_norm 1" in capsys.readouterr().out


def test_a_lock_is_written_and_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_file: Path, tmp_path: Path
) -> None:
    lock = str(tmp_path / "my.lock")
    assert main(["lock", f"{model_file}:norm", "--path", lock]) == 1
    assert "has no entry" in capsys.readouterr().out
    assert main(["lock", f"{model_file}:norm", "--path", lock, "--update"]) == 0
    assert main(["lock", f"{model_file}:norm", "--path", lock]) == 0
    assert "unchanged: rewritten: rms_norm 1" in capsys.readouterr().out
    monkeypatch.setenv("INFUSE_PATTERNS", "swiglu")
    assert main(["lock", f"{model_file}:norm", "--path", lock]) == 1
    assert "rms_norm; rewritten" in capsys.readouterr().out
    (tmp_path / "my.lock").write_text("[]")
    assert "no lock file" in error_of(capsys, "lock", f"{model_file}:norm", "--path", lock)


def test_explain_takes_functions_and_lists_and_says_that_there_is_nothing(
    capsys: pytest.CaptureFixture[str], model_file: Path
) -> None:
    assert main(["explain", f"{model_file}:function", "--training"]) == 0
    assert "rewritten: nothing" in capsys.readouterr().out
    assert str(model_file.parent) not in sys.path


@pytest.mark.parametrize("name", ["torchtune-llama3", "hf-llama"])
def test_explain_knows_both_llamas(capsys: pytest.CaptureFixture[str], name: str) -> None:
    pytest.importorskip("torchtune")
    pytest.importorskip("transformers")
    assert main(["explain", name]) == 0
    assert "rewritten: add_rms_norm 8, attention 4, rms_norm 1, rope 8, swiglu 4; graphs: 1" in capsys.readouterr().out


def test_doctor_finds_nothing_broken_here(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code = main(["doctor"])
    out = capsys.readouterr().out
    assert str(torch.__version__) in out and 'backend="infuse" is registered' in out
    assert "a norm was found and rewritten" in out
    for subject in ("python", "platform", "settings", "nvcc", "kernel cache", "kernels", "C++ compiler", "build hash"):
        assert subject in out
    assert (code, "BROKEN" in out) in [(0, False), (1, True)]
    if not torch.cuda.is_available():
        assert code == 0 and "a GPU would add" in out


def test_doctor_names_what_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_NUMERICS", "sloppy")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["doctor"]) == 1
    broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    assert ["settings:" in line or "torch.compile:" in line or "C++ compiler:" in line for line in broken[:3]] == [
        True
    ] * 3
    assert any("got 'sloppy', expected one of" in line for line in broken)


def test_doctor_survives_a_check_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(**selection: object) -> None:
        raise OSError("unreadable metadata")

    monkeypatch.setattr(importlib.metadata, "entry_points", explode)
    assert main(["doctor"]) == 1
    assert re.search(r"BROKEN entry point: +OSError: unreadable metadata", capsys.readouterr().out)


def test_missing_python_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not why_inductor_cannot_compile():
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        assert "python3-dev" in why_inductor_cannot_compile()


def test_bench_knows_the_programs_of_a_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    programs = bench.benchmarks(bench.FOLDER)
    if not programs:
        pytest.skip("needs a checkout")
    assert "norms" in programs and "harness" not in programs
    assert main(["bench"]) == 0
    assert "norms" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["echo", "all"])
def test_bench_passes_options_and_the_exit_code_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    program = '"""Says what it got."""\nimport sys\nfrom command import code\nprint(sys.argv[1:])\nsys.exit(code)\n'
    (tmp_path / "echo.py").write_text(program)
    (tmp_path / "command.py").write_text("code = 3\n")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert main(["bench", name, "--quick", "--cases", "x"]) == 3
    assert capfd.readouterr().out == "['--quick', '--cases', 'x']\n"


def test_bench_without_a_checkout_says_where_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert "expected a checkout: the benchmarks are in its folder benchmarks/" in error_of(capsys, "bench")


def test_build_has_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["build", "--help"])
    assert exit_.value.code == 0
    assert "--arch" in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name, _, _ in COMMANDS)


def test_an_interruption_has_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("infuse.cli.doctor.main", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "infuse: interrupted\n"


def test_the_command_line_adds_no_heavy_import() -> None:
    code = "import sys, infuse; before = set(sys.modules); import infuse.cli; print(sorted(set(sys.modules) - before))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("rich", "matplotlib", "torchtune", "infuse.backend") if f"'{name}'" in answer], answer
