"""infuse::attention_tile_map: what the reference says of a tile, what the CUDA kernels say, shapes while tracing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.attention_tile_map import HIDDEN, MASKED, OPEN, TILE, tile_map_ref

DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (64, 64), (77, 200), (130, 1025), (1, 700), (300, 64), (0, 10), (10, 0))


def by_loops(mask: Tensor, queries: int, keys: int) -> Tensor:
    """The definition once more, tile by tile."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    full = mask.expand(*mask.shape[:2], queries, keys)
    blocks = range(0, queries, TILE), range(0, keys, TILE)
    result = torch.full((*mask.shape[:2], len(blocks[0]), len(blocks[1])), 7, dtype=torch.uint8)
    for batch, head, row, key in itertools.product(*map(range, mask.shape[:2]), *blocks):
        rows = full[batch, head, row : row + TILE]
        tile = rows[:, key : key + TILE]
        if mask.dtype == torch.bool:
            sees, is_open = bool(tile.any()), bool(tile.all())
        else:
            floor = -1e30 if bool((~(rows <= -1e30)).any(-1).all()) else -math.inf
            sees, is_open = bool((~(tile <= floor)).any()), bool((tile == 0).all())
        result[batch, head, row // TILE, key // TILE] = (OPEN if is_open else MASKED) if sees else HIDDEN
    return result


def masks(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Causal with an offset, windows, valid lengths broadcast over rows, random ones, filled rows, odd places."""
    causal = torch.ones(queries, keys).tril(keys - queries + 3).bool()
    window = causal & ~torch.ones(queries, keys).tril(-70).bool()
    lengths = (torch.arange(keys) < torch.tensor([[keys // 3], [keys]]))[:, None, None]
    sparse = torch.rand(1, 3, queries, keys) < 0.001
    seen = [causal, window[None], lengths, sparse, torch.cat([sparse, sparse], -1)[..., keys // 2 :][..., :keys]]
    if dtype == torch.bool:
        return seen
    lowest = torch.finfo(dtype).min
    filled = [torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest) for mask in seen]
    biased = torch.randn(2, 1, queries, keys).to(dtype)
    infinite = [torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf) for mask in seen]
    odd = torch.zeros(queries, keys + 3, dtype=dtype)[:, 3:]
    return [*filled, biased, *infinite, odd, biased * math.nan]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_reference_is_the_definition(size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for mask in masks(*size, dtype):
        assert torch.equal(tile_map_ref(mask, *size), by_loops(mask, *size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_states_occur(dtype: torch.dtype) -> None:
    """Otherwise the comparisons would say little."""
    torch.manual_seed(0)
    assert {0, 1, 2} == {
        int(state) for mask in masks(130, 1025, dtype) for state in tile_map_ref(mask, 130, 1025).unique()
    }


def test_shapes_while_tracing() -> None:
    for shape in ((5,), (1, 5), (2, 1, 70, 5), (1, 3, 1, 5)):
        torch.library.opcheck(torch.ops.infuse.attention_tile_map.default, (torch.ones(shape) > 0, 70, 5))


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (700, 1500)])
def test_kernels_say_what_the_reference_says(size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert library.missing(torch.device("cuda")) == ""
    for mask in masks(*size, dtype):
        on_device = mask.cuda()
        if mask.stride(-1) == 1 and not mask.is_contiguous():
            on_device = torch.empty(mask.untyped_storage().nbytes() // mask.element_size(), dtype=dtype, device="cuda")
            on_device = on_device.as_strided(mask.shape, mask.stride(), mask.storage_offset()).copy_(mask)
        got = torch.ops.infuse.attention_tile_map(on_device, *size)
        assert torch.equal(got.cpu(), tile_map_ref(mask, *size))


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_what_the_kernels_cannot_take_is_an_error() -> None:
    mask = torch.ones(5, 7, device="cuda") > 0
    for wrong, sizes, message in (
        (mask, (6, 7), "rows of mask"),
        (mask, (5, 8), "last size"),
        (mask.T, (7, 5), "stride"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.infuse.attention_tile_map(wrong, *sizes)
