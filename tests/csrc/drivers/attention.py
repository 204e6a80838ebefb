"""Attention: few queries, many, gradients, the map of a mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from infuse.ops import attention_backward_kernels, attention_kernels
from infuse.ops.attention_tile_map import tile_map_ref
from tests.csrc.drivers.launches import OPS, Launch, configs, driver, if_it_can, random
from tests.ops.norm_forms import BF16, FP16, FP32


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
            yield partial(if_it_can, OPS.attention_decode_out, *given)


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
                yield partial(if_it_can, OPS.attention_forward_out, *given, 0.0, None, config, splits, out, lse)
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
                yield partial(if_it_can, OPS.attention_backward_out, *given, deterministic, config, *results)


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
