"""Rotary embeddings in random spellings, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.patterns.random_programs.tracing import Case, Choices

Step = Callable[..., Any]
HEADS, LENGTH, DIM = 4, 4, 8
HALF = DIM // 2


def same(t: Any, *_: Any) -> Any:
    return t


HALVES: list[Step] = [
    lambda x: (x[..., :HALF], x[..., HALF:]),
    lambda x: x.chunk(2, dim=-1),
    lambda x: torch.split(x, HALF, dim=-1),
    lambda x: (x.narrow(-1, 0, HALF), x.narrow(-1, HALF, HALF)),
]
ODD_HALVES: list[Step] = [
    lambda x: (x[..., HALF:], x[..., :HALF]),
    lambda x: (x[..., :HALF], x[..., :HALF]),
    lambda x: (x[..., ::2], x[..., 1::2]),
    lambda x: (x[..., 1 : HALF + 1], x[..., HALF:]),
]


def rotations(choose: Choices, dtype: torch.dtype) -> Case:
    """x [2, HEADS, LENGTH, DIM] rotated by cos and sin [LENGTH, DIM] in any of the forms."""
    rotate = choose(rotate_half, halves, interleaved, every_two, complex_numbers)(choose)
    widen = choose(same, lambda x: x.float())
    narrow = choose(lambda y, x: y.to(x.dtype), lambda y, x: y.type_as(x), same)
    part = choose("whole", "whole", "first", "last")
    write, extra = choose.seldom(10), choose.seldom(10)

    def program(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
        x = x * 1.0
        wide = widen(x)
        chosen = {"whole": wide, "first": wide[..., :DIM], "last": wide[..., -DIM:]}[part]
        turned = rotate(chosen, cos, sin, lambda: x.mul_(0.5) if write else None)
        if part == "first":
            turned = torch.cat([turned, wide[..., DIM:]], dim=-1)
        if part == "last":
            turned = torch.cat([wide[..., :-DIM], turned], dim=-1)
        out = narrow(turned, x)
        return (out, turned) if extra else (out,)

    width = DIM if part == "whole" else DIM + 4
    tables = choose(dtype, torch.float32)
    angles = choose.tensor(LENGTH, HALF) * 3
    if choose(True, False):
        angles = choose(torch.cat([angles, angles], -1), angles.repeat_interleave(2, -1), choose.tensor(LENGTH, DIM))
    else:
        angles = torch.cat([angles, angles], -1)
    x = choose.tensor(2, HEADS, LENGTH, width, dtype=dtype)
    return program, [x, angles.cos().to(tables), angles.sin().to(tables)]


def rotate_half(choose: Choices) -> Step:
    split = choose(*HALVES, wrong=ODD_HALVES)
    join = choose(
        lambda a, b: torch.cat((-b, a), dim=-1),
        lambda a, b: torch.cat([b.neg(), a], -1),
        lambda a, b: torch.cat([b * -1, a], -1),
        wrong=[
            lambda a, b: torch.cat((b, a), dim=-1),
            lambda a, b: torch.cat((b, -a), dim=-1),
            lambda a, b: torch.cat((-b, a), dim=-2),
            lambda a, b: torch.cat((-a, b), dim=-1),
            lambda a, b: torch.stack((-b, a), dim=-1).flatten(-2),
        ],
    )
    total = choose(
        lambda x, r, c, s: x * c + r * s,
        lambda x, r, c, s: r * s + x * c,
        lambda x, r, c, s: (x * c) + (s * r),
        wrong=[
            lambda x, r, c, s: x * c - r * s,
            lambda x, r, c, s: x * s + r * c,
            lambda x, r, c, s: x * c + r * c,
            lambda x, r, c, s: r * c + r * s,
        ],
    )

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Step) -> Tensor:
        a, b = split(x)
        rotated = join(a, b)
        at()
        return total(x, rotated, cos, sin)  # type: ignore[no-any-return]

    return rotate


def _pairs(choose: Choices) -> Step:
    """The two halves of the result, from those of x, cos and sin."""
    return choose(  # type: ignore[no-any-return]
        lambda a, b, c, s: (a * c - b * s, b * c + a * s),
        lambda a, b, c, s: (a * c - b * s, a * s + b * c),
        lambda a, b, c, s: (c * a - s * b, s * a + c * b),
        wrong=[
            lambda a, b, c, s: (a * c + b * s, b * c - a * s),
            lambda a, b, c, s: (a * c - b * s, b * c - a * s),
            lambda a, b, c, s: (a * s - b * c, b * c + a * s),
            lambda a, b, c, s: (a * c - a * s, b * c + b * s),
            lambda a, b, c, s: (a * c - b * s, b * s + a * c),
            lambda a, b, c, s: (b * c + a * s, a * c - b * s),
        ],
    )


def halves(choose: Choices) -> Step:
    split, pairs = choose(*HALVES, wrong=ODD_HALVES), _pairs(choose)
    join = choose(
        lambda p: torch.cat(p, dim=-1),
        wrong=[lambda p: torch.stack(p, dim=-1).flatten(-2), lambda p: torch.cat(p, -2)],
    )

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Step) -> Tensor:
        a, b = split(x)
        at()
        return join(pairs(a, b, cos[..., :HALF], sin[..., :HALF]))  # type: ignore[no-any-return]

    return rotate


def interleaved(choose: Choices) -> Step:
    split = choose(
        lambda x: (x[..., ::2], x[..., 1::2]),
        lambda x: x.unflatten(-1, (HALF, 2)).unbind(-1),
        lambda x: (x.unflatten(-1, (-1, 2))[..., 0], x.unflatten(-1, (-1, 2))[..., 1]),
        wrong=[lambda x: x.unflatten(-1, (2, HALF)).unbind(-2), lambda x: (x[..., 1::2], x[..., ::2])],
    )
    pairs = _pairs(choose)
    join = choose(
        lambda p: torch.stack(p, dim=-1).flatten(-2),
        lambda p: torch.stack(p, -1).flatten(3),
        wrong=[lambda p: torch.cat(p, -1), lambda p: torch.stack(p, dim=-2).flatten(-2)],
    )
    table = choose(lambda t: t[..., :HALF], lambda t: t[..., ::2], wrong=[lambda t: t[:1, :HALF]])

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Step) -> Tensor:
        a, b = split(x)
        at()
        return join(pairs(a, b, table(cos), table(sin)))  # type: ignore[no-any-return]

    return rotate


def every_two(choose: Choices) -> Step:
    turn = choose(
        lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2),
        wrong=[
            lambda x: torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2),
            lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2),
            lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1),
        ],
    )
    spread = choose(
        lambda t: t,
        lambda t: t[..., :HALF].repeat_interleave(2, -1),
        lambda t: torch.stack([t[..., :HALF]] * 2, -1).flatten(-2),
    )

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Step) -> Tensor:
        turned = turn(x)
        at()
        return x * spread(cos) + turned * spread(sin)

    return rotate


def complex_numbers(choose: Choices) -> Step:
    multiply = choose(lambda z, f: z * f, lambda z, f: f * z, wrong=[lambda z, f: z * f.conj(), lambda z, f: z + f])
    back = choose(lambda y: torch.view_as_real(y).flatten(-2), wrong=[lambda y: torch.view_as_real(y).mT.flatten(-2)])

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Step) -> Tensor:
        z = torch.view_as_complex(x.float().unflatten(-1, (HALF, 2)).contiguous())
        at()
        return back(multiply(z, torch.complex(cos[..., :HALF].float(), sin[..., :HALF].float())))  # type: ignore[no-any-return]

    return rotate
