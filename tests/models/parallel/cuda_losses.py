"""A process of a job that generates on two GPUs, whose second process is lost in the middle of it.

    python -m tests.models.parallel.cuda_losses CHECKPOINT NAME TIMEOUT_S

with torchrun's environment, for one of `JOBS`; `test_lost_peers_cuda.py` reads how the other process ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from infuse.models.parallel.launch import open_engine
from infuse.models.writing import stream_tokens

TOKENS, LOST_AT = 2000, 100


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("no memory left for this shard")


@dataclass(frozen=True, slots=True)
class Job:
    """cut: shards and ways of tensor parallel, two processes in all. lost: which rank, and what happens to it."""

    cut: tuple[int, int]
    lost: tuple[int, Callable[[], None]]
    mode: str | None = None  # of torch.compile with infuse; None is eager


JOBS = {
    "killed in CUDA graphs": Job((1, 2), (1, die), "reduce-overhead"),
    "killed in a pipeline": Job((2, 1), (0, die)),
    "stopped": Job((2, 1), (1, stop)),
    "failed": Job((1, 2), (1, fail)),
}


def main(folder: Path, name: str, timeout_s: float) -> None:
    job = JOBS[name]
    shards, ways = job.cut
    lost, happens = job.lost

    def compile_with(decoder: torch.nn.Module) -> None:
        if job.mode is not None:
            decoder.compile(backend="infuse", mode=job.mode, dynamic=False, fullgraph=True)

    opened = open_engine(
        folder,
        num_shards=shards,
        tensor_parallel=ways,
        device="cuda",
        max_generated_tokens=TOKENS,
        compile_with=compile_with,
        timeout_s=timeout_s,
    )
    with opened as engine:
        tokens = stream_tokens(engine, torch.zeros(1, 8, dtype=torch.int64), TOKENS, eager_prompt=True)
        for count, _ in enumerate(tokens):
            if count == LOST_AT:
                print(f"lost at {time.time()}", flush=True)
                if int(os.environ["RANK"]) == lost:
                    happens()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
