"""Gated MLPs in random spellings, right and wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.random_programs.tracing import Case, Choices

Step = Callable[..., Any]
TOKENS = DIM = HIDDEN = 4


def same(t: Any, *_: Any) -> Any:
    return t


ACTIVATIONS: list[Step] = [
    F.silu,
    lambda g: g * torch.sigmoid(g),
    F.gelu,
    lambda g: F.gelu(g, approximate="tanh"),
    lambda g: 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0)))),
    lambda g: g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0))),
    torch.sigmoid,
    F.relu,
    lambda g: F.relu(g) ** 2,
    lambda g: F.relu(g).square(),
    lambda g: g * torch.sigmoid(1.702 * g),
    lambda g: F.silu(g.float()).to(g.dtype),
]
ODD_ACTIVATIONS: list[Step] = [
    lambda g: F.silu(g * 2.0),
    lambda g: F.silu(g, inplace=True),
    lambda g: g * torch.sigmoid(-g),
    lambda g: 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044 * torch.pow(g, 3.0)))),
    lambda g: 0.5 * g * (1.0 + torch.tanh(0.8 * (g + 0.044715 * torch.pow(g, 2.0)))),
    lambda g: g * 0.5 * (1.0 + torch.erf(g)),
    lambda g: g * torch.sigmoid(1.5 * g),
    lambda g: F.relu(g) ** 3,
    lambda g: F.silu(g).bfloat16().to(g.dtype),
    torch.tanh,
    lambda g: F.silu(g) + 1.0,
    lambda g: F.silu(g).mT,
]


def gates(choose: Choices, dtype: torch.dtype) -> Case:
    """down(activation(gate) * up) over separate or packed projections."""
    activation = choose(*ACTIVATIONS, wrong=ODD_ACTIVATIONS)
    multiply = choose(
        lambda a, u: a * u,
        lambda a, u: u * a,
        lambda a, u: torch.mul(a, u),
        wrong=[lambda a, u: a + u, lambda a, u: a * u[..., :1], lambda a, u: a * u[0], lambda a, u: a.mul_(u)],
    )
    split = choose(
        lambda h: h.chunk(2, dim=-1),
        lambda h: (h[..., :HIDDEN], h[..., HIDDEN:]),
        lambda h: (h[..., ::2], h[..., 1::2]),
        lambda h: torch.split(h, HIDDEN, dim=-1),
        wrong=[lambda h: (h[..., :HIDDEN], h[..., :HIDDEN]), lambda h: (h[..., 1 : HIDDEN + 1], h[..., HIDDEN:])],
    )
    packed, swapped, biased = choose(False, True), choose(False, True), choose(False, True)
    extra = choose("activation", "gate", "up") if choose.seldom(10) else ""
    write = choose("gate", "up") if choose.seldom(10) else ""
    clamp = choose(same, same, same, lambda t: t.clamp(max=1.0), lambda t: t.clamp(-1.0, 1.0))
    after = choose(same, wrong=[lambda t: t * 2.0, lambda t: t.float(), lambda t: t.mT])

    def program(x: Tensor, w: Tensor, down: Tensor, bias: Tensor) -> tuple[Any, ...]:
        if packed:
            gate, up = split(F.linear(x, w, bias if biased else None))
        else:
            gate, up = F.linear(x, w[:HIDDEN]), F.linear(x, w[HIDDEN:])
        gate, up = (up, gate) if swapped else (gate, up)
        gate, up = clamp(gate), clamp(up)
        value = activation(gate)
        if write:
            {"gate": gate, "up": up}[write].mul_(0.5)
        out = F.linear(after(multiply(value, up)).to(down.dtype), down)
        also = {"activation": value, "gate": gate, "up": up}
        return (out, also[extra]) if extra else (out,)

    shapes = ((2, TOKENS, DIM), (2 * HIDDEN, DIM), (DIM, HIDDEN), (2 * HIDDEN,))
    return program, [choose.tensor(*shape, dtype=dtype) for shape in shapes]
