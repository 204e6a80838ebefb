"""The CUDA kernels of cross entropy, and linear + cross entropy in chunks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import chunked_cross_entropy, library
from infuse.ops import linear_cross_entropy as op
from tests.tolerances import assert_close_to_fp64, error, rounding

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

OPS = torch.ops.infuse
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCABS = (1, 7, 8, 100, 1000, 4099, 50257, 128256, 262145)


def configs() -> range:
    return range(-1, len(library.configurations("cross_entropy")))


def logits_and_target(rows: int, vocab: int, dtype: torch.dtype, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Rows with padding of NaN between them; the first target is ignored."""
    padded = torch.full((rows, -(-vocab // 8) * 8 + 8), float("nan"), device="cuda", dtype=dtype)
    logits = padded[:, :vocab]
    logits.copy_(torch.randn(rows, vocab, device="cuda") * scale)
    target = torch.randint(0, vocab, (rows,), device="cuda")
    target[:1] = -100
    return logits, target


def run(
    logits: Tensor,
    target: Tensor,
    scale: float | None,
    smoothing: float,
    gradient: bool,
    config: int,
    softcap: float = 0.0,
) -> Tensor:
    losses = torch.full(target.shape, float("nan"), device="cuda")
    factor = None if scale is None else torch.tensor(scale, device="cuda")
    OPS.cross_entropy_rows(logits, target, factor, -100, smoothing, softcap, gradient, config, losses)
    return losses


def exact(
    logits: Tensor, target: Tensor, scale: float, smoothing: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    capped = torch.tanh(wide / softcap) * softcap if softcap else wide
    losses = F.cross_entropy(capped, target, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum() * scale, wide)[0]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rows(vocab: int, dtype: torch.dtype) -> None:
    rows = 5 if vocab > 100_000 else 37
    for smoothing, scale, softcap in ((0.0, None, 0.0), (0.1, 0.25, 0.0), (0.1, 2.0, 5.0)):
        logits, target = logits_and_target(rows, vocab, dtype)
        losses, gradient = exact(logits, target, scale or 1.0, smoothing, softcap)
        for config in configs():
            written, before = logits.clone(memory_format=torch.preserve_format), logits.clone()
            padded = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device="cuda").copy_(written)
            alone = run(padded, target, scale, smoothing, False, config, softcap)
            assert torch.equal(padded, before), "the logits were changed without being asked to"
            both = run(padded, target, scale, smoothing, True, config, softcap)
            again = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device="cuda").copy_(written)
            assert torch.equal(run(again, target, scale, smoothing, True, config, softcap), both)
            assert torch.equal(padded, again), "two runs differ"
            for got in (alone, both):
                assert (got - losses).abs().max() <= 2e-5 * (1 + losses.abs().max())
            assert error(padded, gradient) <= 4 * rounding(dtype) + 1e-6


def test_extreme_logits() -> None:
    rows = [[1e4, -1e4, 0.0, 9.9e3], [float("-inf"), 1.0, 2.0, float("-inf")], [3e38, -3e38, 0.0, 0.0]]
    rows += [
        [float("nan"), 1.0, 2.0, 3.0],
        [float("inf"), 1.0, 2.0, 3.0],
        [float("-inf")] * 4,
        [-3e4, -3e4, -3e4, -3e4],
    ]
    logits = torch.tensor(rows, device="cuda")
    target = torch.tensor([3, 2, 0, 1, 1, 0, 2], device="cuda")
    losses, gradient = exact(logits, target, 1.0, 0.0)
    written = logits.clone()
    got = run(written, target, None, 0.0, True, -1)
    torch.testing.assert_close(got.double(), losses, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written.double(), gradient, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_target_outside_of_the_vocabulary_gives_nan() -> None:
    logits, _ = logits_and_target(4, 100, BF16)
    target = torch.tensor([-1, 100, 5, -100], device="cuda")
    losses = run(logits, target, None, 0.0, True, -1)
    assert losses.isnan().tolist() == [True, True, False, False] and losses[3] == 0
    assert logits[:2].isnan().all() and not logits[2:].isnan().any() and (logits[3] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [0, 1, 9, 100_003])
def test_scale(size: int, dtype: torch.dtype) -> None:
    for factor in (1.0, 0.3, float("nan")):
        tensor = torch.randn(size, device="cuda").to(dtype)
        expected = (tensor.float() * torch.tensor(factor)).to(dtype) if factor != 1.0 else tensor.clone()
        OPS.scale_unless_one(tensor, torch.full((1,), factor, device="cuda"))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def head(rows: tuple[int, ...], dim: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(*rows, dim, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, device="cuda") * 2 * dim**-0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocab, device="cuda").to(dtype).requires_grad_()
    target = torch.randint(0, vocab, rows, device="cuda")
    target.view(-1)[::7] = -100
    return x, weight, bias, target


@pytest.mark.parametrize("flags", [(-100, "mean", 0.0, True, 0.0), (-100, "sum", 0.1, False, 3.0)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "dim", "vocab"), [((3, 700), 64, 4099), ((1, 129), 72, 50257), ((4096,), 128, 5000)])
def test_chunks(
    rows: Any, dim: int, vocab: int, dtype: torch.dtype, flags: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_cross_entropy, "SHORT_CHUNK_ROWS", 256)
    *leaves, target = head(rows, dim, vocab, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for function, given in (
        (OPS.linear_cross_entropy, leaves),
        (op.linear_cross_entropy_ref, leaves),
        (op.linear_cross_entropy_ref, wide),
    ):
        loss = function(*given, target, *flags)
        results.append([loss, *torch.autograd.grad(loss, given)])
    for got, eager, reference in zip(*results):
        assert_close_to_fp64(got, eager, reference)
    again = OPS.linear_cross_entropy(*leaves, target, *flags)
    assert torch.equal(again, results[0][0])
    with torch.no_grad():
        alone = OPS.linear_cross_entropy(*leaves, target, *flags)
    assert torch.equal(alone, results[0][0])


def test_strides_are_those_of_the_fakes() -> None:
    x, weight, bias, target = (tensor.detach() for tensor in head((64, 3), 32, 4099, BF16))
    views = (x.transpose(0, 1), weight.t().contiguous().t(), bias, target.t())
    flags = (-100, "mean", 0.0, False, 0.0, True, True, True)
    got = OPS.linear_cross_entropy_fwd(*views, *flags)
    fakes = op.linear_cross_entropy_fwd_fake(*views, *flags)
    assert [(t.shape, t.stride(), t.dtype) for t in got] == [(t.shape, t.stride(), t.dtype) for t in fakes]
    packed = OPS.linear_cross_entropy_fwd(*(view.contiguous() for view in views), *flags)
    for one, other in zip(got, packed):
        torch.testing.assert_close(one, other)


def test_no_rows() -> None:
    x, weight, bias, target = head((0,), 16, 4099, BF16)
    loss = OPS.linear_cross_entropy(x, weight, bias, target, -100, "sum", 0.0, True)
    dx, dweight, dbias = torch.autograd.grad(loss, (x, weight, bias))
    assert loss == 0 and dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_cuda_graph() -> None:
    *leaves, target = (tensor.detach() for tensor in head((300,), 64, 4099, BF16))
    flags = (-100, "mean", 0.0, True, 2.0, True, True, True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = OPS.linear_cross_entropy_fwd(*leaves, target, *flags)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = OPS.linear_cross_entropy_fwd(*leaves, target, *flags)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


def test_refuses_what_the_kernel_cannot_take() -> None:
    logits, target = logits_and_target(4, 96, BF16)
    with pytest.raises(RuntimeError, match="cross_entropy_rows: rows of logits"):
        run(logits[:, 1:], target, None, 0.0, False, -1)
    with pytest.raises(RuntimeError, match=r"cross_entropy_rows: target.*expected contiguous int64 \[4\]"):
        run(logits, target.int(), None, 0.0, False, -1)
    with pytest.raises(RuntimeError, match="config, got 4, expected -1 to 3"):
        run(logits, target, None, 0.0, False, 4)
