"""Random compositions of right and wrong steps: whatever is rewritten has to give the source's results.

All sizes are equal, so that every transposition and broadcast is valid and a proof that leans on sizes alone is caught.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.capture import assert_same_results, capture

SIZE, KV = 4, 2
GROUP = SIZE // KV
PROGRAMS = 40
Step = Callable[..., Any]


def same(t: Tensor) -> Tensor:
    return t


def menu(*often: Step, rarely: Sequence[Step] = ()) -> Sequence[Step]:
    """Steps to draw from; those in `rarely` come once for every four of the others."""
    return [*often * (4 * max(1, len(rarely)) // len(often) + 1), *rarely]


HEADS = menu(
    lambda t: t.repeat_interleave(GROUP, 1),
    lambda t: t[:, :, None].expand(SIZE, KV, GROUP, SIZE, SIZE).reshape(SIZE, SIZE, SIZE, SIZE),
    lambda t: t.transpose(1, 2).repeat_interleave(GROUP, 2).transpose(1, 2),
    rarely=[
        lambda t: t.repeat(1, GROUP, 1, 1),
        lambda t: t[:, None].expand(SIZE, GROUP, KV, SIZE, SIZE).reshape(SIZE, SIZE, SIZE, SIZE),
        lambda t: torch.cat([t, t], 1),
    ],
)
LAYOUT = menu(
    same,
    rarely=[
        lambda t: t.contiguous(),
        lambda t: t.mT,
        lambda t: t.permute(2, 1, 0, 3),
        lambda t: t.transpose(0, 1).float().transpose(1, 2),
        lambda t: t.double().float(),
        lambda t: t * 0.5,
        lambda t: F.dropout(t, 0.3, training=False),
    ],
)
TRANSPOSE = menu(
    lambda k: k.mT,
    lambda k: k.transpose(2, 3),
    rarely=[same, lambda k: k.permute(0, 2, 3, 1), lambda k: k.swapaxes(1, 3), lambda k: k.permute(1, 0, 3, 2)],
)
SCORES = menu(
    lambda s, m: s * 0.3,
    lambda s, m: s / 2.0,
    lambda s, m: s + m,
    lambda s, m: s,
    rarely=[
        lambda s, m: m[0] + s,
        lambda s, m: s + m[..., :1],
        lambda s, m: s + m.mT,
        lambda s, m: s - m,
        lambda s, m: torch.add(s, m, alpha=2),
        lambda s, m: s.masked_fill(m > 1, -1e9),
        lambda s, m: s.bfloat16().float(),
        lambda s, m: s.mT,
        lambda s, m: s.mul_(0.7),
        lambda s, m: s * m[0, 0, 0, 0],
    ],
)
SOFTMAX = menu(lambda s: s.softmax(-1), rarely=[lambda s: torch.softmax(s, 2), lambda s: F.softmax(s, 1)])
WEIGHTS = menu(same, rarely=[lambda p: p.mT, lambda p: p.bfloat16().float(), lambda p: p * 2.0])


def draw(rng: random.Random, steps: Sequence[Step], count: int = 1) -> list[Step]:
    return [rng.choice(steps) for _ in range(count)]


def attention(rng: random.Random) -> Step:
    heads, layouts, scores = draw(rng, HEADS, 2), draw(rng, LAYOUT, 3), draw(rng, SCORES, 3)
    (transpose,), (softmax,), (weights) = draw(rng, TRANSPOSE), draw(rng, SOFTMAX), draw(rng, WEIGHTS)
    grouped = rng.random() < 0.5
    write = rng.choice([None] * 8 + ["q", "k", "v"])

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = q * 1.0, k * 1.0, v * 1.0
        target = {"q": q, "k": k, "v": v}.get(write or "")
        if grouped:
            k, v = heads[0](k[:, :KV]), heads[1](v[:, :KV])
        q, k, v = (layout(t) for layout, t in zip(layouts, (q, k, v)))
        s = q @ transpose(k)
        if target is not None:
            target.add_(0.5)
        for step in scores:
            s = step(s, mask)
        return (weights[0](softmax(s)) @ v,)

    return program


SQUARE = menu(lambda h: h.pow(2), lambda h: h * h, torch.square, rarely=[lambda h: h**3, lambda h: h.abs()])
MEAN = menu(
    lambda s: s.mean(-1, keepdim=True),
    lambda s: s.mean(-1).unsqueeze(-1),
    rarely=[
        lambda s: s.mean(1, keepdim=True),
        lambda s: s.mean((1, 2), keepdim=True),
        lambda s: s.mean(-1).unsqueeze(1),
        lambda s: s.mean(-1).unsqueeze(0),
        lambda s: s.sum(-1, keepdim=True),
    ],
)
EPS = menu(lambda m: m + 1e-2, rarely=[same, lambda m: m.bfloat16().float() + 0.1, lambda m: m + 1])
FACTOR = menu(same, rarely=[lambda r: r.bfloat16(), lambda r: r + 0.1, lambda r: r.mT, lambda r: r.clone()])
WIDEN = menu(lambda x: x.float(), same, rarely=[lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.clone()])
AFTER = menu(
    lambda y, x, w: y * w[0],
    lambda y, x, w: w[0] * y,
    lambda y, x, w: y.to(x.dtype),
    lambda y, x, w: y * (1 + w[0].float()),
    rarely=[
        lambda y, x, w: y * w,
        lambda y, x, w: y * w[:, :1],
        lambda y, x, w: y * w[:1],
        lambda y, x, w: y * (1 + w[0]),
        lambda y, x, w: y.bfloat16(),
        lambda y, x, w: y.float() * 2.0,
        lambda y, x, w: F.silu(y) * x,
        lambda y, x, w: x * torch.sigmoid(y) * y,
    ],
)
RESIDUAL = menu(same, lambda x: x + x.flip(0), rarely=[lambda x: torch.add(x, x.flip(0), alpha=2), lambda x: x + x[:1]])


def norm(rng: random.Random) -> Step:
    (residual,), widen, (square,) = draw(rng, RESIDUAL), draw(rng, WIDEN, 2), draw(rng, SQUARE)
    (mean,), (eps,), (factor,) = draw(rng, MEAN), draw(rng, EPS), draw(rng, FACTOR)
    after = draw(rng, AFTER, 3)
    write, returned = rng.random() < 0.1, rng.random() < 0.5

    def program(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x = residual(x * 1.0)
        h = widen[0](x)
        r = factor(torch.rsqrt(eps(mean(square(h)))))
        if write:
            x.mul_(1.5)
        y = widen[1](x) * r
        for step in after:
            y = step(y, x, w)
        return (y, x) if returned else (y,)

    return program


def inputs(family: Callable[[random.Random], Step], dtype: torch.dtype, training: bool) -> list[Tensor]:
    shapes = [(SIZE,) * 4] * 4 if family is attention else [(SIZE,) * 3, (SIZE,) * 2]
    return [torch.randn(shape).to(dtype).requires_grad_(training) for shape in shapes]


def is_valid(program: Step, args: list[Tensor], training: bool) -> bool:
    """Whether the program runs, to finite results, and can be differentiated in spite of its writes."""
    try:
        outputs = program(*args)
        if training:
            sum(output.double().sum() for output in outputs).backward()
    except RuntimeError:
        return False
    return all(bool(output.isfinite().all()) for output in outputs)


@pytest.mark.parametrize("family", [attention, norm])
@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_rewritten_programs_give_the_sources_results(
    family: Callable[[random.Random], Step], dtype: torch.dtype, training: bool
) -> None:
    rng = random.Random(f"{family.__name__} {dtype} {training}")
    outcomes: Counter[str] = Counter()
    while outcomes.total() < PROGRAMS:
        program, args = family(rng), inputs(family, dtype, training)
        if not is_valid(program, args, training):
            continue
        captured = capture(program, *args, training=training)
        if captured.counts:
            assert_same_results(captured, training)
        outcomes["rewritten" if captured.counts else "refused" if captured.refusals else "no site"] += 1
    assert outcomes["rewritten"] >= PROGRAMS // 8
    assert outcomes["refused"] + outcomes["no site"] >= PROGRAMS // 8
