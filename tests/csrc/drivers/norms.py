"""Norms, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tests.csrc.drivers.launches import OPS, Launch, configs, driver, padded, random, vector_of
from tests.ops.norm_forms import BF16, FEW, FORMS, FP16, FP32, Form


def _norm(
    form: Form, x: Tensor, operand: Tensor | None, config: int, offset: int = 0, kept: int | None = None
) -> Launch:
    """offset: of the weight and the bias. kept: how many results are asked for, all of them if None."""
    dtypes = [form.weight, form.bias] if "layer" in form.op else [form.weight]
    vectors = [vector_of(x.shape[-1], dtype=dtype, device=x.device, offset=offset) for dtype in dtypes]
    operand = operand if form.has_operand else None
    results = getattr(form.module, f"{form.op}_fwd_fake")(*form.arguments(x, operand, vectors))
    return partial(form.launch, x, operand, vectors, config, list(results[:kept]))


@driver
def norm(device: torch.device) -> Iterator[Launch]:
    for form in (FORMS[name] for name in FEW):
        yield from _norm_sizes(form, device)
        yield from _norm_views(form, device)


def _norm_sizes(form: Form, device: torch.device) -> Iterator[Launch]:
    make = partial(random, dtype=form.x, device=device)
    for dim in (7, 100, 896, 4096):
        for config in configs("norm"):
            yield _norm(form, make(5, dim), make(5, dim), config)
    for rows, dim in ((0, 64), (5, 0), (2, 20000), (2, 40000)):
        yield _norm(form, make(rows, dim), make(rows, dim), -1)
    outputs = 2 if form.op.startswith("add_") else 1
    yield _norm(form, make(5, 100), make(5, 100), -1, kept=outputs)
    yield _norm(form, make(5, 128), make(5, 128), -1, kept=outputs)


def _norm_views(form: Form, device: torch.device) -> Iterator[Launch]:
    """Padded rows; misaligned x, operand, weights."""
    make = partial(random, dtype=form.x, device=device)
    for dim in (100, 128):
        for config in configs("norm"):
            yield _norm(form, padded(5, dim, form.x, device), padded(5, dim, form.x, device), config)
        yield _norm(form, make(5, dim, offset=1), make(5, dim), -1)
        yield _norm(form, make(5, dim), make(5, dim, offset=1), -1)
        yield _norm(form, make(5, dim), make(5, dim), -1, offset=1)


@driver
def norm_groups(device: torch.device) -> Iterator[Launch]:
    """Gated norms of several groups a row."""
    for before in (True, False):
        form = Form("gated_rms_norm", BF16, BF16, None, (before, "silu", 4, False, False))
        for dim in (100, 512, 4096):
            for config in configs("norm"):
                yield _norm(form, padded(3, dim, BF16, device), padded(3, dim, BF16, device), config)


def _norm_backward(
    x: Tensor, dy: Tensor, weight: Tensor | None, config: int, *, has_dsum: bool, is_centered: bool
) -> partial[object]:
    rstd = random(*x.shape[:-1], dtype=FP32, device=x.device)
    statistics = (random(*x.shape[:-1], dtype=FP32, device=x.device) if is_centered else None, rstd)
    bias = weight if is_centered else None
    return partial(OPS.norm_backward, dy, dy if has_dsum else None, x, weight, bias, *statistics, 0.0, config)


@driver
def norm_backward(device: torch.device) -> Iterator[Launch]:
    """Of all four norms: with and without a mean, with and without the gradient of a residual sum."""
    for dtype, weight_dtype, is_centered, has_dsum in (
        (BF16, BF16, False, True),
        (BF16, FP32, True, False),
        (FP16, FP16, True, True),
        (FP32, FP32, False, False),
        (FP32, None, True, False),
    ):
        make = partial(random, dtype=dtype, device=device)
        launch = partial(_norm_backward, is_centered=is_centered, has_dsum=has_dsum)
        weight = partial(vector_of, dtype=weight_dtype, device=device)
        for dim in (7, 64, 100, 896, 4096):
            vector = weight(dim)
            for config in configs("norm_backward"):
                yield launch(make(21, dim), make(21, dim), vector, config)
            yield launch(padded(21, dim, dtype, device), padded(21, dim, dtype, device), vector, -1)
        for rows, dim in ((0, 64), (5, 0), (700, 64), (3, 20000)):  # 700: each CTA takes several rows
            yield launch(make(rows, dim), make(rows, dim), weight(dim), -1)
        for dim in (100, 128):
            yield launch(make(21, dim, offset=1), make(21, dim), weight(dim), -1)
            yield launch(make(21, dim), make(21, dim, offset=1), weight(dim), -1)
            yield launch(make(21, dim), make(21, dim), weight(dim, offset=1), -1)


@driver
def norm_backward_sums(device: torch.device) -> Iterator[Launch]:
    """Of gradients in several terms; with eps as a minimum; dx in the place of a term."""
    for dtype, weight_dtype, is_centered, has_dsum in (
        (BF16, BF16, False, True),
        (FP16, FP32, True, False),
        (FP32, FP32, False, False),
    ):
        make = partial(random, dtype=dtype, device=device)
        minimum = 0.0 if is_centered else 1.0
        for dim in (7, 100, 896, 4096):
            weight = random(dim, dtype=weight_dtype, device=device)
            for config in configs("norm_backward"):
                x, dy, dy_1, dy_2 = (make(21, dim) for _ in range(4))
                plain = _norm_backward(x, dy, weight, config, has_dsum=has_dsum, is_centered=is_centered)
                yield partial(plain, dy_1, None, minimum)
                yield partial(plain, dy_1, dy_2)
                yield partial(OPS.norm_backward_into, dy_1, *plain.args, dy_1)


@driver
def gated_norm_backward(device: torch.device) -> Iterator[Launch]:
    """The gate in front and behind, both activations, gradients in up to three terms."""
    for dtype, weight_dtype, gate_first in (
        (BF16, BF16, True),
        (BF16, FP32, False),
        (FP16, None, True),
        (FP32, FP32, False),
    ):
        make = partial(random, dtype=dtype, device=device)
        for dim in (7, 100, 896, 4096):
            weight = vector_of(dim, dtype=weight_dtype, device=device)
            rstd = random(21, dtype=FP32, device=device)
            for config in configs("norm_backward"):
                dy, x, gate, dy_1, dy_2 = (make(21, dim) for _ in range(5))
                yield partial(OPS.gated_norm_backward, dy, x, gate, weight, rstd, gate_first, True, config)
                terms = (dy_1, dy_2)
                yield partial(OPS.gated_norm_backward, dy, x, gate, weight, rstd, gate_first, False, config, *terms)
            views = [padded(21, dim, dtype, device) for _ in range(3)]
            yield partial(OPS.gated_norm_backward, *views, weight, rstd, gate_first, True, -1)
        yield partial(OPS.gated_norm_backward, *(make(0, 64) for _ in range(3)), None, make(0).float(), True, True, -1)
