"""infuse::embedding against float64, its registration, what it refuses, and where the rewrite puts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import infuse
from infuse.lowering import embedding as lowering
from infuse.ops import library
from infuse.settings import Settings
from tests.tolerances import assert_close_to_fp64

OP = torch.ops.infuse.embedding
ROWS, DIM = 40, 6


def indices_of(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Few different ones, so that most occur several times."""
    return torch.randint(0, 5, shape, dtype=dtype) * 7


@pytest.mark.parametrize("padding_idx", [-1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 50)])
def test_value_and_gradient_are_as_near_to_float64_as_eager(
    shape: tuple[int, ...], dtype: torch.dtype, padding_idx: int
) -> None:
    weight = torch.randn(ROWS, DIM, dtype=dtype, requires_grad=True)
    double = weight.detach().double().requires_grad_()
    indices = indices_of(*shape)
    padding = None if padding_idx < 0 else padding_idx
    eager, exact = F.embedding(indices, weight, padding), F.embedding(indices, double, padding)
    dy = torch.randn(eager.shape).to(dtype)
    (theirs,), (right,) = torch.autograd.grad(eager, weight, dy), torch.autograd.grad(exact, double, dy.double())
    for operator in (OP, OP.inline):
        y = operator(weight, indices, padding_idx)
        torch.testing.assert_close(y, eager, rtol=0, atol=0)
        (dweight,) = torch.autograd.grad(y, weight, dy)
        assert dweight.dtype == dtype
        assert_close_to_fp64(dweight, theirs, right)


def test_many_equal_indices_are_rounded_once() -> None:
    """In bfloat16 a running sum of ones ends at 256."""
    weight = torch.zeros(ROWS, DIM, dtype=torch.bfloat16, requires_grad=True)
    OP(weight, torch.full((1000,), 3), -1).sum().backward()
    assert weight.grad is not None
    assert weight.grad[3].tolist() == [1000.0] * DIM
    assert not weight.grad[:3].any() and not weight.grad[4:].any()


def test_opcheck() -> None:
    for dtype in (torch.int64, torch.int32):
        weight = torch.randn(ROWS, DIM, requires_grad=True)
        opcheck(OP.default, (weight, indices_of(2, 9, dtype=dtype), 7))
        opcheck(OP.default, (weight.detach(), indices_of(4, dtype=dtype)))


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2"):
        OP(torch.randn(3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64 or int32"):
        OP(torch.randn(3, 2), torch.zeros(1))


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM, dtype=torch.bfloat16, **options)
        self.norm = nn.RMSNorm(DIM, dtype=torch.bfloat16)

    def forward(self, indices: Tensor) -> Tensor:
        out: Tensor = self.norm(self.table(indices))
        return out


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the operator stand in graphs on the CPU."""
    monkeypatch.setattr(lowering, "_cannot_gain", lambda *args: "")


def remarks(model: nn.Module, *args: Tensor) -> str:
    return "\n".join(infuse.explain(model, *args, training=True).notes)


@pytest.mark.parametrize("options", [{}, {"padding_idx": -33}])
def test_a_compiled_model_has_eagers_gradient(gains: None, options: dict[str, Any]) -> None:
    model, indices = Model(**options), indices_of(2, 30)
    doubled = Model(**options).double()
    doubled.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="infuse", fullgraph=True)
    gradients = []
    for function, module in ((compiled, model), (model, model), (doubled, doubled)):
        module.zero_grad()
        function(indices).sin().sum().backward()
        grad = module.table.weight.grad
        assert grad is not None
        gradients.append(grad.clone())
    assert_close_to_fp64(*gradients)


def test_the_report_says_so(gains: None) -> None:
    assert "1 embedding(s)" in remarks(Model(), indices_of(3))
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        assert "embedding(s)" not in remarks(Model(**options), indices_of(3))


def test_only_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    def declined(
        rows: int = 1000, indices: int = 100, training: bool = True, dtype: torch.dtype = torch.bfloat16, **how: Any
    ) -> str:
        weight = torch.empty(rows, 8, dtype=dtype, device=how.pop("device", "cuda")).requires_grad_(
            how.pop("requires_grad", True)
        )
        found = torch.empty(indices, dtype=torch.int64, device=weight.device)
        return lowering.place((weight, found), training, Settings(**how)).declined

    with torch._subclasses.FakeTensorMode():
        assert not declined()
        assert declined(indices=300) == "most rows change"
        assert declined(training=False) == declined(requires_grad=False) == "no gradient"
        assert declined(kernels="never") == "kernels are off"
        assert "second table" in declined(device="cpu") and "second table" in declined(dtype=torch.float32)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert "order" in declined()


@pytest.mark.gpu
def test_on_a_gpu_there_is_no_table_of_float32() -> None:
    assert not library.missing(torch.device("cuda"))
    table = nn.Embedding(50_000, 512, dtype=torch.bfloat16, device="cuda")
    norm = nn.RMSNorm(512, dtype=torch.bfloat16, device="cuda")
    indices = torch.randint(0, 50, (2, 300), device="cuda")
    compiled = torch.compile(lambda indices: norm(table(indices)), backend="infuse", fullgraph=True)
    gradients, peaks = [], []
    for function in (compiled, compiled, lambda indices: norm(table(indices))):
        table.weight.grad = None
        loss = function(indices).sin().sum()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert table.weight.grad is not None
        gradients.append(table.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[2], rtol=3e-2, atol=3e-2)
    assert peaks[1] < 2 * table.weight.nbytes
