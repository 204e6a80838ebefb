"""The loss of a language model's head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

import infuse.ops.cross_entropy_kernels  # noqa: F401, defines its operators
from tests.csrc.drivers.launches import OPS, Launch, configs, driver, random
from tests.ops.norm_forms import BF16, FP16, FP32


@driver
def cross_entropy(device: torch.device) -> Iterator[Launch]:
    """Every dtype, with and without the gradient, rows that fit in shared memory and rows that do not."""
    for dtype, vocab, smoothing in itertools.product((BF16, FP16, FP32), (1, 7, 100, 1003, 130_000), (0.0, 0.1)):
        rows = 2 if vocab > 100_000 else 5
        target = torch.arange(rows).clamp(max=vocab - 1)
        target[0] = -100
        losses, factor = torch.empty(rows, device=device), torch.ones((), device=device)
        for gradient, config in itertools.product((False, True), configs("cross_entropy")):
            logits = random(rows, -(-vocab // 8) * 8, dtype=dtype, device=device)[:, :vocab]
            flags = (-100, smoothing, 30.0 * smoothing, gradient, config)
            yield partial(OPS.cross_entropy_rows, logits, target.to(device), factor, *flags, losses)
    for dtype, size in itertools.product((BF16, FP16, FP32), (0, 1, 1003, 100_000)):
        tensor = random(size, dtype=dtype, device=device)
        yield partial(OPS.scale_unless_one, tensor, torch.full((1,), 0.5).to(device))
