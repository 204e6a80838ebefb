"""Is the answer right: its deviation from an fp64 reference, and the bound that the eager path's own rounding sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Output = Tensor | Sequence[Tensor]
Function = Callable[..., Output]
_MANY = 1024  # elements, from which on the maximum of their errors hardly depends on luck


class WrongAnswer(RuntimeError):
    """An implementation's answer is further from the reference than rounding explains."""


def tensors(output: Output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def deviations(output: Output, reference: Output) -> list[float]:
    """For each tensor the largest |output - reference| over the root mean square of the reference; NaN gives infinity.

    A maximum, not a norm: one wrong element among millions must show.
    """
    found, expected = tensors(output), tensors(reference)
    if [t.shape for t in found] != [t.shape for t in expected]:
        shapes = [tuple(t.shape) for t in found], [tuple(t.shape) for t in expected]
        raise WrongAnswer(f"shapes: got {shapes[0]}, expected {shapes[1]}")
    return [_deviation(a, b) for a, b in zip(found, expected, strict=True)]


def _deviation(output: Tensor, reference: Tensor) -> float:
    scale = reference.double().square().mean().sqrt().item()
    assert 0 < scale < math.inf, f"a reference must be finite and not all zero, its root mean square is {scale}"
    worst = (output.double() - reference.double()).abs().max().item() / scale
    return worst if math.isfinite(worst) else math.inf


def bounds(eager: Output, reference: Output, dtype: torch.dtype, factor: float) -> list[float]:
    """The deviation that is allowed for each tensor of the answer, from the eager path in `dtype`.

    Eager rounds after each operation. A fused implementation rounds at most as often, but elsewhere: its error is
    another draw of the same size, and the maxima of two draws over many elements differ by far less than `factor`. The
    second term is the rounding of the largest element to `dtype`, which nobody avoids; of few elements (a loss) eager
    may hit the exact value by luck, so they get some units in the last place more.
    """
    allowed = []
    for error, expected in zip(deviations(eager, reference), tensors(reference), strict=True):
        wide = expected.double()
        peak = (wide.abs().max() / wide.square().mean().sqrt()).item()
        units = 0.5 if wide.numel() >= _MANY else 4.0
        allowed.append(factor * error + units * torch.finfo(dtype).eps * peak)
    return allowed


def check(name: str, output: Output, reference: Output, allowed: Sequence[float]) -> float:
    """The largest deviation of an answer. Raises WrongAnswer when one of its tensors is over its bound."""
    found = deviations(output, reference)
    for index, (error, bound) in enumerate(zip(found, allowed, strict=True)):
        if not error <= bound:
            raise WrongAnswer(
                f"{name}: output {index}: deviation {error:.3g} from the fp64 reference, allowed {bound:.3g}"
            )
    return max(found)


def poison(output: Output) -> None:
    """Fills an answer's memory with NaN, so that an element that is not written again is found."""
    for tensor in tensors(output):
        tensor.detach().fill_(float("nan"))
