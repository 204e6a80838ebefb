"""The loss of a language model's head on a GPU, compiled: the right gradients, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import infuse
from infuse.ops import chunked_cross_entropy
from tests.tolerances import assert_close_to_fp64

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

VOCAB, DIM = 8192, 128


def loss_of(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float().view(-1, VOCAB), target.view(-1))


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, rows // 2, DIM, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, DIM, device="cuda") * DIM**-0.5).bfloat16().requires_grad_()
    return x, weight, torch.randint(0, VOCAB, (2, rows // 2), device="cuda")


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach().clone(), *(grad.clone() for grad in torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_gradients(mode: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_cross_entropy, "SHORT_CHUNK_ROWS", 256)
    x, weight, target = inputs(1024)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    reference = gradients(F.cross_entropy(F.linear(*wide).view(-1, VOCAB), target.view(-1)) * factor, *wide)
    eager = gradients(loss_of(x, weight, target) * factor, x, weight)
    options: Any = {"infuse.kernels": "always"} if mode == "default" else None
    with infuse.override(kernels="always"):
        compiled = torch.compile(
            lambda *args: loss_of(*args) * factor, backend="infuse", options=options, mode=None if options else mode
        )
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = gradients(compiled(x, weight, target), x, weight)
    for got, old, exact in zip(found, eager, reference):
        assert_close_to_fp64(got, old, exact)
    assert infuse.last_report().rewritten == {"linear_cross_entropy": 1}
    assert infuse.last_report().sites[0].kernel == "kernel, in chunks of rows, with the gradients"


def test_step_takes_less_memory() -> None:
    x, weight, target = inputs(16384)
    peaks = []
    for backend in ("inductor", "infuse"):
        torch._dynamo.reset()
        with infuse.override(kernels="always"):
            compiled = torch.compile(loss_of, backend=backend)
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.autograd.grad(compiled(x, weight, target), (x, weight))
                peaks.append(torch.cuda.max_memory_allocated() - before)
    logits = 2 * 16384 * VOCAB
    assert peaks[1] > logits and peaks[3] < logits / 4
