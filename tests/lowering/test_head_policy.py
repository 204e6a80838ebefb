"""Where the loss of a language model's head runs in chunks, and where its formula stands instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infuse.lowering import head_policy
from infuse.ops import library
from infuse.settings import Settings

CHUNKS = "kernel, in chunks of rows"


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is placed for rows, D and V, as on an H200."""
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "capability", lambda device: (9, 0))

    def place(
        *sizes: int, training: bool = True, dtype: torch.dtype = torch.bfloat16, **settings: Any
    ) -> tuple[str, str]:
        rows, dim, vocab = sizes
        with FakeTensorMode():
            x, weight = torch.empty(2, rows // 2, dim, dtype=dtype), torch.empty(vocab, dim, dtype=dtype)
        placement = head_policy.place((x, weight, None), training, Settings(**settings))
        return placement.overload, placement.kernel

    return place


def test_large_logits_run_in_chunks(placed: Any) -> None:
    assert placed(8192, 4096, 128256) == ("default", f"{CHUNKS}, with the gradients")
    assert placed(8192, 4096, 128256, training=False, dtype=torch.float16) == ("default", CHUNKS)


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((1024, 4096, 128256), {}, "the logits of 1024 rows are small"),
        ((2048, 4096, 4096), {}, "the logits of 2048 rows are small"),
        ((8192, 4096, 128256), {"dtype": torch.float16}, "float16 gradients need the loss's scale"),
        ((8192, 4096, 128256), {"dtype": torch.float32}, "not measured in float32"),
        ((8192, 4096, 128256), {"dtype": torch.float64}, "no cross entropy kernel for torch.float64"),
        ((8192, 4096, 128256), {"numerics": "exact"}, "chunks round the weight's gradient more than once"),
    ],
)
def test_formula_elsewhere(sizes: tuple[int, ...], options: dict[str, Any], reason: str, placed: Any) -> None:
    assert placed(*sizes, **options) == ("inline", f"decomposition ({reason})")


def test_kernels_always(placed: Any) -> None:
    assert placed(16, 64, 4099, dtype=torch.float32, kernels="always")[0] == "default"


def test_other_devices_are_not_measured(placed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "capability", lambda device: (8, 0))
    assert placed(8192, 4096, 128256) == ("inline", "decomposition (not measured on this device)")
