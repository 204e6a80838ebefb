"""`infuse generate` by torchrun itself: four processes write what one writes, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("torchtune")
pytest.importorskip("transformers")

from infuse.cli import main

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def test_four_processes_write_what_one_writes(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--checkpoint", str(trained), "--device", "cpu", "--compile", "eager", "--max-tokens", "12"]
    asked += ["--prompt", "import os", "--prompt", "class Queue:\n    def __init__(self"]
    assert main(asked) == 0
    expected = capsys.readouterr().out
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*launcher, "-m", "infuse", *asked, "--shards", "2", "--tp", "2"]
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected and done.stderr.count("tokens/s") == 2
