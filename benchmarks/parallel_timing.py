"""Times of steps that several processes take together: the slowest one's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timing import Stats, summarise


@dataclass(frozen=True, slots=True)
class Measured:
    """What a case reports of one implementation."""

    case: str
    impl: str
    stats: Stats
    max_error: float | None
    note: str


def take_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, calls: int, peers: Any | None
) -> dict[str, Stats]:
    """Milliseconds of one step, `rounds` samples of `calls` steps each, in turn. peers: None for a process by itself.

    With peers all begin a sample together, and its time is that of the last to be done.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _meet(peers)
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            samples[name].append(_slowest((time.perf_counter() - begin) * 1e3 / calls, peers))
    return {name: summarise(values) for name, values in samples.items()}


def _meet(peers: Any | None) -> None:
    if peers is not None:
        dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _slowest(elapsed_ms: float, peers: Any | None) -> float:
    if peers is None:
        return elapsed_ms
    found = torch.tensor(elapsed_ms, device=peers.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()
