"""infuse::attention_forward_out with wgmma on Hopper: CTAs that take many tiles, and what it refuses.

Shapes, masks and layouts are in test_attention_forward_cuda.py, which runs every configuration.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from infuse.ops import attention_kernels, library
from infuse.ops.attention_formulas import attention_fwd_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16 = torch.bfloat16
# With a head_dim that each takes.
CONFIGS = (("wgmma_w8", 128), ("wgmma_w8_wide", 128), ("wgmma_w12", 64))


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is an instruction of compute capability 9.0")
    torch.manual_seed(0)


def make(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as projections leave them."""
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(batch, rows, n, dim, device="cuda").to(BF16).transpose(1, 2) for n, rows in sizes)
    return q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, name: str, mask: Tensor | None = None, **options: bool) -> Tensor:
    """out of the configuration of that name, written over NaN."""
    config = library.configurations(attention_kernels.FORWARD).index(name)
    out = torch.full_like(q, math.nan)
    tiles = attention_kernels.tile_map(mask, q.shape[2], k.shape[2]) if mask is not None else None
    attention_kernels.forward(q, k, v, mask, tiles, None, out, scale=q.shape[-1] ** -0.5, config=config, **options)
    return out


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """In fp64, a batch and a K/V head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            parts = (q[b : b + 1, heads].double(), k[b : b + 1, h : h + 1].double(), v[b : b + 1, h : h + 1].double())
            out[b : b + 1, heads] = attention_fwd_ref(*parts, mask, q.shape[-1] ** -0.5, is_causal)[0]
    return out


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().amax())


@pytest.mark.parametrize("name", [name for name, _ in CONFIGS])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_ctas_that_take_many_tiles(name: str, dim: int, is_causal: bool) -> None:
    """More tiles than SMs, of unequal length, dealt out while the kernel runs; the same bits whoever takes them."""
    q, k, v = make(3, 24, 6, 1111, 1300, dim)
    try:
        got = run(q, k, v, name, is_causal=is_causal)
    except RuntimeError as refusal:
        assert name in str(refusal)
        pytest.skip(f"not for head_dim {dim}")
    assert error(got, exact(q, k, v, is_causal=is_causal)) < 0.02
    for _ in range(10):
        assert torch.equal(run(q, k, v, name, is_causal=is_causal), got)


@pytest.mark.parametrize("name,dim", CONFIGS)
def test_more_keys_than_stay_in_l2(name: str, dim: int) -> None:
    """Heads are taken in several sections, the last of them smaller."""
    q, k, v = make(1, 14, 7, 300, 16384, dim)
    assert error(run(q, k, v, name), exact(q, k, v)) < 0.01


@pytest.mark.parametrize("name,dim", CONFIGS)
def test_long_masks_with_tiles_that_are_skipped(name: str, dim: int) -> None:
    """Documents of unequal length; rows between them see nothing, so that whole tiles of rows do."""
    q, k, v = make(1, 16, 4, 2500, 2500, dim)
    place = torch.arange(2500, device="cuda")
    document = torch.bucketize(place, torch.tensor([300, 700, 1900], device="cuda"), right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place) & (document[:, None] != 1)
    got, expected = run(q, k, v, name, mask), exact(q, k, v, mask)
    assert error(got, expected) < 0.02
    assert not got[:, :, 300:700].any()


@pytest.mark.parametrize("name,dim", CONFIGS)
def test_scores_that_grow_along_the_keys(name: str, dim: int) -> None:
    """The largest score grows a little, then at once by more than a power of two can hold."""
    q, k, v = make(1, 4, 2, 256, 1024, dim)
    growth = torch.linspace(0.1, 3.0, 1024, device="cuda")
    growth[700:] *= 40
    k = (k.float() * growth[:, None]).to(BF16)
    assert error(run(q, k, v, name), exact(q, k, v)) < 0.03


@pytest.mark.parametrize("name,dim", CONFIGS)
def test_what_it_refuses_names_the_configuration(name: str, dim: int) -> None:
    q, k, v = make(1, 4, 2, 200, 200, dim)
    with pytest.raises(RuntimeError, match=f"{name}.*expanded"):
        run(q, k[:, :1].expand_as(k), v, name)
    with pytest.raises(RuntimeError, match=f"{name}.*no keys"):
        run(q, k[:, :, :0], v[:, :, :0], name)
