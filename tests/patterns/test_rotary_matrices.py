"""Rotations by matrices of two by two: the spellings that are recognised, and matrices that turn nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

BATCH, HEADS, LENGTH, DIM = 2, 3, 5, 8
Function = Callable[[Tensor, Tensor], Tensor]


def apply(x: Tensor, turns: Tensor) -> Tensor:
    """Flux: turns [..., T, D / 2, 2, 2]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    out = turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]
    return out.reshape(*x.shape).type_as(x)


def stacked(angles: Tensor) -> Tensor:
    parts = [torch.cos(angles), -torch.sin(angles), torch.sin(angles), torch.cos(angles)]
    return torch.stack(parts, dim=-1).unflatten(-1, (2, 2))


def flux(x: Tensor, angles: Tensor) -> Tensor:
    return apply(x, stacked(angles)[None].unsqueeze(1))


def of_one_cosine(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    rows = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return apply(x, rows)


def of_axes(x: Tensor, angles: Tensor) -> Tensor:
    first, second = angles.split([1, DIM // 2 - 1], dim=-1)
    return apply(x, torch.cat((stacked(first), stacked(second)), dim=-3)[None, None])


def columns_apart(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().unflatten(-1, (-1, 2))[..., None].unbind(-2)
    out = torch.stack((-sin, cos), -1) * second + first * torch.stack((cos, sin), -1)
    return out.flatten(-2).type_as(x)


def backwards(x: Tensor, angles: Tensor) -> Tensor:
    return apply(x, stacked(angles).transpose(-1, -2))


SPELLINGS = (flux, of_one_cosine, of_axes, columns_apart, backwards)


def inputs(dtype: torch.dtype = torch.float32, training: bool = False) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype, requires_grad=training), torch.randn(LENGTH, DIM // 2)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", SPELLINGS)
def test_spellings(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    x, angles = inputs(dtype, training)
    for tensor, dim in ((x, 3), (angles, 1)):
        torch._dynamo.mark_static(tensor, dim)
    captured = capture(function, x, angles, training=training, dynamic=dynamic)
    assert captured.refusals == []
    assert captured.counts == {"rope": 1}
    assert captured.spellings[0].startswith("interleaved, matrices")
    assert_same_results(captured, training)


def test_gradients_of_the_angles() -> None:
    x, angles = inputs(training=True)
    captured = capture(flux, x, angles.requires_grad_(), training=True)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured, training=True)


def test_nothing_is_rounded_otherwise() -> None:
    captured = capture(flux, *inputs(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"rope": 1}
    before, after = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    assert torch.equal(before[0], after[0])


def test_one_table_serves_many() -> None:
    def both(x: Tensor, angles: Tensor) -> Tensor:
        turns = stacked(angles)
        return apply(x, turns) @ apply(x + 1, turns).mT

    captured = capture(both, *inputs())
    assert captured.counts == {"rope": 2}
    assert_same_results(captured)


def same_sign(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    return apply(x, torch.stack((cos, sin, sin, cos), -1).unflatten(-1, (2, 2)))


def other_angles(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    return apply(x, torch.stack((cos, -sin, sin, (2 * angles).cos()), -1).unflatten(-1, (2, 2)))


def other_rows(x: Tensor, angles: Tensor) -> Tensor:
    turns = stacked(angles)
    return apply(x, torch.stack((turns[..., 0], turns.flip(0)[..., 1]), -1))


def written_to(x: Tensor, angles: Tensor) -> Tensor:
    turns = stacked(angles)
    turns[..., 1, 1] = 0.0
    return apply(x, turns)


def pairs_crossed(x: Tensor, angles: Tensor) -> Tensor:
    turns = stacked(angles)
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
    out = turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs.flip(-3)[..., 1]
    return out.flatten(-2)


def of_two_tensors(x: Tensor, angles: Tensor) -> Tensor:
    turns, pairs = stacked(angles), x.unflatten(-1, (-1, 1, 2))
    return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * (pairs + 1)[..., 1]).flatten(-2)


@pytest.mark.parametrize("function", [same_sign, other_angles, other_rows, written_to, pairs_crossed, of_two_tensors])
def test_other_matrices_are_left_alone(function: Function) -> None:
    captured = capture(function, *inputs())
    assert captured.counts == {}
    assert_same_results(captured)


def test_matrices_from_outside_are_refused() -> None:
    captured = capture(apply, inputs()[0], torch.randn(LENGTH, DIM // 2, 2, 2))
    assert captured.counts == {}
    assert captured.refusals == ["the matrices are not proven to be (cos, -sin; sin, cos)"]
