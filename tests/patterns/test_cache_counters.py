"""Assertions about KV caches and their counters, done for all layers at once, and what forbids that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from infuse.patterns import cache_counters

LENGTH = 8


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = 1
        self.register_buffer("keys", torch.zeros(LENGTH))
        self.register_buffer("pos", torch.arange(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async(self.pos[0] + 1 <= LENGTH, "assertion error")
        self.keys[self.pos[:1]] = x
        self.pos.add_(self.step)
        return x + self.keys.sum()


class Layers(nn.Module):
    """Several caches; `more` is done between the first layer and the second, and at the end."""

    def __init__(self, more: Callable[[Any, Tensor], Tensor] = lambda model, x: x) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cache() for _ in range(3))
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        x = self.more(self, self.layers[0](x))
        for layer in [*self.layers][1:]:
            x = layer(x)
        return self.more(self, x)


def gathered(model: nn.Module) -> tuple[int, int, int, int]:
    """(saved, assertions, counters that advance alone, together) of a graph that then computes what the model does."""
    counts: list[tuple[int, int, int, int]] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        saved = cache_counters.gather(gm.graph, "cpu")
        gm.graph.lint()
        gm.recompile()
        targets = [node.target for node in gm.graph.nodes]
        found = (targets.count(torch._assert_async), targets.count("add_"), targets.count(torch._foreach_add_))
        counts.append((saved, *found))
        return gm

    expected = copy.deepcopy(model)
    x = torch.randn(1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(LENGTH):
            torch.testing.assert_close(compiled(x), expected(x), rtol=0, atol=0)
            for mine, others in zip(model.buffers(), expected.buffers()):
                torch.testing.assert_close(mine, others, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="assertion error"):
            compiled(x)
    torch._dynamo.reset()
    (count,) = counts
    return count


def test_a_default_device_changes_nothing() -> None:
    with torch.device("cpu"):
        assert gathered(Layers()) == (4, 1, 0, 1)


def test_assertions_and_counters_of_all_layers_become_one_each() -> None:
    assert gathered(Layers()) == (4, 1, 0, 1)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        # A counter that is read once more, then its cache's position is what it was advanced to.
        (lambda model, x: x + model.layers[0].pos[0], (3, 1, 1, 1)),
        (lambda model, x: x + model.layers[2].pos[0], (2, 2, 1, 1)),
        # Written before the assertion that reads it.
        (lambda model, x: x + model.layers[1].pos.mul_(1).sum(), (2, 2, 1, 1)),
    ],
    ids=["read later", "read before and later", "written before"],
)
def test_a_counter_that_others_touch_stays(
    more: Callable[[Any, Tensor], Tensor], expected: tuple[int, int, int, int]
) -> None:
    assert gathered(Layers(more)) == expected


def test_counters_that_share_memory_stay() -> None:
    model = Layers()
    shared = torch.arange(LENGTH).repeat(2)
    model.layers[0].pos, model.layers[1].pos = shared[:LENGTH], shared[LENGTH:]

    def backend(gm: GraphModule, inputs: Any) -> Any:
        assert cache_counters.gather(gm.graph, "cpu") == 0
        return gm

    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(1))
    torch._dynamo.reset()


def test_counters_of_different_steps_advance_apart() -> None:
    model = Layers()
    model.layers[1].step = 2

    def backend(gm: GraphModule, inputs: Any) -> Any:
        assert cache_counters.gather(gm.graph, "cpu") == 2 + 1  # all assertions, the counters of the first and the last
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(1))
    torch._dynamo.reset()


def test_other_devices_keep_their_graph() -> None:
    def backend(gm: GraphModule, inputs: Any) -> Any:
        assert cache_counters.gather(gm.graph, "cuda") == 0
        return gm

    with torch.no_grad():
        torch.compile(Layers(), backend=backend, fullgraph=True)(torch.randn(1))
    torch._dynamo.reset()
