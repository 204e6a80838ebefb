"""The operators on DTensors: two processes hold parts and agree with one that holds all."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def _gather(value: Any) -> Any:
    return value.full_tensor()


def _check(name: str, got: Any, expected: Any) -> None:
    torch.testing.assert_close(_gather(got), expected, msg=lambda text: f"{name}: {text}")


def _check_rope(ops: Any, spread: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    cos, sin = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    expected = ops.rope(x, cos, sin, True, True)
    grads = torch.autograd.grad((expected**2).sum(), (x, cos, sin))
    for dim in (0, 1, 2):
        table = Shard(0) if dim == 2 else Replicate()
        parts = [spread(x, Shard(dim)), spread(cos, table), spread(sin, table)]
        got = ops.rope(*parts, True, True)
        assert got.placements == (Shard(dim),), got.placements
        (got**2).sum().backward()
        _check("rope", got, expected)
        for part, grad in zip(parts, grads):
            _check("rope gradient", part.grad, grad)


def _check_head(ops: Any, spread: Any, distribute: Any) -> None:
    """The loss of a language model's head: rows may be sharded for a sum, the weight is whole."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    x, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 11, (4, 6))
    for reduction in ("sum", "mean"):
        expected = ops.linear_cross_entropy(x, weight, None, target, -100, reduction)
        grads = torch.autograd.grad(expected * 3, (x, weight))
        for dim in (0, 1):
            parts = [spread(x, Shard(dim)), spread(weight, Replicate())]
            loss = ops.linear_cross_entropy(*parts, None, distribute(target, Shard(dim)), -100, reduction)
            assert loss.placements == ((Partial() if reduction == "sum" else Replicate()),), loss.placements
            (loss * 3).backward()
            _check("linear_cross_entropy", loss, expected)
            for part, grad in zip(parts, grads):
                _check("linear_cross_entropy gradient", part.grad, grad)


def _worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import infuse  # noqa: F401

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    ops = torch.ops.infuse

    def spread(tensor: torch.Tensor, place: Any) -> Any:
        return distribute_tensor(tensor.detach(), mesh, [place]).requires_grad_()

    x, residual = (torch.randn(4, 6, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, requires_grad=True)
    for dim in (0, 1):
        for flags in ((0.0, False), (0.0, True)):
            expected = ops.rms_norm(x, weight, 1e-5, *flags)
            grads = torch.autograd.grad((expected**2).sum(), (x, weight))
            dx, dw = spread(x, Shard(dim)), spread(weight, Replicate())
            got = ops.rms_norm(dx, dw, 1e-5, *flags)
            assert got.placements == (Shard(dim),), got.placements
            (got**2).sum().backward()
            _check("rms_norm", got, expected)
            _check("dx", dx.grad, grads[0])
            _check("dweight", dw.grad, grads[1])
        expected_y, expected_sum = ops.add_rms_norm(x, residual, weight, 1e-5)
        grads = torch.autograd.grad((expected_y * expected_sum).sum(), (x, residual, weight))
        parts = [spread(x, Shard(dim)), spread(residual, Shard(dim)), spread(weight, Replicate())]
        y, total = ops.add_rms_norm(*parts, 1e-5)
        (y * total).sum().backward()
        _check("add_rms_norm", y, expected_y)
        for part, grad in zip(parts, grads):
            _check("add_rms_norm gradient", part.grad, grad)
    _check_layer_norm(ops, spread, x, residual, weight)
    _check_head(ops, spread, lambda tensor, place: distribute_tensor(tensor, mesh, [place]))
    _check_gated_rms_norm(ops, spread, x, residual, weight)
    with torch.no_grad():
        _check("no weight", ops.rms_norm(spread(x, Shard(0)), None, 1e-5), ops.rms_norm(x, None, 1e-5))
        _check("last dimension", ops.rms_norm(spread(x, Shard(2)), None, 1e-5), ops.rms_norm(x, None, 1e-5))
    for dim in (0, 2):
        expected = ops.swiglu(x, residual)
        grads = torch.autograd.grad(expected.sum(), (x, residual))
        parts = [spread(x, Shard(dim)), spread(residual, Shard(dim))]
        got = ops.swiglu(*parts)
        assert got.placements == (Shard(dim),), got.placements
        got.sum().backward()
        _check("swiglu", got, expected)
        for part, grad in zip(parts, grads):
            _check("swiglu gradient", part.grad, grad)
    _check_rope(ops, spread)
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(2))
    mask = torch.randn(4, 5, 5, requires_grad=True)
    for dim in (0, 1):
        expected = ops.attention(q, k, v, mask, 0.3)
        grads = torch.autograd.grad((expected**2).sum(), (q, k, v, mask))
        parts = [spread(tensor, Shard(dim)) for tensor in (q, k, v)]
        parts.append(spread(mask, Shard(0) if dim == 1 else Replicate()))
        got = ops.attention(*parts, 0.3)
        assert got.placements == (Shard(dim),), got.placements
        (got**2).sum().backward()
        _check("attention", got, expected)
        for part, grad in zip(parts, grads):
            _check("attention gradient", part.grad, grad)
    with torch.no_grad():
        causal = ops.attention(*(spread(tensor, Shard(1)) for tensor in (q, k, v)), None, 0.3, True)
        _check("causal", causal, ops.attention(q, k, v, None, 0.3, True))
    dist.barrier()  # gloo may abort a process whose peer still sends when it leaves
    dist.destroy_process_group()


def _check_layer_norm(ops: Any, spread: Any, *tensors: torch.Tensor) -> None:
    from torch.distributed.tensor import Replicate, Shard

    inputs = (*tensors, tensors[-1].detach().flip(0).requires_grad_())
    for dim, flags in itertools.product((0, 1), ((0.0, False), (0.0, True))):
        rows = [Shard(dim), Shard(dim), Replicate(), Replicate()]
        expected_y, expected_sum = ops.add_layer_norm(*inputs, 1e-5, *flags)
        expected = ops.layer_norm(expected_sum, *inputs[2:], 1e-5, *flags)
        grads = torch.autograd.grad((expected_y * expected_sum + expected**2).sum(), inputs)
        parts = [spread(tensor, place) for tensor, place in zip(inputs, rows)]
        y, total = ops.add_layer_norm(*parts, 1e-5, *flags)
        got = ops.layer_norm(total, *parts[2:], 1e-5, *flags)
        assert got.placements == (Shard(dim),), got.placements
        (y * total + got**2).sum().backward()
        _check("layer_norm", got, expected)
        _check("add_layer_norm", y, expected_y)
        for part, grad in zip(parts, grads):
            _check("layer_norm gradient", part.grad, grad)


def _check_gated_rms_norm(ops: Any, spread: Any, *inputs: torch.Tensor) -> None:
    from torch.distributed.tensor import Replicate, Shard

    for dim, norm_before_gate in itertools.product((0, 1), (False, True)):
        expected = ops.gated_rms_norm(*inputs, 1e-5, norm_before_gate, "silu", 2)
        grads = torch.autograd.grad((expected**2).sum(), inputs)
        parts = [spread(tensor, place) for tensor, place in zip(inputs, (Shard(dim), Shard(dim), Replicate()))]
        got = ops.gated_rms_norm(*parts, 1e-5, norm_before_gate, "silu", 2)
        assert got.placements == (Shard(dim),), got.placements
        (got**2).sum().backward()
        _check("gated_rms_norm", got, expected)
        for part, grad in zip(parts, grads):
            _check("gated_rms_norm gradient", part.grad, grad)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2, join=True)
