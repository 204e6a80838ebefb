"""Residual add + RMSNorm: one operator with two results, and when they stay apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

D = 16
Function = Callable[[Tensor, Tensor, Tensor], object]


def norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def next_residual(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    total = residual + x
    return total + torch.tanh(norm(total, w))


def both_returned(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.add(x, residual)
    return norm(total, w), total


def called_by_name(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x.add(residual)
    return F.rms_norm(total.float(), (D,), w, 1e-6).type_as(total), total * 2


def sum_read_by_the_norm_alone(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm(x + residual, w)


def sum_read_before_the_norm(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    total = x + residual
    other = torch.tanh(total)
    return norm(total, w) * other


def tensors(
    dtype: torch.dtype = torch.float32, training: bool = False, shape: tuple[int, ...] = (2, 3, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 3, D], residual of a shape, w [D]"""
    x, residual, w = torch.randn(2, 3, D), torch.randn(shape), torch.randn(D) * 0.3 + 1
    return tuple(t.to(dtype).requires_grad_(training) for t in (x, residual, w))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(
    "function",
    [next_residual, both_returned, called_by_name, sum_read_by_the_norm_alone, sum_read_before_the_norm],
)
def test_add_and_norm_become_one_operator(
    function: Function, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"add_rms_norm": 1}
    (node,) = captured.operators()
    assert all(argument.op == "placeholder" for argument in node.args[:3])  # type: ignore[union-attr]
    assert_same_results(captured, training)


def test_sum_is_taken_from_the_operator() -> None:
    captured = capture(both_returned, *tensors())
    assert "add" not in captured.targets()


def test_operator_stands_where_the_add_stood_if_the_sum_is_read_before_the_norm() -> None:
    captured = capture(sum_read_before_the_norm, *tensors())
    names = [str(getattr(node.target, "__name__", node.target)) for node in captured.rewritten.graph.nodes]
    assert names.index("add_rms_norm.default") < names.index("tanh")


def test_weight_made_after_an_early_reader_of_the_sum_keeps_them_apart() -> None:
    def late_weight(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        total = x + residual
        other = torch.tanh(total)
        return norm(total, other[0, 0] * w) * other

    captured = capture(late_weight, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_second_norm_of_a_sum_reads_the_first_ones_sum() -> None:
    def parallel(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        total = x + residual
        return norm(total, w) + norm(total, w + 1) + total

    captured = capture(parallel, *tensors(training=True), training=True)
    assert captured.counts == {"add_rms_norm": 1, "rms_norm": 1}
    assert_same_results(captured, training=True)


def test_chain_of_blocks() -> None:
    def blocks(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            total = x + residual
            x, residual = torch.tanh(norm(total, w)), total
        return norm(x + residual, w)

    captured = capture(blocks, *tensors(torch.bfloat16, training=True), training=True)
    assert captured.counts == {"add_rms_norm": 4}
    assert_same_results(captured, training=True)


def alpha(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm(torch.add(x, residual, alpha=2), w)


def number(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm(x + 1.0, w)


def difference(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm(x - residual, w)


def in_place(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    total = x * 1.0
    total += residual
    return norm(total, w)


def in_place_method(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm((x * 1.0).add_(residual), w)


@pytest.mark.parametrize("function", [in_place, in_place_method])
def test_sum_written_into_a_temporary_is_a_sum(function: Function) -> None:
    captured = capture(function, *tensors())
    assert captured.counts == {"add_rms_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("function", [alpha, number, difference])
def test_other_sums_stay_apart_from_the_norm(function: Function) -> None:
    captured = capture(function, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert captured.refusals == []
    assert_same_results(captured)


def test_broadcasting_add_stays_apart() -> None:
    captured = capture(sum_read_by_the_norm_alone, *tensors(shape=(3, D)))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("narrow_first", [False, True])
def test_add_of_two_dtypes_is_made_in_the_wide_one(
    narrow_first: bool, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    x, residual, w = tensors(torch.float32, training)
    x = x.detach().bfloat16().requires_grad_(training)
    terms = (x, residual) if narrow_first else (residual, x)
    w = w.detach().to(dtype).requires_grad_(training)
    captured = capture(both_returned, *terms, w, training=training, dynamic=dynamic)
    assert captured.counts == {"add_rms_norm": 1}
    assert_same_results(captured, training)


def test_add_in_the_wide_dtype_stays_in_it() -> None:
    def wide(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x.float() + residual.float()
        return norm(total, w.float()), total

    captured = capture(wide, *tensors(torch.bfloat16))
    assert captured.counts == {"add_rms_norm": 1}
    assert_same_results(captured)


def test_sum_written_to_before_the_norm_stays_apart() -> None:
    def written(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        total = x + residual
        total.mul_(2.0)
        return norm(total, w)

    captured = capture(written, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_addend_written_to_before_the_norm_stays_apart() -> None:
    def written(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        buffer = residual * 1.0
        total = x + buffer
        buffer.zero_()
        return norm(total, w) + buffer

    captured = capture(written, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_composition_alone_can_be_asked_for() -> None:
    def model(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        return norm(norm(x, w) + residual, w)

    captured = capture(model, *tensors(), settings=Settings(patterns=("add_rms_norm",)))
    assert captured.counts == {"add_rms_norm": 1}
    captured = capture(model, *tensors(), settings=Settings(patterns=("rms_norm",)))
    assert captured.counts == {"rms_norm": 2}


def test_module_with_symbolic_eps() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(D, eps=1e-3)

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return self.norm(total), total

    captured = capture(Block(), *tensors()[:2], dynamic=True)
    assert captured.counts == {"add_rms_norm": 1}
    assert_same_results(captured)
