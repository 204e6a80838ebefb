"""The command `infuse build`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infuse import build
from tests.build.fake_nvcc import FakeNvcc


def test_command_says_what_it_did(
    nvcc: FakeNvcc, tmp_path: Path, quick_check: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--arch", "8.0;9.0a", "--arch", "8.6", "--jobs", "2", "--output", str(tmp_path / "out"), "--verbose"]
    assert build.main(arguments) == 0
    output = capsys.readouterr().out
    assert "compiling for sm_80, sm_90a, sm_86" in output
    assert re.search(rf"{re.escape(str(tmp_path / 'out' / build.LIBRARY_NAME))} \(.* MiB, .* s\)", output)
    assert str(nvcc.path) in output


def test_command_fails_in_words(no_nvcc: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--arch", "9.0a"]) == 1
    assert "infuse build: no nvcc" in capsys.readouterr().err
    assert build.main(["--arch", "nine"]) == 1
    assert "'nine'" in capsys.readouterr().err
