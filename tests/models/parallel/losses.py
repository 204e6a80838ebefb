"""Jobs whose processes die, stop, fail or never start; `test_lost_peers.py` reads how the others ended.

    python -m tests.models.parallel.losses FOLDER TIMEOUT_S PORT...

All jobs run at once, their processes forked from this one, which has imported torch for them; it has no threads that a
fork would lose, so another process holds the jobs' stores, at these ports. Each survivor writes to FOLDER/<job>.<rank>,
and how it ended and after how many seconds to FOLDER/<job>.<rank>.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from infuse.models.parallel.process_group import Peers, process_group

FIRST_TIMEOUT_S = 20.0  # of the job that fails once


def killed(peers: Peers) -> None:
    """The middle one of a pipeline dies; the last one waits for it, the first for the last."""
    if peers.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.recv(torch.zeros(1), src=(peers.rank - 1) % 3)


def stopped(peers: Peers) -> None:
    """Its connections stay open: nothing but silence tells that it is gone."""
    if peers.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.recv(torch.zeros(1), src=1)


def failed(peers: Peers) -> None:
    if peers.rank == 1:
        raise ValueError("no memory left for this shard")
    dist.recv(torch.zeros(1), src=1)


def slow(peers: Peers) -> None:
    """Works for longer than the timeout, which is no loss."""
    if peers.rank == 1:
        time.sleep(1.5 * peers.heartbeat.timeout_s)
    dist.all_reduce(torch.zeros(1))


def again(peers: Peers) -> None:
    """All fail, and join again."""
    if peers.heartbeat.timeout_s == FIRST_TIMEOUT_S:
        raise ValueError("not this time")
    time.sleep(3 * peers.heartbeat.interval_s)  # long enough to see what a peer has reported
    dist.all_reduce(torch.zeros(1))


def absent(peers: Peers) -> None:
    raise AssertionError("expected process_group not to start without rank 1")


# Name -> what each rank does, how many ranks, how many of them start.
JOBS: dict[str, tuple[Callable[[Peers], None], int, int]] = {
    "killed": (killed, 3, 3),
    "stopped": (stopped, 2, 2),
    "failed": (failed, 2, 2),
    "slow": (slow, 2, 2),
    "again": (again, 2, 2),
    "absent": (absent, 2, 1),
}


def run_rank(name: str, rank: int, port: int, folder: Path, timeout_s: float) -> None:
    action, world_size, _ = JOBS[name]
    with (folder / f"{name}.{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    try:
        if name == "again":
            with contextlib.suppress(ValueError), process_group("cpu", timeout_s=FIRST_TIMEOUT_S) as peers:
                action(peers)
        with process_group("cpu", timeout_s=timeout_s) as peers:
            peers.describe(f"part {rank} of {name}")
            dist.barrier()
            action(peers)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)
    os._exit(0)


def main(folder: Path, timeout_s: float, ports: list[int]) -> None:
    begin, running = time.monotonic(), {}
    for (name, (_, _, started)), port in zip(JOBS.items(), ports, strict=True):
        for rank in range(started):
            process = os.fork()
            if process == 0:
                run_rank(name, rank, port, folder, timeout_s)
            running[process] = (name, rank)
    lost = {process for process, (name, rank) in running.items() if name == "stopped" and rank == 1}
    while set(running) - lost and time.monotonic() < begin + 10 * timeout_s:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            name, rank = running.pop(process)
            ended = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}
            (folder / f"{name}.{rank}.json").write_text(json.dumps(ended))
        time.sleep(0.02)
    for process in running:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), [int(port) for port in sys.argv[3:]])
