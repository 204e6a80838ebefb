"""Dynamic shapes: the rewrite adds no guard, so nothing is compiled again that stock torch would not compile again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import LlamaConfig, LlamaModel

from infuse.backend import InfusePass
from infuse.settings import Settings
from tests.small_models import Block

SHAPES = ((2, 6), (3, 5), (1, 7), (2, 1))
Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Any]


def rewriting(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The rewrite and AOTAutograd, which runs the operators' formulas on symbolic shapes; no code is generated."""
    InfusePass(Settings(), max_autotune=False)(gm.graph)
    gm.recompile()
    return aot_eager(gm, inputs)


def compilations(
    model: nn.Module, calls: Sequence[torch.Tensor], backend: Backend, dynamic: bool | None, training: bool
) -> int:
    """How many graphs torch.compile makes for a series of calls."""
    torch._dynamo.reset()
    count = 0

    def counted(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        nonlocal count
        count += 1
        return backend(gm, inputs)

    compiled = torch.compile(model, backend=counted, dynamic=dynamic)
    with torch.set_grad_enabled(training):
        for call in calls:
            result = compiled(call)
            out = result if isinstance(result, torch.Tensor) else result[0]
            if training:
                out.float().square().sum().backward()
    return count


def llama(attention: str) -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation=attention,
    )
    return LlamaModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.Tensor]]] = {
    "block": (Block, lambda *shape: torch.randn(*shape, 32)),
    "llama": (lambda: llama("eager"), lambda *shape: torch.randint(50, shape)),
}


@pytest.mark.parametrize(
    ("name", "dynamic", "training"),
    [("block", True, False), ("block", None, True), ("llama", True, True), ("llama", None, False)],
)
def test_no_more_recompilations_than_stock(name: str, dynamic: bool | None, training: bool) -> None:
    make, make_input = MODELS[name]
    model, calls = make(), [make_input(*shape) for shape in SHAPES]
    stock = compilations(model, calls, aot_eager, dynamic, training)
    assert compilations(model, calls, rewriting, dynamic, training) <= stock


@pytest.mark.parametrize("name", MODELS)
def test_marked_dimensions_stay_dynamic(name: str) -> None:
    """mark_dynamic makes it an error to specialise a dimension; one compilation serves all sizes."""
    make, make_input = MODELS[name]
    calls = [make_input(*shape) for shape in SHAPES[:2]]
    for call in calls:
        torch._dynamo.mark_dynamic(call, 0)
        torch._dynamo.mark_dynamic(call, 1)
    assert compilations(make(), calls, rewriting, None, training=False) == 1
