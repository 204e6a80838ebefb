"""Values to try a site on: ordinary ones, and those that show where two computations part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.shadow_source import CannotRun, concrete, sizes_and_strides

SEED = 20_240_607


@dataclass(frozen=True, slots=True)
class Case:
    """scale: of normally distributed numbers. hidden: whether masks hide much; hidden_row: also a row altogether.

    not_a_number: plants a NaN into each tensor of floats. gradients: whether they are compared too.
    """

    name: str
    scale: float = 1.0
    hidden: bool = False
    hidden_row: bool = False
    not_a_number: bool = False
    gradients: bool = True


_COMMON = (Case("random"), Case("tiny", scale=1e-3), Case("zeros", scale=0.0))
# A NaN spreads differently in each backend of torch's SDPA, so there is none. A backward that recomputes the softmax
# from the logarithm of its denominator, as all of them do, loses digits with large scores, and where all scores of a
# row are the lowest number (torch's own does too): hence moderate values, and no gradient there.
_ATTENTION = (
    *_COMMON,
    Case("large", scale=2.0),
    Case("masked", hidden=True),
    Case("altogether masked", hidden=True, hidden_row=True, gradients=False),
)
# Large and tiny within float16's range: a statistic squares them.
_OTHERS = (*_COMMON, Case("large", scale=30.0), Case("NaN", not_a_number=True, gradients=False))


def cases(kind: str) -> tuple[Case, ...]:
    """What a kind of site is tried on."""
    return _ATTENTION if kind == "attention" else _OTHERS


def values(leaves: Sequence[Node], masks: Sequence[Node], case: Case) -> dict[Node, Any]:
    """A value for each leaf with the sizes, strides, dtype and device of its example. Raises CannotRun.

    masks: the leaves that are added to scores or choose among them.
    """
    generator = torch.Generator().manual_seed(SEED)
    return {leaf: _value(metadata.value(leaf), leaf in masks, case, generator) for leaf in leaves}


def _value(example: Any, is_mask: bool, case: Case, generator: torch.Generator) -> Any:
    if isinstance(example, (tuple, list)):
        return type(example)(_value(item, is_mask, case, generator) for item in example)
    if not isinstance(example, Tensor):
        return concrete(example)
    if example.device.type == "meta" or example.layout != torch.strided:
        raise CannotRun(f"there are no values on {example.device}, {example.layout}")
    if type(example) is Tensor:
        return example  # a constant of the graph
    sizes, strides = sizes_and_strides(example)
    numbers = _numbers(sizes, example.dtype, is_mask, case, generator)
    result = _laid_out(numbers.to(example.dtype), sizes, strides).to(example.device)
    return _laid_out(result, sizes, strides) if result.stride() != strides else result


def _numbers(
    sizes: tuple[int, ...], dtype: torch.dtype, is_mask: bool, case: Case, generator: torch.Generator
) -> Tensor:
    if dtype == torch.bool:
        chosen = torch.rand(sizes, generator=generator) < (0.3 if case.hidden else 0.8)
        chosen = chosen.index_fill(-1, torch.tensor(0), True) if chosen.dim() else chosen
        return _without_a_row(chosen, False) if case.hidden_row else chosen
    if dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.complex64) * case.scale
    if not dtype.is_floating_point:
        # Indices: what they index is not known, so only what nearly everything has.
        return torch.arange(max(1, torch.Size(sizes).numel())).remainder(2)[: torch.Size(sizes).numel()].view(sizes)
    numbers = torch.randn(sizes, generator=generator)
    if is_mask:
        if case.hidden:
            lowest = torch.finfo(dtype).min
            numbers = numbers.masked_fill(torch.rand(sizes, generator=generator) < 0.5, lowest)
            numbers = numbers.index_fill(-1, torch.tensor(0), 0.0) if numbers.dim() else numbers
        return _without_a_row(numbers, torch.finfo(dtype).min) if case.hidden_row else numbers
    numbers = numbers * case.scale
    if case.not_a_number and numbers.numel():
        numbers.view(-1)[0] = float("nan")
    return numbers


def _without_a_row(numbers: Tensor, hidden: float) -> Tensor:
    """The first row of the last dimension hidden."""
    if numbers.dim() and numbers.numel():
        numbers.view(-1, numbers.shape[-1])[0] = hidden
    return numbers


def _laid_out(numbers: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The numbers in memory of given strides; where positions share memory, as in an expanded tensor, one wins."""
    needed = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides)) if numbers.numel() else 0
    memory = numbers.new_zeros(needed)
    if numbers.numel():
        shared = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
        memory.as_strided(sizes, strides)[shared] = numbers[shared]
    return memory.as_strided(sizes, strides)


def floats(values: Mapping[Node, Any]) -> dict[Node, Any]:
    """The values with every tensor of floats in float64, of complex numbers in complex128."""

    def wide(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(wide(item) for item in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double()
        if isinstance(value, Tensor) and value.is_complex():
            return value.detach().to(torch.complex128)
        return value

    return {leaf: wide(value) for leaf, value in values.items()}
