"""Launches of every CUDA kernel on small tensors, for compute-sanitizer to watch (test_sanitizer.py).

`python -m tests.csrc.kernel_drivers FAMILY [--skip-memory-barriers]` runs one family. Only the kernels under test run
on the GPU: inputs are made on the CPU and results are left as they were allocated, so that initcheck knows every byte
that a kernel may read.

To add a family, or a new operator of one: a function under `@driver` that takes the device and yields the launches,
each a call without arguments (`partial(operator, ...)`). test_sanitizer.py runs all functions of this file; without a
GPU it still checks that each launch fits its operator's schema. A driver should take every configuration, the 16-byte
path and the narrow one, odd sizes, no rows at all, views with padding, misaligned addresses and each dtype, and stay
below a thousand launches, which is a few seconds under the slowest tool.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import infuse.ops.cross_entropy_kernels
import infuse.ops.qk_norm_rope_bwd  # noqa: F401, defines its operators
from infuse.ops import (
    attention_backward_kernels,
    attention_kernels,
    gated_backward_kernels,
    gated_linear_kernels,
    library,
    rope_kernels,
    skinny_linear_kernels,
)
from infuse.ops.attention_tile_map import tile_map_ref
from infuse.ops.gated_linear_kernels import ACTIVATIONS
from tests.ops.norm_forms import BF16, FEW, FORMS, FP16, FP32, Form

Launch = Callable[[], object]
Driver = Callable[[torch.device], Iterator[Launch]]

OPS = torch.ops.infuse
EPS = 1e-5
DRIVERS: dict[str, Driver] = {}


def driver(function: Driver) -> Driver:
    """Enter a driver under its name."""
    DRIVERS[function.__name__] = function
    return function


# How the names of configurations begin whose warps hand tiles over at barriers in shared memory.
_WITH_MEMORY_BARRIERS = ("wgmma", "warp")
_skip_memory_barriers = False


def configs(family: str) -> list[int]:
    """-1, where the launcher chooses, and every configuration."""
    names = library.configurations(family)
    if _skip_memory_barriers:
        return [number for number, name in enumerate(names) if not name.startswith(_WITH_MEMORY_BARRIERS)]
    return list(range(-1, len(names)))


def random(*shape: int, dtype: torch.dtype, device: torch.device, offset: int = 0) -> Tensor:
    """Behind as many elements as `offset` says, at the end of its memory."""
    storage = torch.randn(math.prod(shape) + offset).to(dtype).to(device)
    return storage[offset:].view(shape)


def padded(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that are followed by as much as they are long."""
    return random(rows, 2 * dim, dtype=dtype, device=device)[:, :dim]


def _vector(dim: int, *, dtype: torch.dtype | None, device: torch.device, offset: int = 0) -> Tensor | None:
    return None if dtype is None else random(dim, dtype=dtype, device=device, offset=offset)


def run(family: str, device: torch.device, skip_memory_barriers: bool = False) -> int:
    """How many launches there were."""
    global _skip_memory_barriers
    _skip_memory_barriers = skip_memory_barriers
    launches = 0
    for launch in DRIVERS[family](device):
        launch()
        launches += 1
    return launches


# ---- norm ----


def _norm(
    form: Form, x: Tensor, operand: Tensor | None, config: int, offset: int = 0, kept: int | None = None
) -> Launch:
    """offset: of the weight and the bias. kept: how many results are asked for, all of them if None."""
    dtypes = [form.weight, form.bias] if "layer" in form.op else [form.weight]
    vectors = [_vector(x.shape[-1], dtype=dtype, device=x.device, offset=offset) for dtype in dtypes]
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


# ---- norm_backward ----


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
        weight = partial(_vector, dtype=weight_dtype, device=device)
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
            weight = _vector(dim, dtype=weight_dtype, device=device)
            rstd = random(21, dtype=FP32, device=device)
            for config in configs("norm_backward"):
                dy, x, gate, dy_1, dy_2 = (make(21, dim) for _ in range(5))
                yield partial(OPS.gated_norm_backward, dy, x, gate, weight, rstd, gate_first, True, config)
                terms = (dy_1, dy_2)
                yield partial(OPS.gated_norm_backward, dy, x, gate, weight, rstd, gate_first, False, config, *terms)
            views = [padded(21, dim, dtype, device) for _ in range(3)]
            yield partial(OPS.gated_norm_backward, *views, weight, rstd, gate_first, True, -1)
        yield partial(OPS.gated_norm_backward, *(make(0, 64) for _ in range(3)), None, make(0).float(), True, True, -1)


# ---- rope ----

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
                weights = [_vector(dim, dtype=weight_dtype, device=device) for _ in range(2)]
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


# ---- attention_decode ----


@driver
def attention_decode(device: torch.device) -> Iterator[Launch]:
    """Rows of one to four warps, splits in clusters and behind a second kernel, masks of each kind and alignment."""
    problems = ((BF16, 64, 64, 1, 700), (FP16, 128, 72, 16, 333), (BF16, 128, 128, 3, 260), (BF16, 256, 256, 2, 100))
    for turn, (dtype, dim, dim_v, queries, keys) in enumerate(problems):
        q = random(2, queries, 8, dim, dtype=dtype, device=device).transpose(1, 2)
        k, v = (random(2, 2, keys, size, dtype=dtype, device=device) for size in (dim, dim_v))
        every = ((config, 0) for config in configs(attention_kernels.DECODE))
        masks = itertools.cycle([*_attention_masks(queries, keys, dtype, device), None])
        for (config, splits), mask in zip((*every, (0, 5), (1, 2)), itertools.islice(masks, turn, None)):
            out = torch.empty(2, queries, 8, dim_v, dtype=dtype, device=device).transpose(1, 2)
            given = (q, k, v, mask, 0.1, False, 0.0, None, True, config, splits, out)
            yield partial(_if_it_can, OPS.attention_decode_out, *given)


@driver
def attention_forward(device: torch.device) -> Iterator[Launch]:
    """Rows of one block and of several, ragged tiles, splits, masks of each kind with and without a map, dropout."""
    seed = torch.tensor([3, 5]).to(device)
    for dtype, dim, dim_v in ((BF16, 64, 64), (FP16, 96, 72), (BF16, 128, 128), (BF16, 192, 128), (FP16, 256, 256)):
        for queries, keys in ((70, 200), (300, 130)):
            q = random(2, queries, 4, dim, dtype=dtype, device=device).transpose(1, 2)
            k, v = (random(2, 2, keys, size, dtype=dtype, device=device) for size in (dim, dim_v))
            masks = [*_attention_masks(queries, keys, dtype, device, heads=4), None]
            maps = [None if mask is None else tile_map_ref(mask.cpu(), queries, keys).to(device) for mask in masks]
            every = (*((config, 0) for config in configs(attention_kernels.FORWARD)), (0, 3))
            for (config, splits), (mask, tiles) in zip(every, itertools.cycle(zip(masks, maps))):
                out = torch.empty(2, queries, 4, dim_v, dtype=dtype, device=device).transpose(1, 2)
                lse = torch.empty(2, 4, queries, dtype=FP32, device=device)
                given = (q, k, v, mask, tiles, 0.1, mask is None, 0.0, None, True)
                yield partial(_if_it_can, OPS.attention_forward_out, *given, 0.0, None, config, splits, out, lse)
            yield partial(OPS.attention_forward_out, *given, 0.1, seed, 0, 0, out, None)


@driver
def attention_backward(device: torch.device) -> Iterator[Launch]:
    """One block and several, ragged ones, heads split among CTAs, in turns and not, masks with a map, dropout."""
    seed = torch.tensor([3, 5]).to(device)
    modes = itertools.cycle([(0.0, False), (0.0, True), (0.1, True)])
    sizes = ((70, 200), (300, 130))
    for dtype, dim, dim_v in ((BF16, 64, 64), (FP16, 96, 72), (BF16, 128, 128), (BF16, 192, 128), (FP16, 256, 256)):
        for queries, keys in (*sizes, (0, 5), (5, 0)) if dim == 64 else sizes:
            q, dout, out = (
                random(2, queries, 4, size, dtype=dtype, device=device).transpose(1, 2) for size in (dim, dim_v, dim_v)
            )
            k, v = (random(2, 2, keys, size, dtype=dtype, device=device) for size in (dim, dim_v))
            lse = random(2, 4, queries, dtype=FP32, device=device)
            every = _attention_masks(queries, keys, dtype, device, heads=4) if queries and keys else []
            masks = itertools.cycle([None, *every])
            for config, mask, (p, deterministic) in zip(configs(attention_backward_kernels.BACKWARD), masks, modes):
                tiles = None if mask is None else tile_map_ref(mask.cpu(), queries, keys).to(device)
                results = [torch.empty(tensor.shape, dtype=dtype, device=device) for tensor in (q, k, v)]
                given = (dout, q, k, v, out, lse, mask, tiles, 0.1, mask is None, 0.0, None, p, seed if p else None)
                yield partial(_if_it_can, OPS.attention_backward_out, *given, deterministic, config, *results)


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
                yield partial(_if_it_can, OPS.gated_linear_out, *arguments, results[0], None)
                yield partial(_if_it_can, OPS.gated_linear_out, *arguments, *results)


def _if_it_can(operator: Launch, *args: object) -> object:
    """The call, if the configuration takes the shape."""
    try:
        return operator(*args)
    except RuntimeError as error:
        if "configuration" not in str(error):
            raise
        return None


@driver
def attention_tile_map(device: torch.device) -> Iterator[Launch]:
    """Masks of each kind and alignment, sizes that tiles do not divide."""
    for dtype in (BF16, FP16):
        for queries, keys in ((1, 1), (70, 200), (300, 1030), (5, 0)):
            for mask in _attention_masks(queries, keys, dtype, device):
                yield partial(OPS.attention_tile_map, mask, queries, keys)


def _attention_masks(queries: int, keys: int, dtype: torch.dtype, device: torch.device, heads: int = 8) -> list[Tensor]:
    seen = torch.rand(2, 1, queries, keys + 3) < 0.3
    every = torch.rand(1, heads, queries, keys).log().to(dtype)
    return [seen.to(device)[..., 3:], seen.float().log().to(device)[..., :keys], every.to(device)]


# ---- cross_entropy ----


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


# ---- gated_backward ----


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


# ---- skinny_linear ----


@driver
def skinny_linear(device: torch.device) -> Iterator[Launch]:
    """Rows of every kind of product, with each prologue and epilogue; odd sizes, packed weights, padded rows."""
    # Rows, columns, features of each weight, dtype, whether there is a norm with a residual, activation.
    problems = (
        (1, 896, (100, 8, 33), BF16, True, ""),
        (5, 264, (77, 77), FP16, True, "silu"),
        (12, 200, (77, 77), BF16, False, "gelu_tanh"),
        (64, 328, (96,), FP16, True, ""),
    )
    for rows, dim, features, dtype, norm, activation in problems:
        for config in configs(skinny_linear_kernels.FAMILY):
            x = padded(rows, dim, dtype, device)
            weights = [padded(count, dim, dtype, device) for count in features]
            biases = [_vector(count, dtype=dtype, device=device) for count in features]
            outs = [torch.empty(rows, count, dtype=dtype, device=device) for count in features]
            given = {"residual": padded(rows, dim, dtype, device), "norm": True} if norm else {}
            if norm:
                given["norm_weight"] = _vector(dim, dtype=dtype, device=device)
                given["sum_out"] = torch.empty(rows, dim, dtype=dtype, device=device)
            given["addend"] = random(rows, features[0], dtype=dtype, device=device)
            outs = outs[:1] if activation else outs
            yield partial(
                skinny_linear_kernels.run, x, weights, outs, biases, activation=activation, config=config, **given
            )


if __name__ == "__main__":
    absent = library.missing(torch.device("cuda"))
    if absent:
        raise SystemExit(absent)
    count = run(sys.argv[1], torch.device("cuda"), "--skip-memory-barriers" in sys.argv)
    torch.cuda.synchronize()
    print(f"{count} launches")
