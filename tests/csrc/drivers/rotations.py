"""Rotary embedding and the write into a cache, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import infuse.ops.qk_norm_rope_bwd  # noqa: F401, defines its operators
from infuse.ops import rope_kernels
from tests.csrc.drivers.launches import EPS, OPS, Launch, configs, driver, random, vector_of
from tests.ops.norm_forms import BF16, FP16, FP32

PLAIN = (False, False, False, False)  # interleaved, per_pair, inverse, upcast
SIZES = ((128, 128), (80, 32), (20, 6), (100, 14))  # head_dim, rotary_dim


def _tables(tokens: int, rotary_dim: int, dtype: torch.dtype, device: torch.device, *, per_pair: bool) -> list[Tensor]:
    """cos and sin [tokens, 1, R], or [tokens, 1, R / 2]."""
    return [random(tokens, 1, rotary_dim // (2 if per_pair else 1), dtype=dtype, device=device) for _ in range(2)]


def _rope(
    x: Tensor,
    other: Tensor | None,
    tables: list[Tensor],
    flags: tuple[bool, ...] = PLAIN,
    config: int = -1,
    *,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float | None = None,
    is_backward: bool = False,
) -> Launch:
    outs = (torch.empty_like(x), None if other is None else torch.empty_like(other))
    return partial(OPS.rope_out, x, other, *tables, *weights, eps, 0.0, False, *flags, is_backward, config, *outs)


@driver
def rope(device: torch.device) -> Iterator[Launch]:
    """Rotations of q and k in a packed projection, with and without q/k norms."""
    for dtype, table_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)):
        make = partial(random, dtype=dtype, device=device)
        for dim, rotary_dim in SIZES:
            q, k, _ = make(2, 7, 5 + 2 + 2, dim).split((5, 2, 2), dim=2)
            weights = (make(dim), make(dim))
            for config in configs(rope_kernels.NAME):
                for flags in (PLAIN, (True, True, False, False), (False, True, True, True)):
                    tables = _tables(7, rotary_dim, table_dtype, device, per_pair=flags[1])
                    yield _rope(q, k, tables, flags, config)
                    yield _rope(q, k, tables, flags, config, weights=weights, eps=EPS)
        tables = _tables(7, 128, table_dtype, device, per_pair=False)
        yield _rope(make(2, 7, 5, 128), None, tables, is_backward=True)
        yield _rope(make(7, 5, 128, offset=1), None, tables)
        yield _rope(make(7, 5, 128), None, [make(7, 1, 128, offset=1), make(7, 1, 128, offset=1)])
        yield _rope(make(7, 5, 128), None, tables, weights=(make(128, offset=1), None), eps=EPS)
        yield _rope(make(7, 5, 128), None, tables, eps=EPS)
        yield _rope(make(7, 0, 128), None, tables)


@driver
def rope_cache_write(device: torch.device) -> Iterator[Launch]:
    """q rotated, k rotated into its cache and v copied into its own."""
    for dtype, table_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)):
        make = partial(random, dtype=dtype, device=device)
        for (dim, rotary_dim), (batch, tokens) in zip(SIZES, ((1, 1), (2, 3), (4, 1), (2, 7))):
            packed = make(batch, tokens, 5 + 2 + 2, dim).transpose(1, 2)
            q, k, v = packed.split((5, 2, 2), dim=1)
            tables = [table.squeeze(1) for table in _tables(tokens, rotary_dim, table_dtype, device, per_pair=False)]
            for config in configs(rope_kernels.NAME):
                for norm, index in (((None, None, None), torch.int64), ((make(dim), make(dim), EPS), torch.int32)):
                    positions = torch.randperm(9)[:tokens].to(index).to(device)
                    caches = [torch.empty(batch, 2, 9, dim, dtype=dtype, device=device) for _ in range(2)]
                    yield partial(
                        OPS.rope_cache_write_out,
                        *(q, k, v, *tables, *tables, positions, positions),
                        *(*norm, 0.0, False, *PLAIN, config, *caches, torch.empty_like(q)),
                    )


@driver
def qk_norm_rope_backward(device: torch.device) -> Iterator[Launch]:
    """Of q and k in one launch, of one alone, with and without weights; what has no vectors has no kernel."""
    for dtype, table_dtype, weight_dtype in (
        (BF16, BF16, BF16),
        (BF16, FP32, FP32),
        (FP16, FP16, None),
        (FP32, FP32, FP32),
    ):
        make = partial(random, dtype=dtype, device=device)
        for dim, rotary_dim in ((128, 128), (80, 32), (256, 256)):
            q, k, _ = make(2, 37, 5 + 2 + 2, dim).split((5, 2, 2), dim=2)
            for flags in itertools.product((False, True), (False, True), (False, True), (False,)):
                tables = _tables(37, rotary_dim, table_dtype, device, per_pair=flags[1])
                weights = [vector_of(dim, dtype=weight_dtype, device=device) for _ in range(2)]
                dweights = [None if weight is None else torch.empty_like(weight) for weight in weights]
                dys = [make(*x.shape) for x in (q, k)]
                dxs = [torch.empty_like(x) for x in (q, k)]
                numbers = (EPS, 1.0, *flags)
                yield partial(
                    OPS.qk_norm_rope_bwd_out,
                    *(dys[0], q, dys[1], k, *tables, *weights, *numbers, *dxs, *dweights),
                )
                yield partial(
                    OPS.qk_norm_rope_bwd_out,
                    *(dys[0], q, None, None, *tables, weights[0], None, *numbers, dxs[0], None, dweights[0], None),
                )
