"""A decoder's MLP block, norm to residual, in random spellings, right and wrong: what larger operators take in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.random_programs.tracing import Case, Choices

Step = Callable[..., Any]
DIM, HIDDEN = 4, 6


def same(t: Any) -> Any:
    return t


SPLITS: list[Step] = [
    lambda h: h.chunk(2, dim=-1),
    lambda h: (h[..., :HIDDEN], h[..., HIDDEN:]),
    lambda h: (h[..., ::2], h[..., 1::2]),
    lambda h: torch.split(h, HIDDEN, dim=-1),
    lambda h: h.unflatten(-1, (2, HIDDEN)).unbind(-2),
    lambda h: (h.unflatten(-1, (HIDDEN, 2))[..., 0], h.unflatten(-1, (HIDDEN, 2))[..., 1]),
    lambda h: (h.tensor_split(2, -1)[0].contiguous(), h.tensor_split(2, -1)[1].contiguous()),
]
ODD_SPLITS: list[Step] = [
    lambda h: (h[..., :HIDDEN], h[..., :HIDDEN] * 1.0),
    lambda h: (h[..., 1 : HIDDEN + 1], h[..., HIDDEN:]),
    lambda h: (h[..., ::2], h[..., HIDDEN:]),
    lambda h: (h.flip(-1)[..., :HIDDEN], h[..., HIDDEN:]),
    lambda h: (h.clone()[..., :HIDDEN], h[..., HIDDEN:]),
]


def blocks(choose: Choices, dtype: torch.dtype) -> Case:
    """x + down(act(gate(norm(x))) * up(norm(x))), with readers and writes in between now and then."""
    residual_first, add_before, normed = choose(False, True), choose(False, True), choose(True, True, False)
    packed, swapped, biased = choose(False, True), choose(False, True), choose(False, True)
    split = choose(*SPLITS, wrong=ODD_SPLITS)
    act = choose(F.silu, F.gelu, lambda g: g * torch.sigmoid(g))
    weight = choose(same, same, same, wrong=[lambda w: w * 2.0, lambda w: w + 0.1])
    view = choose(same, lambda t: t.view(-1, DIM), lambda t: t.contiguous())
    between = choose(same, same, wrong=[lambda t: t * 2.0, lambda t: t.float().to(t.dtype), torch.relu])
    output = choose(same, same, wrong=[lambda t: t * 0.5, lambda t: t.flip(0)])
    extra = choose("normed", "gate", "h", "product", "sum") if choose.seldom(5) else ""
    write = choose("x", "normed", "gate", "up_weight", "h") if choose.seldom(6) else ""
    tied = choose.seldom(8)

    def program(x: Tensor, g: Tensor, u: Tensor, p: Tensor, d: Tensor, b: Tensor, n: Tensor) -> tuple[Any, ...]:
        x = x.sin()
        total = x + x.flip(0) if add_before else x
        y = F.rms_norm(total, (DIM,), n, 1e-6) if normed else total
        y = view(y)
        if packed:
            gate, up = split(F.linear(y, weight(p), b if biased else None))
        else:
            gate = F.linear(y, g, b[:HIDDEN] if biased else None)
            if write in ("x", "normed", "gate"):
                {"x": total, "normed": y, "gate": gate}[write].mul_(0.5)
            up = F.linear(y, weight(g if tied else u))
        gate, up = (up, gate) if swapped else (gate, up)
        h = between(act(gate) * up)
        if write == "h":
            h.add_(1.0)
        product = output(F.linear(h, d)).view(2, 3, DIM)
        out = total + product if residual_first else product + total
        also = {"normed": y, "gate": gate, "h": h, "product": product, "sum": total}
        return (out, also[extra]) if extra else (out,)

    shapes = ((2, 3, DIM), (HIDDEN, DIM), (HIDDEN, DIM), (2 * HIDDEN, DIM), (DIM, HIDDEN), (2 * HIDDEN,), (DIM,))
    return program, [choose.tensor(*shape, dtype=dtype) for shape in shapes]
