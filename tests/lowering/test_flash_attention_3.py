"""FlashAttention-3 among the candidates: where it is installed and computes the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.lowering import attention_backends as backends
from infuse.lowering import decisions, inductor
from infuse.ops import library
from infuse.ops.attention import attention_ref
from tests.lowering.compiled import compiled_code

OPS = torch.ops.infuse
SCALE = 8.0**-0.5


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float]]:
    """A module with its interface, [B, T, H, D], on a device of its kind; causal and softcap of each call."""
    calls: list[tuple[bool, float]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, softcap: float) -> Tensor:
        calls.append((causal, softcap))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attention_ref(q, k, v, None, softmax_scale, causal, softcap).transpose(1, 2)

    monkeypatch.setattr(backends, "flash_3_module", lambda: SimpleNamespace(flash_attn_func=attend))
    monkeypatch.setattr(library, "capability", lambda device: (9, 0))
    return calls


def inputs(keys: int = 24, dim_v: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 4, 24, 8), (2, 2, keys, 8), (2, 2, keys, dim_v))
    q, k, v = (torch.randn(shape).bfloat16() for shape in shapes)
    return q, k, v


def candidates(monkeypatch: pytest.MonkeyPatch, tensors: tuple[Tensor, ...], *rest: Any) -> set[str]:
    """Which formulas are timed for infuse::attention(*tensors, *rest)."""
    timed: set[str] = set()

    def measure(name: str, kernels: Any, formulas: Any, *_: Any, **how: Any) -> dict[str, float]:
        timed.update(formulas)
        return dict.fromkeys(formulas, 1.0) | ({backends.FLASH_3: 0.5} if backends.FLASH_3 in formulas else {})

    monkeypatch.setattr(inductor, "measure", measure)
    # Alone, torch's choice is not timed: a second formula, so that there is something to measure.
    real = backends.inference
    monkeypatch.setattr(backends, "inference", lambda args: {**real(args), "sdpa_other": backends.default})
    decisions.clear()

    def step(*given: Tensor) -> Tensor:
        return OPS.attention(*given, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "configurations", lambda op: ())
    out, _ = compiled_code(step, *tensors, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, step(*tensors), atol=2e-2, rtol=2e-2)
    return timed


@pytest.mark.parametrize(
    ("is_causal", "softcap", "keys", "dim_v", "taken"),
    [
        (False, 0.0, 24, 8, True),
        (True, 0.0, 24, 8, True),
        (False, 5.0, 24, 8, True),
        (False, 0.0, 40, 8, True),
        (True, 0.0, 40, 8, False),  # its diagonal ends at the lower right
        (False, 0.0, 24, 16, False),
    ],
)
def test_it_competes_where_it_computes_the_same(
    installed: list[tuple[bool, float]],
    monkeypatch: pytest.MonkeyPatch,
    is_causal: bool,
    softcap: float,
    keys: int,
    dim_v: int,
    taken: bool,
) -> None:
    timed = candidates(monkeypatch, inputs(keys, dim_v), None, SCALE, is_causal, softcap)
    assert (backends.FLASH_3 in timed) == taken
    assert ((is_causal, softcap) in installed) == taken
    assert [decision.chosen == backends.FLASH_3 for decision in decisions.decisions()] == [taken]


def test_masks_and_sinks_it_does_not_know(installed: list[tuple[bool, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    assert backends.FLASH_3 not in candidates(monkeypatch, (q, k, v, torch.rand(24, 24) < 0.5), SCALE, False)
    sinks = torch.randn(4)
    assert backends.FLASH_3 not in candidates(monkeypatch, (q, k, v), None, SCALE, False, 0.0, sinks)
    assert installed == []


def test_without_it_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name} was built for another CUDA")

    backends.flash_3_module.cache_clear()
    monkeypatch.setattr(backends.importlib, "import_module", refuse)
    try:
        assert backends.flash_3_module() is None
    finally:
        backends.flash_3_module.cache_clear()
