"""Attention in random spellings, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.random_programs.tracing import Case, Choices

Step = Callable[..., Any]


def same(t: Any, *_: Any) -> Any:
    return t


def calls(choose: Choices, dtype: torch.dtype) -> Case:
    """Attention over heads [B, H, S, D], with K/V heads repeated or not; all sizes equal, or all different."""
    equal = choose.seldom(3)
    batch, kv, group, length, keys, dim = (4, 2, 2, 4, 4, 4) if equal else (2, 2, 3, 5, 7, 8)
    if choose.seldom(4):
        length = keys
    heads = kv * group
    grouped = choose(False, True)
    prepare = [choose(same, wrong=LAYOUT) for _ in range(3)]
    repeat = choose(
        lambda t: t.repeat_interleave(group, 1),
        lambda t: t[:, :, None].expand(batch, kv, group, keys, dim).reshape(batch, heads, keys, dim),
        lambda t: torch.repeat_interleave(t, dim=1, repeats=group),
        lambda t: t.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2),
        wrong=[
            lambda t: t.repeat(1, group, 1, 1),
            lambda t: t[:, None].expand(batch, group, kv, keys, dim).reshape(batch, heads, keys, dim),
            lambda t: torch.cat([t] * group, 1),
        ],
    )
    core = choose(four_dimensions, three_dimensions, equations)(choose, batch, heads, length, keys, dim)
    write, place = (choose("q", "k", "v", "mask"), choose(0, 1, 2)) if choose.seldom(10) else ("", 0)
    mutate = choose(lambda t: t.add_(0.5), lambda t: t.mul_(1.5), lambda t: t.zero_(), lambda t: t[..., :1].add_(1.0))

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor) -> tuple[Any, ...]:
        tensors = {"q": q * 1.0, "k": k * 1.0, "v": v * 1.0, "mask": mask * 1.0}

        def at(position: int) -> None:
            if write and position == place:
                mutate(tensors[write])

        q, k, v = (step(tensors[name]) for step, name in zip(prepare, "qkv"))
        at(0)
        if grouped:
            k, v = repeat(k), repeat(v)
        return core(q, k, v, tensors["mask"], allowed, at)  # type: ignore[no-any-return]

    own = kv if grouped else heads
    shapes = [(batch, heads, length, dim), (batch, own, keys, dim), (batch, own, keys, dim)]
    mask_shape = choose((batch, 1, length, keys), (length, keys), (1, heads, length, keys), (batch, 1, 1, keys))
    allowed = choose.tensor(*mask_shape) > choose(-0.5, -9.0, 0.8)
    if not choose.seldom(6):
        allowed = allowed | (torch.arange(keys) == 0)
    tensors = [choose.tensor(*shape, dtype=dtype) for shape in (*shapes, mask_shape)]
    return program, [*tensors, allowed]


LAYOUT: list[Step] = [
    lambda t: t.contiguous(),
    lambda t: t.mT,
    lambda t: t.permute(2, 1, 0, 3),
    lambda t: t.transpose(0, 1).float().transpose(1, 2),
    lambda t: t.double().float(),
    lambda t: t * 0.5,
    lambda t: t.flip(2),
    lambda t: F.dropout(t, 0.3, training=False),
]
SCALES: list[Step] = [
    lambda s, m, a: s * 0.3,
    lambda s, m, a: s / 2.0,
    lambda s, m, a: torch.mul(s, 0.7),
    lambda s, m, a: 0.4 * s,
    lambda s, m, a: s.div(3.0),
]
MASKS: list[Step] = [
    lambda s, m, a: s + m,
    lambda s, m, a: m + s,
    lambda s, m, a: s.add(m),
    lambda s, m, a: s + torch.where(a, 0.0, float("-inf")),
    lambda s, m, a: s + torch.where(a, 0.0, torch.finfo(torch.float32).min).to(s.dtype),
    lambda s, m, a: s + (1.0 - a.float()) * -1e9,
    lambda s, m, a: s.masked_fill(~a, float("-inf")),
    lambda s, m, a: s.masked_fill(a == 0, -1e9),
    lambda s, m, a: s.masked_fill(a.logical_not(), torch.finfo(torch.float32).min),
    lambda s, m, a: torch.where(a, s, float("-inf")),
    lambda s, m, a: torch.where(~a, -1e30, s),
    lambda s, m, a: 5.0 * torch.tanh(s / 5.0),
    lambda s, m, a: torch.tanh(s * 0.5) * 2.0,
]
ODD_SCORES: list[Step] = [
    lambda s, m, a: s + m[..., :1],
    lambda s, m, a: s - m,
    lambda s, m, a: torch.add(s, m, alpha=2),
    lambda s, m, a: s.masked_fill(~a, -1.0),
    lambda s, m, a: s.masked_fill(a, float("-inf")),
    lambda s, m, a: s.masked_fill(~a, 0.0),
    lambda s, m, a: torch.where(a, s, m),
    lambda s, m, a: torch.where(a, s * 2.0, s),
    lambda s, m, a: s.bfloat16().float(),
    lambda s, m, a: s.mT,
    lambda s, m, a: s.mul_(0.7),
    lambda s, m, a: s * m.flatten()[0],
    lambda s, m, a: s * m,
    lambda s, m, a: torch.tanh(s),
    lambda s, m, a: torch.tanh(s / 5.0) * 3.0,
    lambda s, m, a: s.relu(),
    lambda s, m, a: s.softmax(-1),
    lambda s, m, a: s.abs(),
]
SOFTMAX: list[Step] = [
    lambda s: s.softmax(-1),
    lambda s: torch.softmax(s, dim=-1),
    lambda s: F.softmax(s, dim=-1, dtype=torch.float32),
    lambda s: F.softmax(s.float(), dim=-1),
    lambda s: torch.exp(s - s.amax(-1, keepdim=True)) / torch.exp(s - s.amax(-1, keepdim=True)).sum(-1, keepdim=True),
]
ODD_SOFTMAX: list[Step] = [
    lambda s: torch.softmax(s, -2),
    lambda s: F.softmax(s, dim=1),
    lambda s: s.sigmoid(),
    lambda s: s.log_softmax(-1),
    lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    lambda s: s / s.sum(-1, keepdim=True),
    lambda s: s.softmax(-1) + 0.1,
]
WEIGHTS: list[Step] = [
    lambda p, v: p.to(v.dtype),
    lambda p, v: p.type_as(v),
    lambda p, v: F.dropout(p.to(v.dtype), 0.0),
]
ODD_WEIGHTS: list[Step] = [
    lambda p, v: p.to(v.dtype).mT,
    lambda p, v: (p * 2.0).to(v.dtype),
    lambda p, v: p.bfloat16().to(v.dtype),
    lambda p, v: p.to(v.dtype).flip(-1),
    lambda p, v: torch.nan_to_num(p.to(v.dtype)),
]


def around(choose: Choices) -> Callable[[Step, Step, Tensor, Tensor, Tensor, Step], tuple[Any, ...]]:
    """What happens between the two products."""
    steps = [*choose.several(2, *SCALES), *choose.several(2, *MASKS, wrong=ODD_SCORES), *choose.several(1, *SCALES)]
    softmax, weights = choose(*SOFTMAX, wrong=ODD_SOFTMAX), choose(*WEIGHTS, wrong=ODD_WEIGHTS)
    extra = choose("scores", "probabilities", "middle") if choose.seldom(12) else ""
    widen = choose(same, same, lambda s: s.float())

    def run(product: Step, weighted: Step, v: Tensor, mask: Tensor, allowed: Tensor, at: Step) -> tuple[Any, ...]:
        scores = product()
        at(1)
        inner = widen(scores)
        for step in steps:
            inner = step(inner, mask, allowed)
        p = softmax(inner)
        at(2)
        out = weighted(weights(p, v))
        also = {"scores": scores, "probabilities": p, "middle": inner}
        return (out, also[extra]) if extra else (out,)

    return run


def four_dimensions(choose: Choices, batch: int, heads: int, length: int, keys: int, dim: int) -> Step:
    transpose = choose(
        lambda k: k.mT,
        lambda k: k.transpose(-2, -1),
        lambda k: k.permute(0, 1, 3, 2),
        wrong=[same, lambda k: k.swapaxes(1, 3), lambda k: k.permute(1, 0, 3, 2)],
    )
    multiply = choose(torch.matmul, lambda a, b: a @ b, lambda a, b: a.matmul(b), wrong=[lambda a, b: b @ a])
    scaled = choose(same, same, lambda t: t * 0.5, lambda t: t / 3.0)
    end = choose(same, lambda o: o.transpose(1, 2), lambda o: o.transpose(1, 2).reshape(batch, length, heads * dim))
    run = around(choose)

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor, at: Step) -> tuple[Any, ...]:
        out, *rest = run(lambda: multiply(scaled(q), transpose(k)), lambda p: p @ v, v, mask, allowed, at)
        return (end(out), *rest)

    return core


def three_dimensions(choose: Choices, batch: int, heads: int, length: int, keys: int, dim: int) -> Step:
    fold = choose(
        lambda t: t.flatten(0, 1),
        lambda t, n=dim: t.reshape(batch * heads, -1, n),
        wrong=[lambda t: t.transpose(0, 1).flatten(0, 1), lambda t: t.transpose(1, 2).reshape(batch * heads, -1, dim)],
    )
    product = choose(
        lambda q, k, m: torch.bmm(q, k.mT),
        lambda q, k, m: q @ k.transpose(1, 2),
        lambda q, k, m: torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0.0, alpha=0.3),
        wrong=[
            lambda q, k, m: torch.bmm(q, k.transpose(0, 2)),
            lambda q, k, m: torch.baddbmm(q.new_ones(1, 1, 1), q, k.mT, beta=2.0, alpha=0.3),
        ],
    )
    wide = choose(same, lambda s: s.view(batch, heads, length, keys))
    run = around(choose)

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor, at: Step) -> tuple[Any, ...]:
        q, k, v = fold(q), fold(k), fold(v)

        def back(p: Tensor) -> Tensor:
            return torch.bmm(p.reshape(batch * heads, length, keys), v).view(batch, heads, length, dim)

        return run(lambda: wide(product(q, k, mask)), back, v, mask, allowed, at)  # type: ignore[no-any-return]

    return core


def equations(choose: Choices, batch: int, heads: int, length: int, keys: int, dim: int) -> Step:
    first = choose(
        "bhsd,bhtd->bhst",
        "nhqc,nhkc->nhqk",
        "...qd,...kd->...qk",
        wrong=["bhsd,bhdt->bhst", "bhsd,bhtd->bhts", "bhsd,bgtd->bhst", "bhsd,bhtd->hbst", "bhsd,bhsd->bhs"],
    )
    second = choose(
        "bhst,bhtd->bhsd",
        "bhst,bhtd->bshd",
        wrong=["bhts,bhtd->bhsd", "bhst,bhsd->bhtd", "bhst,bhtd->bhds", "bhst,bhtd->bhd"],
    )
    run = around(choose)

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor, at: Step) -> tuple[Any, ...]:
        return run(  # type: ignore[no-any-return]
            lambda: torch.einsum(first, q, k), lambda p: torch.einsum(second, p, v), v, mask, allowed, at
        )

    return core


def sdpa(choose: Choices, dtype: torch.dtype) -> Case:
    """Calls of scaled_dot_product_attention with random arguments."""
    batch, kv, group, length, keys, dim = (2, 2, 2, 4, 4, 8) if choose.seldom(2) else (2, 1, 4, 3, 6, 8)
    heads, grouped = kv * group, choose(False, True)
    causal, masked = choose(False, True), choose("", "float", "bool")
    scale = choose(None, 0.3, wrong=[0.0, -0.5])
    steps = [choose(same, wrong=LAYOUT) for _ in range(3)]

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor) -> tuple[Any, ...]:
        q, k, v = (step(t) for step, t in zip(steps, (q, k, v)))
        chosen = {"": None, "float": mask, "bool": allowed}[masked]
        return (
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=chosen, is_causal=causal and not masked, scale=scale, enable_gqa=grouped
            ),
        )

    own = kv if grouped else heads
    shapes = [(batch, heads, length, dim), (batch, own, keys, dim), (batch, own, keys, dim)]
    mask_shape = choose(
        (batch, 1, length, keys), (length, keys), (1, heads, length, keys), (1, keys), (batch, 1, 1, keys)
    )
    tensors = [choose.tensor(*shape, dtype=dtype) for shape in (*shapes, mask_shape)]
    return program, [*tensors, choose.tensor(*mask_shape) > choose(-0.5, 0.8)]
