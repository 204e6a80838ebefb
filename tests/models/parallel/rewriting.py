"""A torch.compile backend that runs what Infuse makes of a graph without generating code for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from infuse.patterns.passes import rewrite
from infuse.settings import Settings
from tests.patterns.capture import default_overload


class Rewriting:
    """`counts`: the fused sites of all graphs so far, by kind; `graphs`: how many there were."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewrite(module.graph, Settings(), default_overload, torch.is_grad_enabled())
        module.recompile()
        names = [str(getattr(node.target, "overloadpacket", "")) for node in module.graph.nodes]
        self.counts.update(name.removeprefix("infuse.") for name in names if name.startswith("infuse."))
        self.graphs += 1
        return module.forward
