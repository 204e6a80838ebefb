"""What hand-written models are made of: a core in some spelling, between linear layers, and a register of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, Inputs

DIM, HEADS, HEAD, LENGTH, BATCH = 32, 4, 8, 6, 2


class Register:
    """Collects the models of one file: `add` as a decorator of a module class or of a core function."""

    def __init__(self, group: str, wrap: Callable[[Any], nn.Module] | None = None) -> None:
        self.group = group
        self.wrap = wrap
        self.entries: list[Entry] = []

    def add(
        self, inputs: Callable[[], Inputs] | None = None, wrap: bool = True, **options: Any
    ) -> Callable[[Any], Any]:
        """Sites by kind and fields of `Entry` as keywords. wrap: whether to put linear layers around a function."""
        kinds = ("attention", "rms_norm", "layer_norm", "swiglu", "rope")
        counts = {kind: options.pop(kind) for kind in kinds if kind in options}

        def register(made: Any) -> Any:
            def build() -> nn.Module:
                if isinstance(made, type):
                    module: nn.Module = made()
                    return module
                return self.wrap(made) if wrap and self.wrap is not None else Plain(made)

            name = made.__name__.replace("_", "-").strip("-")
            name = "".join("-" + c.lower() if c.isupper() else c for c in name).strip("-")
            self.entries.append(Entry(f"{self.group}/{name}", build, inputs or tokens, counts=counts, **options))
            return made

        return register


class Plain(nn.Module):
    """A function as a module, with a weight so that it can be trained."""

    def __init__(self, core: Callable[..., Any]) -> None:
        super().__init__()
        self.core = core
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self.core(self.proj(x), *rest)


class SelfAttention(nn.Module):
    """Heads [B, H, T, D] of one packed projection, a core, and an output projection."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        self.core = core
        self.kv_heads = kv_heads
        self.q_proj = nn.Linear(DIM, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(DIM, kv_heads * HEAD, bias=False)
        self.v_proj = nn.Linear(DIM, kv_heads * HEAD, bias=False)
        self.out = nn.Linear(HEADS * HEAD, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, HEAD).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, HEAD).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, HEAD).transpose(1, 2)
        out = self.core(q, k, v)
        result: Tensor = self.out(out.transpose(1, 2).reshape(batch, length, -1))
        return result


class Grouped(SelfAttention):
    """With two key and value heads."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(core, kv_heads=2)


class MultiQuery(SelfAttention):
    """With one key and value head."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(core, kv_heads=1)


def tokens() -> Inputs:
    return (torch.randn(BATCH, LENGTH, DIM),), {}


def tokens_and_more() -> Inputs:
    """A second sequence of another length."""
    return (torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, 9, DIM)), {}


def rows() -> Inputs:
    return (torch.randn(10, DIM),), {}


def image() -> Inputs:
    return (torch.randn(BATCH, DIM, 4, 4),), {}


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
