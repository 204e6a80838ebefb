"""Several processes with the environment that torchrun gives them, and what each of some checks came to in them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from filelock import FileLock

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[3]


def once(factory: pytest.TempPathFactory, name: str, run: Callable[[Path], None]) -> Path:
    """A folder that `run` has filled: only one of the test processes, which share it, runs."""
    common = factory.getbasetemp()
    common = common.parent if common.name.startswith("popen-") else common  # a folder for each of xdist's processes
    folder = common / name
    with FileLock(common / f"{name}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            run(folder)
            (folder / "done").touch()
    return folder


@contextlib.contextmanager
def start(world_size: int, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """`python ARGUMENTS` once a rank. As torchrun's agent does, this process holds the store, on a port of its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(world_size),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(world_size):
            variables = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            processes.append(
                subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=variables, text=True, **pipes)  # type: ignore[call-overload]
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def results(world_size: int, names: list[str], folder: Path, timeout_s: float = 240.0) -> dict[str, str]:
    """Checks "module.function", each run by every rank of one job: "" where it passed, else who failed and how.

    A check gets the process's `Peers` and the folder. After one has failed on some rank those behind it don't run.
    """
    with start(world_size, "-m", __name__, str(folder), *names) as processes:
        logs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    found: dict[str, str] = {}
    for name in names:
        found[name] = ""
        for rank, log in enumerate(logs):
            file = folder / f"{name}.{rank}"
            said = json.loads(file.read_text()) if file.exists() else f"did not get there; its output:\n{log}"
            found[name] += said and f"\nrank {rank}: {said}"
    return found


def checks(module: str) -> list[str]:
    """The `check_*` that a module of this folder defines."""
    found = importlib.import_module(f"{__package__}.{module}")
    return [f"{module}.{name}" for name in vars(found) if name.startswith("check_")]


def main(folder: Path, names: list[str]) -> None:
    import torch

    from infuse.models.parallel.process_group import process_group

    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    with process_group("cpu", timeout_s=120) as peers:
        for name in names:
            module, _, function = name.partition(".")
            torch.manual_seed(0)
            said = ""
            try:
                getattr(importlib.import_module(f"tests.models.parallel.{module}"), function)(peers, folder)
            except BaseException:
                said = traceback.format_exc()
                raise
            finally:
                (folder / f"{name}.{peers.rank}").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
