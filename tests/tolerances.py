"""Where every tolerance of the tests comes from."""

from __future__ import annotations

import torch
from torch import Tensor


def error(got: Tensor, reference: Tensor) -> float:
    """||got - reference|| / ||reference|| in float64; absolute where the reference is zero. NaN is never small."""
    got, reference = got.detach().double(), reference.detach().double()
    difference = torch.linalg.vector_norm(got - reference)
    norm = torch.linalg.vector_norm(reference)
    return float(difference / norm) if norm > 0 else float(difference)


def rounding(dtype: torch.dtype) -> float:
    """The relative error of rounding once to a dtype: half an ulp, eps / 2."""
    return torch.finfo(dtype).eps / 2


def assert_close_to_fp64(got: Tensor, eager: Tensor, reference: Tensor, *, factor: float = 2.0) -> None:
    """Asserts that `got` is about as near to the float64 reference as the eager computation in the same dtype is.

    A rewrite rounds in other places than the source but no oftener, so its error is of the size of the eager one's; the
    factor allows for the two errors being independent draws. Eager may be exact by luck: one rounding is always
    granted, and for float32, where the order of summation matters more than rounding, the errors of a few operations.
    """
    assert got.dtype == eager.dtype, f"got {got.dtype}, expected {eager.dtype}"
    assert got.shape == eager.shape, f"got {tuple(got.shape)}, expected {tuple(eager.shape)}"
    granted = rounding(got.dtype) * (64 if got.dtype in (torch.float32, torch.float64) else 2)
    bound = max(factor * error(eager, reference), granted)
    actual = error(got, reference)
    assert actual <= bound, f"error against float64: got {actual:.3g}, expected at most {bound:.3g}"
