"""Projections whose weights are sharded: what FSDP2 gathers is a weight like any other, DTensors keep operators of
their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import infuse
from infuse import backend
from infuse.patterns.linears import SUBCLASS
from infuse.report import Placement
from tests.patterns.capture import capture, composite_overload

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
DIM, HIDDEN = 8, 12


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that is a mesh of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_weights_that_fsdp_gathers_are_weights(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import fully_shard

    def place(kind: str, args: Any, training: bool, **rest: Any) -> Placement:
        return composite_overload(kind, args, training)

    monkeypatch.setattr(backend, "place", place)
    torch._dynamo.reset()
    infuse.reset_report()
    module, x = MLP(), torch.randn(3, DIM, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
    sharded = fully_shard(module, mesh=mesh)
    sharded.compile(backend="infuse")
    sharded(x).square().sum().backward()
    assert infuse.last_report().larger == {"gated_mlp": 1}
    grads = [x.grad, *(parameter.grad.full_tensor() for parameter in module.parameters())]
    torch.testing.assert_close(grads, [*expected])


def test_weights_that_are_sharded_by_columns_keep_their_operators(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module, x = MLP(), torch.randn(3, DIM)
    local = [ColwiseParallel(use_local_output=is_local) for is_local in (True, False)]
    for columns, rows in ((local[0], RowwiseParallel()), (local[1], RowwiseParallel(use_local_output=True))):
        plan = {"gate": columns, "up": columns, "down": rows}
        sharded = parallelize_module(copy.deepcopy(module), mesh, plan)
        captured = capture(sharded, x, training=True, place=composite_overload)
        assert captured.counts == {"swiglu": 1}
        assert captured.notes == [f"linear_swiglu: left to its parts ({SUBCLASS})"]
