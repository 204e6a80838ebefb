"""The demo, end to end in its quick form, and that it ends with exit code 1 when something that it shows is not so."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchtune")
pytest.importorskip("transformers")

from infuse.cli import demo, demo_generation, demo_rewrites, demo_training, main
from infuse.cli.demo_plan import DemoFailed, Plan, quick_plan
from infuse.models import llama
from infuse.models.checkpoint import load_sharded_model

STEPS = 6


@pytest.mark.slow
def test_quick_demo_runs_and_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "infuse", "demo", "--quick", "--device", "cpu"]
    command += ["--steps", str(STEPS), "--seed", "3", "--output", str(output)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "mine")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "all promises held" in done.stdout and f"step {STEPS:>4}/{STEPS}" in done.stdout
    assert not (tmp_path / "mine").exists(), "the demo compiles into a folder of its own"

    width, height = size_of_png(output / "loss.png")
    assert 600 <= width <= 2000 and 400 <= height <= 2000

    reports = json.loads((output / "report.json").read_text())
    rewritten = {"add_rms_norm": 4, "attention": 2, "rms_norm": 1, "rope": 4, "swiglu": 2}
    assert {name: report["rewritten"] for name, report in reports.items()} == {
        "torchtune-llama3": rewritten,
        "hf-llama": rewritten,
    }
    numbers = json.loads((output / "demo.json").read_text())
    check_numbers(numbers, rewritten)

    # What the command that the demo ends with writes; the demo's trained decoder is in that folder.
    prompt, tokens = numbers["plan"]["prompt"], numbers["generation"]["variants"]["eager"]["tokens"]
    assert f"python -m infuse generate --checkpoint {output / 'model'} --prompt def" in done.stdout
    request = ["--checkpoint", str(output / "model"), "--prompt", prompt, "--max-tokens", str(len(tokens))]
    assert main(["generate", "--device", "cpu", *request]) == 0
    assert prompt + capsys.readouterr().out.removesuffix("\n") == numbers["generation"]["greedy"]


def check_numbers(numbers: dict[str, Any], rewritten: dict[str, int]) -> None:
    training, generation = numbers["training"], numbers["generation"]
    assert training["rewritten"] == generation["rewritten"] == rewritten
    for run in training["runs"].values():
        assert len(run["losses"]) == len(run["seconds"]) == STEPS
        assert set(run["validation"]) == {"0", "4", str(STEPS)}
    losses = [training["runs"][name]["losses"] for name in ("eager", "infuse")]
    assert max(abs(a - b) for a, b in zip(*losses)) == training["max_loss_difference"] < 1e-3
    assert losses[0][0] == pytest.approx(math.log(256), rel=0.1)
    tokens = [variant["tokens"] for variant in generation["variants"].values()]
    assert list(generation["variants"]) == ["eager", "infuse", "stock", "eager, 2 shards"]
    assert all(each == tokens[0] for each in tokens) and len(tokens[0]) == 10
    assert all(speed > 0 for variant in generation["variants"].values() for speed in variant["tokens_per_s"])
    assert {"rewrites", "training", "generation", "total"} == set(numbers["seconds"])


def size_of_png(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Tensor], Tensor]], None]]:
    """Puts eager code with planted logits in place of what Infuse compiles, and takes its rewrites for granted."""
    planted: list[Callable[[Tensor], Tensor]] = [lambda logits: logits]

    def compile_(model: Any, backend: str, **options: object) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            logits: Tensor = model(*args, **kwargs)
            return planted[0](logits) if backend == "infuse" else logits

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(demo_training, "promise_all_sites", lambda *args: None)
    monkeypatch.setattr(demo_generation, "promise_all_sites", lambda *args: None)
    monkeypatch.setattr(demo_rewrites, "explain_models", lambda plan: {})
    yield lambda plant: planted.__setitem__(0, plant)


def run_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["demo", "--quick", "--device", "cpu", "--steps", str(STEPS), "--output", str(tmp_path)])
    return code, capsys.readouterr().err


def test_the_planted_demo_passes_when_nothing_is_planted(
    without_compiler: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(tmp_path, capsys) == (0, "")


def test_a_wrong_token_ends_in_exit_code_1(
    without_compiler: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def wrong_at_the_end(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += logits.shape[1] == 1
        if calls < 10:
            return logits
        return logits.roll(1, -1)  # every token's neighbour

    without_compiler(wrong_at_the_end)
    code, err = run_demo(tmp_path, capsys)
    assert code == 1
    assert re.fullmatch(
        r"infuse demo: FAILED: generation: token \d: got \d+ from infuse, expected \d+ as from eager, .*\n", err
    ), err
    assert not (tmp_path / "demo.json").exists()


def test_wrong_gradients_end_in_exit_code_1(
    without_compiler: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compiler(lambda logits: logits * 1.01)
    code, err = run_demo(tmp_path, capsys)
    assert code == 1 and "gradients of the first step: got a difference" in err


def test_a_curve_that_drifts_away_ends_in_exit_code_1(
    without_compiler: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def wrong_after_the_first_step(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits if calls == 1 else logits * 2

    without_compiler(wrong_after_the_first_step)
    code, err = run_demo(tmp_path, capsys)
    assert code == 1 and "loss curves: got a difference of " in err


def test_a_site_that_is_not_rewritten_ends_in_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFUSE_PATTERNS", "attention,rms_norm")
    code, err = run_demo(tmp_path, capsys)
    assert code == 1 and "rewrites: got rewritten: attention 2" in err and "swiglu 2" in err


def plan(tmp_path: Path) -> Plan:
    return quick_plan(None, torch.device("cpu"), 0, tmp_path)


def test_another_token_in_a_timed_round_is_an_error(tmp_path: Path) -> None:
    class Writer:
        def tokens(self, timing: object) -> list[int]:
            return [1, 3]

    variants = {name: demo_generation.Variant(tokens=[1, 2]) for name in demo_generation.VARIANTS}
    with pytest.raises(DemoFailed, match="eager chose other tokens in timed round 1"):
        demo_generation._round(plan(tmp_path), dict.fromkeys(variants, Writer()), variants, 0)  # type: ignore[arg-type]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert demo_generation._shown("a\x1b[2J\nb\r\té") == "a\ufffd[2J\n  b\ufffd\ufffdé"


def test_an_earlier_demos_folder_is_replaced(tmp_path: Path) -> None:
    for seed in (0, 1):
        trained = llama.torchtune_llama3(plan(tmp_path).config, seed)
        folder = demo_generation._save(plan(tmp_path), trained)
        loaded = load_sharded_model(folder).model.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in trained.state_dict().items())


def test_what_the_demo_sets_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with demo._state_of_its_own():
        torch.set_num_threads(threads + 1)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != "mine" and "TRITON_CACHE_DIR" in os.environ
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine" and "TRITON_CACHE_DIR" not in os.environ
    assert torch.get_num_threads() == threads


def test_a_folder_that_can_not_be_written_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--quick", "--output", str(tmp_path / "file")]) == 2
    assert "--output: got " in capsys.readouterr().err
