"""Norms in random spellings, right and wrong: RMSNorm and LayerNorm, with residual adds, scales, offsets and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.random_programs.tracing import Case, Choices

Step = Callable[..., Any]
BATCH, LENGTH = 4, 4


def same(t: Any, *_: Any) -> Any:
    return t


SQUARE: list[Step] = [lambda h: h.pow(2), lambda h: h * h, torch.square, lambda h: h**2]
ODD_SQUARE: list[Step] = [lambda h: h**3, lambda h: h.abs(), lambda h: h * h.flip(-1), lambda h: h.pow(2.0) * 0.5]
MEAN: list[Step] = [
    lambda s: s.mean(-1, keepdim=True),
    lambda s: torch.mean(s, dim=-1, keepdim=True),
    lambda s: s.mean(-1).unsqueeze(-1),
    lambda s: s.sum(-1, keepdim=True) / 4,
]
ODD_MEAN: list[Step] = [
    lambda s: s.mean(1, keepdim=True),
    lambda s: s.mean((1, 2), keepdim=True),
    lambda s: s.mean(-1).unsqueeze(1),
    lambda s: s.sum(-1, keepdim=True),
    lambda s: s.amax(-1, keepdim=True),
]
ROOT: list[Step] = [
    lambda x, m: x * torch.rsqrt(m + 1e-2),
    lambda x, m: x * (m + 1e-2).rsqrt(),
    lambda x, m: x / torch.sqrt(m + 1e-2),
    lambda x, m: x * (m + 1e-2).pow(-0.5),
    lambda x, m: torch.rsqrt(m + 1e-2) * x,
    lambda x, m: x * torch.rsqrt(m.clamp(min=1e-2)),
]
ODD_ROOT: list[Step] = [
    lambda x, m: x * torch.rsqrt(m),
    lambda x, m: x / (m.sqrt() + 1e-2),
    lambda x, m: x * torch.rsqrt(m + 1e-2).bfloat16(),
    lambda x, m: x * (torch.rsqrt(m + 1e-2) + 0.1),
    lambda x, m: x * torch.sqrt(m + 1e-2),
    lambda x, m: x * torch.rsqrt(m.bfloat16().float() + 0.1),
    lambda x, m: x / (m + 1e-2),
    lambda x, m: x * torch.rsqrt(m + 1e-2).mT,
]
WIDEN: list[Step] = [lambda x: x.float(), same, lambda x: x.to(torch.float32)]
ODD_WIDEN: list[Step] = [lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.clone()]
AFTER: list[Step] = [
    lambda y, x, w: y * w[0],
    lambda y, x, w: w[0] * y,
    lambda y, x, w: y.to(x.dtype),
    lambda y, x, w: y.type_as(x),
    lambda y, x, w: y * (1 + w[0].float()),
    lambda y, x, w: y * (1.0 + w[0]),
    lambda y, x, w: y + w[1],
    lambda y, x, w: y * F.silu(x),
    lambda y, x, w: y * 0.5,
]
ODD_AFTER: list[Step] = [
    lambda y, x, w: y * w,
    lambda y, x, w: y * w[:, :1],
    lambda y, x, w: y * w[:1],
    lambda y, x, w: y.bfloat16(),
    lambda y, x, w: y.float() * 2.0,
    lambda y, x, w: F.silu(y) * x,
    lambda y, x, w: x * torch.sigmoid(y) * y,
    lambda y, x, w: y.mT * w[0],
    lambda y, x, w: y - w[0],
    lambda y, x, w: y * (2 + w[0]),
]
RESIDUAL: list[Step] = [same, lambda x, r: x + r, lambda x, r: r + x, lambda x, r: x + r * 0.5, lambda x, r: x + r + r]
ODD_RESIDUAL: list[Step] = [
    lambda x, r: torch.add(x, r, alpha=2),
    lambda x, r: x + r[:1],
    lambda x, r: x - r,
    lambda x, r: x + r.double(),
    lambda x, r: x + 1.0,
]
MUTATIONS: list[Step] = [lambda t: t.mul_(1.5), lambda t: t.add_(1.0), lambda t: t[..., :1].zero_()]


def rms_norms(choose: Choices, dtype: torch.dtype) -> Case:
    """x / sqrt(mean(x^2) + eps), and what may stand around it."""
    residual, gate = choose(*RESIDUAL, wrong=ODD_RESIDUAL), choose(same, same, lambda x, r: x * F.silu(r))
    widen, again = choose(*WIDEN, wrong=ODD_WIDEN), choose("shared", "shared", "again", "narrow")
    square, mean = choose(*SQUARE, wrong=ODD_SQUARE), choose(*MEAN, wrong=ODD_MEAN)
    root, after = choose(*ROOT, wrong=ODD_ROOT), choose.several(3, *AFTER, wrong=ODD_AFTER)
    write, mutate, returned = choose.seldom(10), choose(*MUTATIONS), choose(False, True)

    def program(x: Tensor, r: Tensor, w: Tensor) -> tuple[Any, ...]:
        x = residual(x * 1.0, r)
        h = widen(gate(x, r))
        m = mean(square(h))
        if write:
            mutate(x)
        y = root({"shared": h, "again": widen(x), "narrow": x}[again], m)
        for step in after:
            y = step(y, x, w)
        return (y, x) if returned else (y,)

    return program, _inputs(choose, dtype)


VARIANCE: list[Step] = [
    lambda h, c: (c * c).mean(-1, keepdim=True),
    lambda h, c: c.pow(2).mean(-1, keepdim=True),
    lambda h, c: h.var(-1, keepdim=True, unbiased=False),
    lambda h, c: torch.var(h, dim=-1, keepdim=True, correction=0),
]
ODD_VARIANCE: list[Step] = [
    lambda h, c: h.var(-1, keepdim=True),
    lambda h, c: (h * h).mean(-1, keepdim=True),
    lambda h, c: h.var(1, keepdim=True, unbiased=False),
    lambda h, c: (h * h).mean(-1, keepdim=True) - h.mean(-1, keepdim=True) ** 2,
    lambda h, c: h.std(-1, keepdim=True, unbiased=False),
]
CENTRE: list[Step] = [lambda h: h - h.mean(-1, keepdim=True), lambda h: h - torch.mean(h, -1, True)]
ODD_CENTRE: list[Step] = [same, lambda h: h + h.mean(-1, keepdim=True), lambda h: h - h.mean(1, keepdim=True)]


def layer_norms(choose: Choices, dtype: torch.dtype) -> Case:
    """(x - mean) / sqrt(var + eps), written out."""
    residual, widen = choose(*RESIDUAL, wrong=ODD_RESIDUAL), choose(*WIDEN, wrong=ODD_WIDEN)
    centre, variance = choose(*CENTRE, wrong=ODD_CENTRE), choose(*VARIANCE, wrong=ODD_VARIANCE)
    root, after = choose(*ROOT, wrong=ODD_ROOT), choose.several(3, *AFTER, wrong=ODD_AFTER)
    write, mutate, returned = choose.seldom(10), choose(*MUTATIONS), choose(False, True)

    def program(x: Tensor, r: Tensor, w: Tensor) -> tuple[Any, ...]:
        x = residual(x * 1.0, r)
        h = widen(x)
        c = centre(h)
        var = variance(h, c)
        if write:
            mutate(x)
        y = root(c, var)
        for step in after:
            y = step(y, x, w)
        return (y, x) if returned else (y,)

    return program, _inputs(choose, dtype)


def norm_calls(choose: Choices, dtype: torch.dtype) -> Case:
    """torch's own norms, with any of their arguments, and what may stand around them."""
    residual, widen = choose(*RESIDUAL, wrong=ODD_RESIDUAL), choose(*WIDEN, wrong=ODD_WIDEN)
    size = BATCH
    norm = choose(
        lambda h, w: F.layer_norm(h, (size,), w[0].to(h.dtype), w[1].to(h.dtype), 1e-3),
        lambda h, w: F.layer_norm(h, (size,), w[0].to(h.dtype)),
        lambda h, w: F.layer_norm(h, (size,)),
        lambda h, w: F.rms_norm(h, (size,), w[0].to(h.dtype), 1e-3),
        lambda h, w: F.rms_norm(h, (size,)),
        wrong=[
            lambda h, w: F.layer_norm(h, (size, size)),
            lambda h, w: F.rms_norm(h, (size, size), eps=1e-3),
            lambda h, w: F.layer_norm(h.mT, (size,)).mT,
        ],
    )
    after = choose.several(2, *AFTER, wrong=ODD_AFTER)
    write, mutate, returned = choose.seldom(10), choose(*MUTATIONS), choose(False, True)

    def program(x: Tensor, r: Tensor, w: Tensor) -> tuple[Any, ...]:
        x = residual(x * 1.0, r)
        y = norm(widen(x), w)
        if write:
            mutate(x)
        for step in after:
            y = step(y, x, w)
        return (y, x) if returned else (y,)

    return program, _inputs(choose, dtype)


def _inputs(choose: Choices, dtype: torch.dtype) -> list[Tensor]:
    """Every size equal, so that any axis and any broadcast is valid and a proof that leans on sizes alone is caught."""
    weight = choose(dtype, dtype, torch.float32)
    shape = (BATCH, LENGTH, BATCH)
    return [choose.tensor(*shape, dtype=dtype), choose.tensor(*shape, dtype=dtype), choose.tensor(4, 4, dtype=weight)]
