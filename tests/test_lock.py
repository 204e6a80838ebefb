"""Lock files and the pytest fixture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infuse.testing import LockError, check_lock
from tests.small_models import Block, HandWrittenNorm

ROOT = Path(__file__).resolve().parents[1]


def half_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_lock_file_has_a_line_a_site_and_an_entry_a_model(tmp_path: Path) -> None:
    path = tmp_path / "infuse.lock"
    x = torch.randn(1, 4, 32)
    check_lock(Block(), (x,), path=path, update=True)
    check_lock(half_norm, (x.bfloat16(),), path=path, update=True, training=True)
    text = path.read_text()
    assert list(json.loads(text)["models"]) == ["Block", "half_norm (training)"]
    lines = [line.strip() for line in text.splitlines()]
    assert sum("rewritten" in line for line in lines) == 4 and any(
        line.startswith('"norm1: rms_norm;') for line in lines
    )
    assert any("rms_norm; refused; the statistics" in line for line in lines)
    assert ".py" not in text and not list(tmp_path.glob("*.writing"))
    assert check_lock(Block(), (x,), path=path).graphs == 1
    check_lock(half_norm, (x.bfloat16(),), path=path, training=True)
    assert path.read_text() == text


def test_drift_fails_with_a_diff_and_the_way_to_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = tmp_path / "infuse.lock", torch.randn(1, 4, 32)
    check_lock(HandWrittenNorm(32), (x,), path=path, name="model", update=True)
    with pytest.raises(LockError) as raised:
        check_lock(half_norm, (x.bfloat16(),), path=path, name="model")
    lines = str(raised.value).splitlines()
    assert any(line.startswith("-") and "rms_norm; rewritten" in line for line in lines), lines
    assert any(line.startswith("+rsqrt: rms_norm; refused") for line in lines), lines
    assert "INFUSE_UPDATE_LOCK=1" in lines[-1] and "--infuse-update-lock" in lines[-1]
    monkeypatch.setenv("INFUSE_UPDATE_LOCK", "1")
    check_lock(half_norm, (x.bfloat16(),), path=path, name="model")
    monkeypatch.delenv("INFUSE_UPDATE_LOCK")
    check_lock(half_norm, (x.bfloat16(),), path=path, name="model")


def test_an_unknown_model_names_the_known_ones(tmp_path: Path) -> None:
    path, x = tmp_path / "infuse.lock", torch.randn(1, 4, 32)
    with pytest.raises(LockError, match="it has none, or does not exist"):
        check_lock(Block(), (x,), path=path)
    check_lock(Block(), (x,), path=path, update=True)
    with pytest.raises(LockError, match="has no entry 'other', it has Block"):
        check_lock(Block(), (x,), path=path, name="other")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no lock file"), ('{"infuse.lock": 9, "models": {}}', "format 9, expected 1")]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "infuse.lock").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_lock(half_norm, (torch.randn(2, 8),), path=tmp_path / "infuse.lock")


TESTS = """
import sys

def test_starts_without_torch(infuse):
    assert "torch" not in sys.modules and "infuse" not in sys.modules

def norm(x):
    import torch
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

def test_counts(infuse):
    import torch
    infuse.assert_rewrites(norm, (torch.randn(2, 8),), expect={"rms_norm": 1})

def test_lock(infuse):
    import torch
    infuse.check_lock(norm, (torch.randn(2, 8),))
    infuse.check_lock(norm, (torch.randn(2, 8).bfloat16(),), name="half")
"""


def run_pytest(folder: Path, *arguments: str) -> str:
    # A copy of the plugin alone: beside it, in src, lies a folder that would pass for the package.
    command = [sys.executable, "-m", "pytest", "-p", "pytest_infuse", "-p", "no:cacheprovider", "-q", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(folder)])}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout + done.stderr


def test_the_fixture_in_a_users_suite(tmp_path: Path) -> None:
    shutil.copy(ROOT / "src" / "pytest_infuse.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_models.py").write_text(TESTS)
    before = run_pytest(tmp_path)
    assert "2 passed" in before and "1 failed" in before and "--infuse-update-lock" in before, before
    assert "3 passed" in (out := run_pytest(tmp_path, "--infuse-update-lock")), out
    assert "3 passed" in (out := run_pytest(tmp_path)), out
    models = json.loads((tmp_path / "infuse.lock").read_text())["models"]
    assert list(models) == ["test_models.py::test_lock", "test_models.py::test_lock half"]
