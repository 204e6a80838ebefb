"""Kernels where there are none: CUDA operators implemented on the CPU, so that choices can be tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.lowering import decisions, profit
from infuse.ops import add_layer_norm, add_rms_norm, gated_rms_norm, layer_norm, library, rms_norm
from tests.lowering.pretended_attention import sdpa_gradients


@pytest.fixture
def implement_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """Gives an operator that is implemented for CUDA alone a function for the CPU, where the lowering then believes in
    a kernel of two configurations."""
    implementation = torch.library.Library("infuse", "IMPL")
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "configurations", lambda op: ("wide", "narrow"))
    decisions.clear()

    def implement(name: str, function: Callable[..., Any]) -> None:
        implementation.impl(name, function, "CPU")
        getattr(torch.ops.infuse, name).default._dispatch_cache.clear()  # an earlier test's, which is not told

    yield implement
    implementation._destroy()
    torch._dynamo.reset()


@pytest.fixture
def cudnn_calls() -> Iterator[list[tuple[Any, ...]]]:
    """The arguments with which torch's operator of SDPA's gradients in cuDNN was called, which the CPU then has."""
    calls: list[tuple[Any, ...]] = []

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Tensor, ...]:
        calls.append((dout, q, k, v, *rest))
        found = sdpa_gradients(dout, q, k, v, rest[4], scale)
        return tuple(torch.empty_like(like).copy_(gradient) for gradient, like in zip(found, (q, k, v)))

    implementation = torch.library.Library("aten", "IMPL")
    implementation.impl("_scaled_dot_product_cudnn_attention_backward", run, "CPU")
    yield calls
    implementation._destroy()


@pytest.fixture
def choose_always(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[set[str]]]:
    """Has max-autotune take a candidate by its name, whatever the timings; returns which were timed, a set a choice."""

    def take(winner: str) -> list[set[str]]:
        timed: list[set[str]] = []

        def choose(timings: dict[str, float], *rest: Any) -> tuple[str, dict[str, float]]:
            timed.append(set(timings))
            return winner, {}

        monkeypatch.setattr(profit, "choose", choose)
        return timed

    return take


@pytest.fixture
def cpu_kernel(implement_on_cpu: Callable[[str, Callable[..., Any]], None]) -> list[int]:
    """The list of configurations with which the pretended kernels of the norms were called."""
    calls: list[int] = []

    def pretend(kind: str, formula: Any, num_results: int, num_given: int) -> None:
        def run_out(*args: Any) -> None:
            calls.append(args[num_given])
            results = formula(*_for_formula(kind, args[:num_given]))
            for out, result in zip(args[num_given + 1 :], [results] if num_results == 1 else results):
                out.copy_(result)

        def run(*args: Any) -> Any:
            calls.append(args[-1])
            return tuple(result.contiguous() for result in formula(*args[:-1]))

        implement_on_cpu(f"{kind}_out", run_out)
        if num_results == 2:
            implement_on_cpu(f"{kind}_kernel", run)

    pretend("rms_norm", rms_norm.rms_norm_ref, 1, 6)
    pretend("layer_norm", layer_norm.layer_norm_ref, 1, 6)
    pretend("add_rms_norm", add_rms_norm.add_rms_norm_ref, 2, 7)
    pretend("add_layer_norm", add_layer_norm.add_layer_norm_ref, 2, 7)
    pretend("gated_rms_norm", gated_rms_norm.gated_rms_norm_ref, 1, 9)
    return calls


def _for_formula(kind: str, args: tuple[Any, ...]) -> list[Any]:
    """The operator's own arguments: the kernel is told the activation by a flag."""
    given = list(args)
    if kind == "gated_rms_norm":
        given[5] = "silu" if given[5] else "sigmoid"
    return given
