"""Linear + cross entropy without a GPU: the formula, its gradients, the operators' registration, the plan of chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from infuse.ops import chunked_cross_entropy
from infuse.ops import linear_cross_entropy as op
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
VOCAB, DIM = 11, 8


def inputs(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x, weight, vector = (
        torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, 3, DIM), (VOCAB, DIM), (VOCAB,))
    )
    target = torch.randint(0, VOCAB, (2, 3))
    target[0, 1] = -100
    return x, weight, vector if bias else None, target


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *flags: Any) -> Tensor:
    ignore_index, reduction, label_smoothing, float_logits, softcap = (*flags, 0.0)[:5]
    logits = F.linear(x, weight, bias).flatten(0, 1)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(
        logits.float() if float_logits and x.dtype == torch.bfloat16 else logits,
        target.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


FLAGS = [(-100, "mean", 0.0, False), (-100, "sum", 0.1, True), (3, "mean", 0.1, True, 2.0), (3, "sum", 0.0, False, 3.0)]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, flags: tuple[Any, ...]) -> None:
    x, weight, bias, target = inputs(dtype)
    target = target.clamp(min=0) if flags[0] == 3 else target
    leaves = (x, weight, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]  # type: ignore[union-attr]
    results = []
    for function, given in ((OPS.linear_cross_entropy, leaves), (eager, leaves), (eager, exact)):
        loss = function(*given, target, *flags)
        results.append([loss, *torch.autograd.grad(loss * 3.0, given)])
    for got, old, reference in zip(*results):
        assert_close_to_fp64(got, old, reference)


@pytest.mark.parametrize("flags", FLAGS)
def test_derivatives(flags: tuple[Any, ...]) -> None:
    x, weight, bias, target = inputs(torch.float64)
    target = target.clamp(min=0) if flags[0] == 3 else target

    def loss(*leaves: Tensor) -> Tensor:
        return OPS.linear_cross_entropy(*leaves, target, *flags)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (x, weight, bias))


@pytest.mark.parametrize("bias", [False, True])
def test_operators_are_registered_properly(bias: bool) -> None:
    args = inputs(torch.float32, bias)
    opcheck(OPS.linear_cross_entropy.default, (*args, -100, "sum", 0.1, False))
    needs = (True, True, bias)
    detached = [None if arg is None else arg.detach() for arg in args]
    opcheck(OPS.linear_cross_entropy_fwd.default, (*detached, -100, "mean", 0.0, True, 2.0, *needs))
    opcheck(OPS.linear_cross_entropy_fwd.default, (*detached, -100, "mean", 0.0, False, 0.0, True, False, False))


def test_only_wanted_gradients_are_computed() -> None:
    x, weight, bias, target = inputs(torch.float32)
    _, dx, dweight, dbias = OPS.linear_cross_entropy_fwd(
        x.detach(), weight.detach(), None, target, -100, "mean", 0.0, False, 0.0, False, True, False
    )
    assert (dx.numel(), dweight.shape, dbias.numel()) == (0, weight.shape, 0)
    loss = op.linear_cross_entropy(x.detach(), weight.detach(), target, bias)
    (grad,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(grad, torch.autograd.grad(eager(x, weight, bias, target, *FLAGS[0]), bias)[0])


def test_all_rows_ignored() -> None:
    x, weight, bias, target = inputs(torch.float32)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss = op.linear_cross_entropy(x, weight, torch.full_like(target, -100), bias, reduction=reduction)
        assert torch.equal(loss.isnan(), torch.tensor(expected != expected)) and (expected != expected or loss == 0)


def test_refuses_what_does_not_fit() -> None:
    x, weight, bias, target = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"target: number of elements: got 5, expected 6"):
        op.linear_cross_entropy(x, weight, target.flatten()[1:], bias)
    with pytest.raises(ValueError, match=r"reduction: got 'none', expected one of \['mean', 'sum'\]"):
        op.linear_cross_entropy(x, weight, target, bias, reduction="none")
    with pytest.raises(TypeError, match=r"target: got dtype torch.int32, expected torch.int64"):
        op.linear_cross_entropy(x, weight, target.int(), bias)
    with pytest.raises(TypeError, match=r"expected one dtype"):
        op.linear_cross_entropy(x.bfloat16(), weight, target, bias)
    with pytest.raises(ValueError, match=r"weight: size of dimension 1: got 8, expected 7"):
        op.linear_cross_entropy(x[..., 1:], weight, target, bias)


@pytest.mark.parametrize("rows", [1, 127, 1024, 2047, 2048, 4097, 5000, 8192, 65536, 100_001])
@pytest.mark.parametrize(("dim", "need_dweight", "least"), [(2047, True, 2048), (896, True, 1024), (4096, False, 1024)])
def test_chunks_are_equal_and_not_small(rows: int, dim: int, need_dweight: bool, least: int) -> None:
    step = chunked_cross_entropy.chunk_rows(rows, dim, need_dweight)
    few = step == rows < 2 * least
    assert few or (7 / 8 * least <= step <= 2 * least and step % 128 == 0 and rows >= 15 / 8 * least)


@pytest.mark.parametrize(("rows", "dim"), [(4096, 4096), (4095, 4096), (8192, 8192)])
def test_logits_as_large_as_the_weight_are_one_chunk(rows: int, dim: int) -> None:
    assert chunked_cross_entropy.chunk_rows(rows, dim, True) == rows
    assert chunked_cross_entropy.chunk_rows(2 * dim, dim, True) < dim


def test_no_rows_have_no_chunks() -> None:
    assert chunked_cross_entropy.chunk_rows(0, 4096, True) == 0
