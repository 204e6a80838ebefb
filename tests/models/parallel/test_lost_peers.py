"""A process that is lost ends the others of its job, with an error that names it, within the timeout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.models.parallel import job, losses

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
TIMEOUT_S = 5.0
GRACE_S = 15.0  # starting, a moment to end by itself, and a machine that is busy with other tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def run(path: Path) -> None:
        stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in losses.JOBS]
        ports = [str(store.port) for store in stores]
        command = [sys.executable, "-m", "tests.models.parallel.losses", str(path), str(TIMEOUT_S), *ports]
        subprocess.run(command, cwd=job.ROOT, check=True, timeout=120)

    return job.once(tmp_path_factory, "lost-peers", run)


def ended(folder: Path, name: str, rank: int) -> tuple[int, str]:
    file = folder / f"{name}.{rank}.json"
    said = (folder / f"{name}.{rank}").read_text()
    assert file.exists(), f"{name}: rank {rank} did not end: {said}"
    result = json.loads(file.read_text())
    assert result["seconds"] < TIMEOUT_S + GRACE_S, result
    return result["code"], said


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_peer_is_named_to_all(folder: Path, rank: int) -> None:
    code, said = ended(folder, "killed", rank)
    assert code == 3
    assert said.startswith(f"PeerLostError: rank {rank} ends: lost rank 1 (part 1 of killed, process "), said
    assert "it was killed" in said


def test_a_peer_that_hangs_ends_a_process_that_waits_for_it(folder: Path) -> None:
    code, said = ended(folder, "stopped", 0)
    assert code == 1 and "infuse: rank 0 ends: lost rank 1 (part 1 of stopped, process " in said


def test_a_peer_that_fails_says_why(folder: Path) -> None:
    assert ended(folder, "failed", 1) == (3, "ValueError: no memory left for this shard\n")
    code, said = ended(folder, "failed", 0)
    assert code in (1, 3) and "rank 1 failed: ValueError: no memory left for this shard" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_works_for_long_is_not_lost(folder: Path, rank: int) -> None:
    assert ended(folder, "slow", rank) == (0, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_have_failed_may_join_again(folder: Path, rank: int) -> None:
    assert ended(folder, "again", rank) == (0, "")


def test_a_peer_that_never_starts_is_named(folder: Path) -> None:
    code, said = ended(folder, "absent", 0)
    assert code == 3 and "rank 0 waited 5 s for rank 1, expected every rank to start" in said
