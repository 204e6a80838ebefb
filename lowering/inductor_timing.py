"""How long a candidate takes on the device, called as a graph would call it.

Like infuse.lowering.inductor, whose part this is, it may import Inductor's private names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codegen.subgraph import SubgraphChoiceCaller
from torch._inductor.runtime.benchmarking import benchmarker

log = logging.getLogger("infuse")

_CALLS = 10
# Copies of small tensors: enough of them that they fill caches of 60 MB twice from 2 MB each on.
_MOST_COPIES = 64
Inputs = Sequence[Tensor]


class ColdInputs:
    """Inputs for one call after another, of which those that a model reads once a step come out of memory, not caches.

    Weights and K/V caches are read once and then not before all the others have been. Timed on one copy, those of up to
    an H200's 60 MB of cache would come from there, up to three times as fast, which favours other kernels.
    """

    def __init__(self, cold: Collection[int]) -> None:
        self._cold = frozenset(cold)
        self._made: tuple[tuple[int, ...], list[Inputs]] = ((), [])

    def of(self, args: Inputs) -> list[Inputs]:
        """What to call with in turn, beginning with the inputs given. Made once for all candidates that get these."""
        key = tuple(arg.data_ptr() for arg in args)
        if self._made[0] != key:
            self._made = ((), [])  # freed before the next are made
            self._made = (key, [args, *(self._copied(args) for _ in range(self._copies(args)))])
        return self._made[1]

    def _copies(self, args: Inputs) -> int:
        size = sum(arg.numel() * arg.element_size() for i, arg in enumerate(args) if i in self._cold)
        if not size:
            return 0
        needed = 2 * torch.cuda.get_device_properties(args[0].device).L2_cache_size
        return min(_MOST_COPIES, -(-needed // size)) - 1

    def _copied(self, args: Inputs) -> Inputs:
        return [_copy(arg) if i in self._cold else arg for i, arg in enumerate(args)]


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def graph_benchmark(choice: Any, cold: ColdInputs) -> Callable[..., float]:
    """A choice's `benchmark` that counts device time alone.

    A formula is called through a generated Python module and a kernel directly; without a CUDA graph the difference in
    launch overhead, tens of microseconds, would decide for small tensors.
    """
    direct = choice.benchmark

    def benchmark(*args: Tensor, out: Tensor) -> float:
        call = _call_of(choice)
        inputs = cold.of(args)
        calls = max(_CALLS, len(inputs))
        try:
            call(args, out)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(calls):
                    call(inputs[i % len(inputs)], out)
        except RuntimeError as error:
            log.info("%s cannot be captured in a CUDA graph (%s); timed by its launches", choice.name, error)
            return float(direct(*args, out=out))
        return float(benchmarker.benchmark_gpu(graph.replay)) / calls

    return benchmark


def _call_of(choice: Any) -> Callable[[Inputs, Tensor], object]:
    if isinstance(choice, SubgraphChoiceCaller):
        module = choice._compile_for_benchmarking()
        symbols = choice.sym_input_values
        return lambda args, out: module.call([*symbols, *args])
    run = choice.to_callable()
    return lambda args, out: run(*args, out=out)
