"""Linears of few rows, gate and up of many, and the gradients of gated MLPs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from infuse.ops import gated_backward_kernels, gated_linear_kernels, skinny_linear_kernels
from infuse.ops.gated_linear_kernels import ACTIVATIONS
from tests.csrc.drivers.launches import OPS, Launch, configs, driver, if_it_can, padded, random, vector_of
from tests.ops.norm_forms import BF16, FP16, FP32


@driver
def skinny_linear(device: torch.device) -> Iterator[Launch]:
    """Rows of every kind of product, with each prologue and epilogue; odd sizes, packed weights, padded rows."""
    # Rows, columns, features of each weight, dtype, that of results, whether norm and residual come first, activation.
    problems = (
        (1, 896, (100, 8, 33), BF16, BF16, True, ""),
        (1, 896, (100,), BF16, FP32, True, ""),
        (5, 264, (77, 77), FP16, FP16, True, "silu"),
        (5, 264, (77,), FP16, FP32, True, ""),
        (12, 200, (77, 77), BF16, BF16, False, "gelu_tanh"),
        (64, 328, (96,), FP16, FP16, True, ""),
        (64, 328, (96,), BF16, FP32, True, ""),
    )
    for rows, dim, features, dtype, out_dtype, norm, activation in problems:
        for config in configs(skinny_linear_kernels.FAMILY):
            x = padded(rows, dim, dtype, device)
            weights = [padded(count, dim, dtype, device) for count in features]
            biases = [vector_of(count, dtype=dtype, device=device) for count in features]
            outs = [torch.empty(rows, count, dtype=out_dtype, device=device) for count in features]
            given = {"residual": padded(rows, dim, dtype, device), "norm": True} if norm else {}
            if norm:
                given["norm_weight"] = vector_of(dim, dtype=dtype, device=device)
                given["sum_out"] = torch.empty(rows, dim, dtype=dtype, device=device)
            given["addend"] = random(rows, features[0], dtype=dtype, device=device)
            outs = outs[:1] if activation else outs
            yield partial(
                skinny_linear_kernels.run, x, weights, outs, biases, activation=activation, config=config, **given
            )


@driver
def split_norm(device: torch.device) -> Iterator[Launch]:
    """A norm that begins in one launch and ends in the next."""
    for rows, dim, inputs, features in ((12, 48, 200, (77, 77)), (33, 896, 264, (100, 8, 33))):
        for config in configs(skinny_linear_kernels.FAMILY):
            x, weight = padded(rows, inputs, BF16, device), padded(dim, inputs, BF16, device)
            addend = random(rows, dim, dtype=BF16, device=device)
            total, scaled = (torch.empty(rows, dim, dtype=BF16, device=device) for _ in range(2))
            squares = torch.empty(rows, dim // 4, device=device)
            written = {"scaled_out": scaled, "squares_out": squares}
            norm_weight = vector_of(dim, dtype=BF16, device=device)
            run = partial(skinny_linear_kernels.run, config=config)
            yield partial(
                if_it_can, partial(run, x, [weight], [total], addend=addend, norm_weight=norm_weight, **written)
            )
            behind = [padded(count, dim, BF16, device) for count in features]
            outs = [torch.empty(rows, count, dtype=BF16, device=device) for count in features]
            if len(behind) == 2:
                yield partial(
                    if_it_can, partial(run, scaled, behind, outs[:1], squares=squares, eps=1e-5, activation="silu")
                )
            yield partial(if_it_can, partial(run, scaled, behind, outs, squares=squares, eps=1e-5))


@driver
def gated_linear(device: torch.device) -> Iterator[Launch]:
    """Tiles that end within rows, columns and the inner dimension, both ways that weights lie, groups, biases."""
    sizes = itertools.cycle([(300, 200, 520), (70, 72, 264), (0, 64, 8)])
    for dtype, (rows, dim, columns) in zip((BF16, FP16, BF16), sizes):
        x = padded(rows, dim, dtype, device)
        packed = random(columns, 2, dim, dtype=dtype, device=device)
        across = random(2, dim, columns, dtype=dtype, device=device).transpose(1, 2)
        biases = [random(columns, dtype=dtype, device=device) for _ in range(2)]
        experts = [random(3, columns, dim, dtype=dtype, device=device) for _ in range(2)]
        ends = torch.tensor([rows // 2, rows // 2, rows - rows // 8], dtype=torch.int32).to(device)
        for config, activation in zip(configs(gated_linear_kernels.NAME), itertools.cycle(ACTIVATIONS)):
            for weights, given, groups in (
                ((packed[:, 0], packed[:, 1]), biases, None),
                ((packed[:, 0], packed[:, 1]), (None, None), None),
                (across.unbind(), (None, None), None),
                (experts, (None, None), ends),
            ):
                results = [torch.empty(rows, size, dtype=dtype, device=device) for size in (columns, 2 * columns)]
                arguments = (x, *weights, *given, groups, activation, config)
                yield partial(if_it_can, OPS.gated_linear_out, *arguments, results[0], None)
                yield partial(if_it_can, OPS.gated_linear_out, *arguments, *results)


@driver
def gated_backward(device: torch.device) -> Iterator[Launch]:
    """Wide and narrow accesses; with and without the product again."""
    family = gated_backward_kernels.GATED_BACKWARD
    for dtype, activation in ((BF16, "silu"), (FP16, "gelu_tanh"), (BF16, "gelu_erf")):
        make = partial(random, dtype=dtype, device=device)
        for rows, dim in ((0, 8), (5, 7), (9, 136), (3, 1000)):
            for config in configs(family):
                for offset in (0, 1):
                    dout, gate_up = make(rows, dim, offset=offset), padded(rows, 2 * dim, dtype, device)
                    written = torch.empty(rows, 2 * dim, dtype=dtype, device=device), torch.empty_like(dout)
                    yield partial(OPS.gated_backward_out, dout, gate_up, activation, config, *written)
                    yield partial(OPS.gated_backward_out, dout, gate_up, activation, config, written[0], None)
    yield from _gated_backward_gemms(device)


def _gated_backward_gemms(device: torch.device) -> Iterator[Launch]:
    """Tiles that are not full along any dimension; packed weights; several tiles for a CTA."""
    for dtype, activation in ((BF16, "silu"), (FP16, "gelu_tanh")):
        make = partial(random, dtype=dtype, device=device)
        for rows, dim, features in ((0, 8, 8), (5, 24, 72), (150, 264, 136), (300, 64, 8000)):
            gate_up, dgate_up, out = (make(rows, n) for n in (2 * features, 2 * features, features))
            for config in configs(gated_backward_kernels.GEMMS):
                dy, packed = padded(rows, dim, dtype, device), make(2 * features, dim)
                down = OPS.linear_gated_backward_out
                yield partial(down, dy, make(dim, features), gate_up, activation, config, dgate_up, out)
                yield partial(down, dy, make(dim, features), gate_up, activation, config, dgate_up, None)
                weights = packed[0::2], packed[1::2]
                yield partial(OPS.linear_pair_out, make(rows, 2 * features), *weights, config, make(rows, dim))
