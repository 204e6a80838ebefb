"""What an implementation costs beside the time of a call: its compilation, and device memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from answers import Function
from device import Device
from implementations import Impl, empty_caches, warm_up_compiler
from timing import Inputs


@dataclass(frozen=True, slots=True)
class Costs:
    """As the fields of a row that are called so. None: not measured here."""

    compile_s: float | None
    peak_bytes: int | None
    saved: tuple[int, int] | None  # bytes of activations and of gradients between forward and backward


class CostMeter:
    """Takes first calls. `reset` of its methods puts back what calls change, as a case's."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._compiler_is_warm = False

    def first_call(self, impl: Impl, inputs: Inputs, *, cold: bool) -> tuple[Function, float | None]:
        """The function after its first call; of one that is compiled the seconds of that, with empty caches if cold."""
        if not (cold and impl.compiles):
            function = impl.prepare()
            function(*inputs)
            return function, None
        with empty_caches():
            if not self._compiler_is_warm:
                warm_up_compiler(self.device.torch_device)
                self._compiler_is_warm = True
            self.device.synchronize()
            begin = time.perf_counter()
            function = impl.prepare()
            function(*inputs)
            self.device.synchronize()
            return function, time.perf_counter() - begin

    def peak_bytes(self, function: Function, inputs: Inputs, reset: Callable[[], None]) -> int | None:
        """Memory that one call takes on top of what is allocated before it."""
        if self.device.type != "cuda":
            return None
        reset()
        self.device.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs)
        self.device.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def saved(self, function: Function, inputs: Inputs, reset: Callable[[], None]) -> tuple[int, int] | None:
        """Of a function that can tell, by a method of that name."""
        measure: Callable[..., tuple[int, int]] | None = getattr(function, "saved", None)
        if measure is None or self.device.type != "cuda":
            return None
        reset()
        return measure(*inputs)
