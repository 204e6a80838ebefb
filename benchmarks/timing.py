"""Sampling: several implementations in turn, round after round, so that drift of the machine hits all alike.

On a GPU every sample starts with a cold L2 (a buffer of several times its size is written first), runs over input sets
that no earlier launch of the sample touched, and is timed with CUDA events. Implementations that are only kernels are
captured into one CUDA graph a sample, so that launch gaps stay out of short kernels' times; the others are called as a
user calls them. On a CPU the clock is perf_counter.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from answers import Function, Output, poison, tensors
from device import Device
from torch import Tensor

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """One call's time in milliseconds over all rounds; samples in the order of the rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: tuple[float, ...]


def percentile(values: Sequence[float], fraction: float) -> float:
    """With linear interpolation between the ranks, as numpy's default."""
    ranked = sorted(values)
    rank = fraction * (len(ranked) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (rank - low) * (ranked[high] - ranked[low])


def summarise(samples: Sequence[float]) -> Stats:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("summarise: got no samples")
    return Stats(statistics.median(samples), percentile(samples, 0.2), percentile(samples, 0.8), tuple(samples))


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> Stats:
    """Time over the baseline's time, round by round, which drift of the machine cancels out of."""
    return summarise([a / b for a, b in zip(samples, baseline, strict=True)])


class Timed(ABC):
    """One implementation, ready to be timed. `last`: pairs (index of the input set, answer) of its last run."""

    def __init__(self, name: str, calls: int) -> None:
        self.name = name
        self.calls = calls
        self.last: list[tuple[int, Output]] = []

    @abstractmethod
    def run(self) -> None:
        """All calls of one sample; launched, not awaited."""

    @abstractmethod
    def poison(self) -> None:
        """Makes a stale or unwritten answer of the next run visible, as far as that is possible."""

    @abstractmethod
    def keep(self) -> None:
        """Saves the last run's answers from being overwritten by somebody else's run."""


class Calls(Timed):
    """Calls from Python, over the sets in turn. Only the last answer is kept: its memory is not ours in every mode."""

    def __init__(self, name: str, function: Function, sets: Sequence[Inputs], calls: int) -> None:
        super().__init__(name, calls)
        self.function = function
        self.sets = sets

    def run(self) -> None:
        for index in range(self.calls):
            answer = self.function(*self.sets[index % len(self.sets)])
        self.last = [((self.calls - 1) % len(self.sets), answer)]

    def poison(self) -> None:
        """The allocator hands out freed blocks again: leave poisoned ones of the answer's sizes behind."""
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for _, answer in self.last for tensor in tensors(answer)]
        self.last = []
        blocks = [torch.full(shape, float("nan"), dtype=dtype, device=device) for shape, dtype, device in shapes]
        del blocks

    def keep(self) -> None:
        """A mode with CUDA graphs of its own lends memory that the graphs of all compiled functions share."""
        self.last = [(index, [tensor.clone() for tensor in tensors(answer)]) for index, answer in self.last]


class Replay(Timed):
    """One CUDA graph with a launch for each set; every launch has an answer of its own."""

    def __init__(self, name: str, function: Function, sets: Sequence[Inputs]) -> None:
        super().__init__(name, len(sets))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.last = [(index, function(*inputs)) for index, inputs in enumerate(sets)]

    def run(self) -> None:
        self.graph.replay()

    def poison(self) -> None:
        for _, answer in self.last:
            poison(answer)

    def keep(self) -> None:
        """Each captured graph has a pool of its own."""


class Sampler:
    """Takes samples on one device. `reset` puts back what calls change (a KV cache's position), outside the clock."""

    def __init__(self, device: Device, reset: Callable[[], None] | None = None) -> None:
        self.device = device
        self.reset = reset or (lambda: None)
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.randn(device.cache_bytes, device="cuda")  # 4 bytes each: four times the cache

    def rounds(self, contestants: Sequence[Timed], rounds: int) -> dict[str, Stats]:
        """Milliseconds of one call for each contestant, `rounds` samples each. In the last round answers are poisoned.

        The order is drawn anew for each round: who always followed the same other would profit from what that one left
        in the caches.
        """
        draw = random.Random(rounds)
        samples: dict[str, list[float]] = {timed.name: [] for timed in contestants}
        with _no_collector():
            for number in range(rounds):
                for timed in draw.sample(contestants, len(contestants)):
                    samples[timed.name].append(self.sample(timed, poisoned=number == rounds - 1))
        return {name: summarise(values) for name, values in samples.items()}

    def sample(self, timed: Timed, *, poisoned: bool = False) -> float:
        """Milliseconds of one call. poisoned: the answers are to be checked: spoilt before, kept after."""
        self.reset()
        if poisoned:
            timed.poison()
        elapsed = self._sample_cpu(timed) if self._flush is None else self._sample_cuda(timed, self._flush)
        if poisoned:
            timed.keep()
        return elapsed / timed.calls

    def _sample_cuda(self, timed: Timed, flush: Tensor) -> float:
        """The flush leaves dirty lines, as a preceding kernel would: their write-back counts, as in steady state."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.mul_(-1)
        if not isinstance(timed, Replay):
            torch.cuda.synchronize()  # the flush must not hide the launches that a user waits for
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        elapsed: float = start.elapsed_time(end)
        return elapsed

    def _sample_cpu(self, timed: Timed) -> float:
        begin = time.perf_counter()
        timed.run()
        return (time.perf_counter() - begin) * 1e3


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector would run in some samples and not in others."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
