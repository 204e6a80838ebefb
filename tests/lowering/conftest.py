"""A kernel where there is none: the operator's out variant, implemented on the CPU, so that choices can be tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from infuse.lowering import decisions
from infuse.ops import library
from infuse.ops.rms_norm import rms_norm_ref


@pytest.fixture
def cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The list of configurations with which the pretended kernel was called."""
    calls: list[int] = []

    def run(x, weight, eps, weight_offset, cast_before_weight, eps_as_minimum, config, out, rstd=None):  # type: ignore[no-untyped-def]
        calls.append(config)
        out.copy_(rms_norm_ref(x, weight, eps, weight_offset, cast_before_weight, eps_as_minimum))

    implementation = torch.library.Library("infuse", "IMPL")
    implementation.impl("rms_norm_out", run, "CPU")
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "configurations", lambda op: ("wide", "narrow"))
    decisions.clear()
    yield calls
    implementation._destroy()
