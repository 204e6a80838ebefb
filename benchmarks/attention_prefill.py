"""Attention of many query rows, 32 query and 8 K/V heads of 128: prefill behind causal flags and masks.

    python benchmarks/attention_prefill.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

The floor is arithmetic: four operations for each pair of a query and a key that it sees and each of the head's numbers,
at the rate of a large product of matrices. FlashAttention-3 reaches 85% to 90% of that, cuDNN, which SDPA picks on
Hopper, 65% to 80%. Behind a dense mask SDPA reads every element of it and computes every score; a map of the mask's
tiles says what can be left out, so that a causal mask should cost little more than the causal flag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from attention_functions import (
    BACKENDS,
    flash_attention_3,
    forward_kernel,
    hand_written,
    hand_written_causal,
    sdpa,
    sdpa_causal,
    with_backend,
    written_out,
)
from command import main
from harness import Case, Device, Function, Impl, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS
from norms import random
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))
SETS = 2  # of inputs: a call takes longer than a cache lasts


@dataclass(frozen=True, slots=True)
class Shape:
    batch: int
    queries: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        rows = f"{self.queries}" if self.queries == self.keys else f"{self.queries} of {self.keys}"
        return f"b{self.batch} {rows}" + ("" if self.head_dim == 128 else f" D{self.head_dim}")

    def inputs(self, g: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """As projections leave them: the heads lie inside."""
        q = random(g, dtype, self.batch, self.queries, self.heads, self.head_dim).transpose(1, 2)
        k, v = (random(g, dtype, self.batch, self.keys, self.kv_heads, self.head_dim).transpose(1, 2) for _ in range(2))
        return q, k, v

    def bytes(self, itemsize: int) -> int:
        rows = 2 * self.heads * self.queries + 2 * self.kv_heads * self.keys
        return self.batch * rows * self.head_dim * itemsize

    def flops(self, pairs: int) -> int:
        """pairs: of a query and a key that it sees, of one head."""
        return 4 * self.batch * self.heads * pairs * self.head_dim


def case(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    mask: Callable[[torch.device], Tensor] | None,
    impls: list[Impl],
    *,
    pairs: int,
    author: Function = sdpa,
    reference: Function = written_out,
) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        tensors = shape.inputs(g, dtype)
        return tensors if mask is None else (*tensors, mask(g.device))

    size, flops = shape.bytes(dtype.itemsize), shape.flops(pairs)
    named = f"{name} {shape}"
    return Case(named, inputs, author, reference, impls, bytes=size, flops=flops, dtype=dtype, sets=SETS)


def positions(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the queries [S, 1], which are the last ones, and of the keys [T]."""
    keys = torch.arange(shape.keys, device=device)
    return keys[shape.keys - shape.queries :, None], keys


def causal_mask(shape: Shape, device: torch.device) -> Tensor:
    queries, keys = positions(shape, device)
    return (keys <= queries)[None, None].contiguous()


def window_mask(shape: Shape, width: int, device: torch.device) -> Tensor:
    queries, keys = positions(shape, device)
    return ((keys <= queries) & (keys > queries - width))[None, None].contiguous()


def additive_mask(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As transformers makes them: the smallest number where nothing is seen."""
    seen = causal_mask(shape, device)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def slopes_mask(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """ALiBi (Press et al. 2022) of every head, causal."""
    queries, keys = positions(shape, device)
    slopes = 2.0 ** (-8.0 * torch.arange(1, shape.heads + 1, device=device) / shape.heads)
    bias = slopes[:, None, None] * (keys - queries)
    return torch.where(keys <= queries, bias, -math.inf)[None].to(dtype)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Gemma 2's code: a cap on the scores, causal."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = torch.tanh(scores / 50.0) * 50.0
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def flex(shape: Shape) -> Impl:
    """FlexAttention with a block mask, which says before what can be left out."""

    def prepare() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask

        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.queries, shape.keys, device="cuda")
        attend = torch.compile(flex_attention, dynamic=False)

        def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            return attend(q, k, v, block_mask=block_mask, enable_gqa=True)  # type: ignore[no-any-return]

        return run

    return Impl("flex-attention", prepare, note="block mask made before")


def competitors(author: Function, on_gpu: bool, *, is_causal: bool = False) -> list[Impl]:
    """Eager, stock and Infuse in two modes, SDPA's backends that take no mask and the raw kernel."""
    impls = [eager(author), *compiled_pairs(author, *MODES)]
    if on_gpu and is_causal:
        impls += [with_backend(name, author) for name in BACKENDS]
    return [*impls, forward_kernel(is_causal=is_causal)] if on_gpu else impls


def full_case(shape: Shape, dtype: torch.dtype, on_gpu: bool) -> Case:
    impls = competitors(sdpa, on_gpu)
    impls += [*(with_backend(name, sdpa) for name in BACKENDS), flash_attention_3(is_causal=False)] if on_gpu else []
    return case("full", shape, dtype, None, impls, pairs=shape.queries * shape.keys)


def causal_case(shape: Shape, dtype: torch.dtype, on_gpu: bool) -> Case:
    reference = partial(written_out, is_causal=True)
    impls = competitors(sdpa_causal, on_gpu, is_causal=True)
    impls += [flash_attention_3(is_causal=True), flex(shape)] if on_gpu else []
    pairs = shape.queries * (shape.queries + 1) // 2
    return case("causal", shape, dtype, None, impls, pairs=pairs, author=sdpa_causal, reference=reference)


def masked_cases(shape: Shape, dtype: torch.dtype, on_gpu: bool) -> Iterator[Case]:
    """A causal mask in the forms that models have it in."""
    pairs = shape.queries * (shape.queries + 1) // 2
    masked = competitors(sdpa, on_gpu)
    if on_gpu:  # what the flag costs in the same run, and the layers behind the first that share the mask
        flag = forward_kernel("infuse-kernel-causal-flag", is_causal=True)
        masked += [_without_mask(flag), forward_kernel("infuse-kernel-map-given", map_given=True)]
    yield case("causal bool mask", shape, dtype, partial(causal_mask, shape), masked, pairs=pairs)
    additive = partial(additive_mask, shape, dtype)
    yield case("causal additive mask", shape, dtype, additive, competitors(sdpa, on_gpu), pairs=pairs)
    by_hand = [eager(hand_written), *compiled_pairs(hand_written, *MODES)]
    yield case("written out, additive mask", shape, dtype, additive, by_hand, pairs=pairs, author=hand_written)
    reference = partial(written_out, is_causal=True)
    by_hand = [eager(hand_written_causal), *compiled_pairs(hand_written_causal, *MODES)]
    named = "written out, causal"
    yield case(named, shape, dtype, None, by_hand, pairs=pairs, author=hand_written_causal, reference=reference)
    slopes = partial(slopes_mask, shape, dtype)
    yield case("ALiBi", shape, dtype, slopes, competitors(sdpa, on_gpu), pairs=pairs)
    capped = [eager(softcapped), *compiled_pairs(softcapped, *MODES)]
    reference = partial(written_out, is_causal=True, softcap=50.0)
    yield case("softcap, causal", shape, dtype, None, capped, pairs=pairs, author=softcapped, reference=reference)


def _without_mask(impl: Impl) -> Impl:
    def prepare() -> Function:
        function = impl.prepare()
        return lambda q, k, v, mask: function(q, k, v)

    return Impl(impl.name, prepare, note=impl.note)


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick or not on_gpu:
        small = Shape(2, 96, 96, heads=4, kv_heads=2, head_dim=32)
        yield full_case(small, dtype, on_gpu)
        yield causal_case(small, dtype, on_gpu)
        yield from masked_cases(small, dtype, on_gpu)
        return
    for length in (4096, 16384):
        yield causal_case(Shape(1, length, length), dtype, on_gpu)
    for batch, length, head_dim in ((4, 4096, 128), (8, 1024, 128), (1, 1024, 128), (4, 4096, 64), (4, 4096, 256)):
        yield causal_case(Shape(batch, length, length, head_dim=head_dim), dtype, on_gpu)
    yield full_case(Shape(4, 4096, 4096), dtype, on_gpu)
    yield full_case(Shape(32, 512, 512, heads=16, kv_heads=16, head_dim=64), dtype, on_gpu)
    yield from masked_cases(Shape(1, 4096, 4096), dtype, on_gpu)
    long = Shape(1, 16384, 16384)
    window = partial(window_mask, long, 1024)
    yield case("window 1024", long, dtype, window, competitors(sdpa, on_gpu), pairs=1024 * 16384 - 1024 * 1023 // 2)
    chunk = Shape(1, 512, 16384)
    seen = 512 * (16384 - 512) + 512 * 513 // 2
    yield case("chunk", chunk, dtype, partial(causal_mask, chunk), competitors(sdpa, on_gpu), pairs=seen)


if __name__ == "__main__":
    raise SystemExit(main("attention_prefill", __doc__, cases))
