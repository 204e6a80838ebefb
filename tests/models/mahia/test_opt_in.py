"""use_cuda_kernels: the plain module without a GPU, the module compiled by itself where there is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from infuse import backend
from infuse.models.mahia import DynamicNeuroFabric, GraphDiffusionMemory, HybridEfficientModel, MetaAttentionKernel
from infuse.models.mahia import opt_in as opting_in

DIM = 16
MAKERS: dict[str, Any] = {
    "attention": lambda use: MetaAttentionKernel(DIM, use_cuda_kernels=use),
    "memory": lambda use: GraphDiffusionMemory(DIM, 4, use_cuda_kernels=use),
    "fabric": lambda use: DynamicNeuroFabric(DIM, 2, use_cuda_kernels=use),
}


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU; what is then compiled takes tensors of the CPU as well."""
    monkeypatch.setattr(opting_in, "gpu_is_there", lambda: True)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_without_a_gpu_the_module_stays_plain(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opting_in, "gpu_is_there", lambda: False)
    assert not is_compiled(make(True))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_only_a_module_that_asks_for_it_is_compiled(make: Any) -> None:
    plain, fused = make(False), make(True)
    assert not is_compiled(plain) and is_compiled(fused)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert not is_compiled(type(fused)(DIM)), "the class is left alone"


@pytest.mark.usefixtures("gpu")
def test_the_compiled_module_is_rewritten_and_computes_the_same() -> None:
    fused = GraphDiffusionMemory(DIM, 4, use_cuda_kernels=True)
    plain = GraphDiffusionMemory(DIM, 4)
    plain.load_state_dict(fused.state_dict())
    records: list[Any] = []
    stop = backend.on_rewrite(records.extend)
    try:
        x = torch.randn(3, DIM)
        torch.testing.assert_close(fused(x), plain(x))
    finally:
        stop()
    assert [(record.kind, record.status) for record in records] == [("attention", "rewritten")] * 2


@pytest.mark.usefixtures("gpu")
def test_the_model_hands_it_on() -> None:
    model = HybridEfficientModel(20, 9, 7, DIM, use_cuda_kernels=True)
    compiled = {type(module) for module in model.modules() if is_compiled(module)}
    assert compiled == {MetaAttentionKernel, GraphDiffusionMemory, DynamicNeuroFabric}
    duplicate = copy.deepcopy(model)
    assert list(duplicate.state_dict()) == list(model.state_dict())
