"""Kernels where there are none: the norms' out variants, implemented on the CPU, so that choices can be tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from infuse.lowering import decisions
from infuse.ops import add_layer_norm, add_rms_norm, gated_rms_norm, layer_norm, library, rms_norm


@pytest.fixture
def cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The list of configurations with which the pretended kernels were called."""
    calls: list[int] = []
    implementation = torch.library.Library("infuse", "IMPL")

    def pretend(kind: str, formula: Any, num_results: int, num_given: int) -> None:
        def run_out(*args: Any) -> None:
            calls.append(args[num_given])
            results = formula(*_for_formula(kind, args[:num_given]))
            for out, result in zip(args[num_given + 1 :], [results] if num_results == 1 else results):
                out.copy_(result)

        def run(*args: Any) -> Any:
            calls.append(args[-1])
            return tuple(result.contiguous() for result in formula(*args[:-1]))

        implementation.impl(f"{kind}_out", run_out, "CPU")
        if num_results == 2:
            implementation.impl(f"{kind}_kernel", run, "CPU")

    pretend("rms_norm", rms_norm.rms_norm_ref, 1, 6)
    pretend("layer_norm", layer_norm.layer_norm_ref, 1, 6)
    pretend("add_rms_norm", add_rms_norm.add_rms_norm_ref, 2, 7)
    pretend("add_layer_norm", add_layer_norm.add_layer_norm_ref, 2, 7)
    pretend("gated_rms_norm", gated_rms_norm.gated_rms_norm_ref, 1, 9)
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "configurations", lambda op: ("wide", "narrow"))
    decisions.clear()
    yield calls
    implementation._destroy()
    torch._dynamo.reset()


def _for_formula(kind: str, args: tuple[Any, ...]) -> list[Any]:
    """The operator's own arguments: the kernel is told the activation by a flag."""
    given = list(args)
    if kind == "gated_rms_norm":
        given[5] = "silu" if given[5] else "sigmoid"
    return given
