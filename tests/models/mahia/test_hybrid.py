"""HybridEfficientModel: what its memory's step changes, how it is compiled, and that no error is swallowed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from infuse import backend
from infuse.models.mahia import HybridEfficientModel
from tests.models.mahia.components import CASES, LENGTH
from tests.tolerances import assert_close_to_fp64

CASE = CASES["hybrid"]


def model_and_inputs() -> tuple[HybridEfficientModel, tuple[Tensor, ...]]:
    model = CASE.module()
    assert isinstance(model, HybridEfficientModel)
    return model, CASE.inputs()


def test_forward_leaves_the_memory_and_its_update_changes_it() -> None:
    model, inputs = model_and_inputs()
    before = [value.detach().clone() for value in model.memory.state()]
    first = model(*inputs)
    assert all(torch.equal(kept, value) for kept, value in zip(model.memory.state(), before))
    model.update_memory(*inputs)
    diffused = model.memory.adjacency.softmax(-1) @ before[0]
    torch.testing.assert_close(model.memory.nodes, torch.lerp(before[0], diffused, model.memory.diffusion_rate))
    assert model.memory.position == before[2] + 1
    torch.testing.assert_close(model.memory.cache[before[2]], model.embed(*inputs).mean(0))
    assert not torch.equal(model(*inputs), first)


def test_compiled_it_is_the_same_model_in_bf16_and_with_padding() -> None:
    model, inputs = model_and_inputs()
    model, mask = model.bfloat16(), torch.arange(LENGTH) < torch.tensor([[LENGTH], [4]])
    inputs = (inputs[0], inputs[1].bfloat16(), mask)
    keys, records = list(model.state_dict()), list[object]()
    stop = backend.on_rewrite(records.extend)
    try:
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(inputs[0], inputs[1].double(), mask)
            eager = model(*inputs)
            assert model.enable_torch_compile(mode=None) is model
            assert_close_to_fp64(model(*inputs), eager, exact)
    finally:
        stop()
    assert len(records) == sum(CASE.sites.values())
    assert list(model.state_dict()) == keys


class Unsupported(nn.Module):
    """Breaks the graph."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def test_what_cannot_be_compiled_is_an_error_even_where_errors_are_suppressed() -> None:
    model, inputs = model_and_inputs()
    model.fabric = Unsupported()  # type: ignore[assignment]
    assert model(*inputs).shape == (2, 3)
    model.enable_torch_compile()
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"),
    ):
        model(*inputs)


def test_an_error_of_the_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_and_inputs()

    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("the backend is broken")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    model.enable_torch_compile()
    with pytest.raises(Exception, match="the backend is broken"):
        model(*inputs)


def test_an_unknown_mode_is_refused_at_once() -> None:
    model, _ = model_and_inputs()
    with pytest.raises(ValueError, match="mode: got 'fastest'"):
        model.enable_torch_compile("fastest")
    assert model._compiled_call_impl is None


def test_it_trains_under_autocast() -> None:
    model, inputs = model_and_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs)
    out.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


def test_shorter_texts_are_taken_and_batches_that_differ_are_refused() -> None:
    model, (tokens, features) = model_and_inputs()
    assert model(tokens[:, :3], features).shape == (2, 3)
    with pytest.raises(ValueError, match=r"got \(2, 9\) tokens and \(1, 7\) features, expected one batch size"):
        model(tokens, features[:1])
    with pytest.raises(ValueError, match="num_classes: got 0"):
        HybridEfficientModel(20, 9, 7, 16, num_classes=0)
