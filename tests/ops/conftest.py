"""What tests of CUDA kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from infuse.ops import library


@pytest.fixture
def kernels() -> Iterator[None]:
    """The compiled kernels must be there, and a fault belongs to the test that caused it."""
    reason = library.missing(torch.device("cuda"))
    assert not reason, f"these tests need the compiled kernels: {reason}"
    yield
    torch.cuda.synchronize()
