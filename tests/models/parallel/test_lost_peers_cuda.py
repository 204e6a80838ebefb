"""A process that is lost while several GPUs generate ends the others, with an error that names it, within the timeout.

NCCL's kernels wait for a lost peer for ever: what ends their process is the heartbeat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchtune")
pytest.importorskip("safetensors")

from infuse.models.checkpoint import save_checkpoint
from infuse.models.shard import whole_model
from infuse.models.sharded import ShardedGeneralModel
from tests.models.configs import CONFIG
from tests.models.parallel import cuda_losses, job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL"),
]
TIMEOUT_S = 6.0
GRACE_S = 6.0  # a moment to end by itself, and for the driver to take a spinning kernel from the GPU
STARTED_S = 120.0  # for imports and compilation
CUDA_LOSSES = "tests.models.parallel.cuda_losses"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost") / "model"
    sizes = {"embed_dim": 256, "head_dim": 64, "max_seq_len": 4096, "torch_dtype": torch.bfloat16}
    config = dataclasses.replace(CONFIG, model_type="llama", **sizes)
    save_checkpoint([ShardedGeneralModel(config, whole_model("m", config.num_layers), dtype=torch.bfloat16)], folder)
    return folder


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a process did. code: None where it still ran at the end; seconds: how long after the loss."""

    code: int | None
    seconds: float
    said: str


@pytest.fixture(scope="module")
def ended(checkpoint: Path) -> dict[str, list[Ended]]:
    """Of each job the processes by rank; all jobs run at once."""
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(job.start(2, "-m", CUDA_LOSSES, str(checkpoint), name, str(TIMEOUT_S)))
            for name in cuda_losses.JOBS
        }
        stopped = running["stopped"][cuda_losses.JOBS["stopped"].lost[0]]
        at = _wait([process for processes in running.values() for process in processes if process is not stopped])
        stopped.kill()
        return {name: _read(processes, at) for name, processes in running.items()}


def _wait(processes: list[subprocess.Popen[str]]) -> dict[int, float]:
    """When each process has ended, by its id; those that haven't when the time is up are missing."""
    at: dict[int, float] = {}
    end = time.time() + STARTED_S
    while len(at) < len(processes) and time.time() < end:
        at |= {
            process.pid: time.time() for process in processes if process.pid not in at and process.poll() is not None
        }
        time.sleep(0.02)
    return at


def _read(processes: list[subprocess.Popen[str]], at: dict[int, float]) -> list[Ended]:
    said = []
    for process in processes:
        process.kill()
        assert process.stdout is not None
        said.append(process.stdout.read())
        process.wait()
    begun = [float(moment) for text in said for moment in re.findall(r"^lost at ([\d.]+)$", text, re.MULTILINE)]
    lost = min(begun, default=float("nan"))
    codes = [process.returncode if process.pid in at else None for process in processes]
    return [
        Ended(code, at.get(process.pid, float("inf")) - lost, text)
        for process, code, text in zip(processes, codes, said, strict=True)
    ]


def assert_in_time(process: Ended) -> None:
    assert process.code not in (None, 0), process.said
    assert process.seconds < TIMEOUT_S + GRACE_S, f"{process.seconds} s after the loss: {process.said}"


def test_a_peer_killed_while_cuda_graphs_add_over_ranks_is_named(ended: dict[str, list[Ended]]) -> None:
    survivor = ended["killed in CUDA graphs"][0]
    assert_in_time(survivor)
    assert "rank 0 ends: lost rank 1 (part 2 of 2 of layers 0-2, process " in survivor.said, survivor.said


def test_the_first_of_a_pipeline_killed_is_named_to_the_last(ended: dict[str, list[Ended]]) -> None:
    survivor = ended["killed in a pipeline"][1]
    assert_in_time(survivor)
    assert "rank 1 ends: lost rank 0 (layers 0-1, process " in survivor.said, survivor.said


def test_a_peer_that_hangs_is_named(ended: dict[str, list[Ended]]) -> None:
    survivor = ended["stopped"][0]
    assert_in_time(survivor)
    assert "rank 0 ends: lost rank 1 (layers 2-2, process " in survivor.said, survivor.said


def test_a_peer_that_fails_says_why_and_ends(ended: dict[str, list[Ended]]) -> None:
    survivor, failed = ended["failed"]
    for process in (survivor, failed):
        assert_in_time(process)
    assert "ValueError: no memory left for this shard" in failed.said
    assert "rank 1 failed: ValueError: no memory left for this shard" in survivor.said


def test_torchrun_says_whom_it_lost(checkpoint: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launcher, CUDA_LOSSES, str(checkpoint), "killed in CUDA graphs", str(TIMEOUT_S)]
    done = subprocess.run(command, cwd=job.ROOT, capture_output=True, text=True, timeout=STARTED_S)
    ended_at, lost = time.time(), re.search(r"^lost at ([\d.]+)$", done.stdout, re.MULTILINE)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and lost is not None, said
    assert ended_at - float(lost[1]) < TIMEOUT_S + GRACE_S, said
    assert "Signal 9 (SIGKILL)" in said and re.search(r"rank +: 1 ", said), said
