"""infuse::attention_decode_out, the CUDA kernel for few query rows: shapes, masks, configurations, layouts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import infuse
from infuse.ops import attention_kernels, library
from infuse.ops.attention import attention_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, heads, kv_heads, queries, keys, head_dim, head_dim of v
SHAPES = (
    (1, 32, 8, 1, 1, 128, 128),
    (1, 32, 8, 1, 1000, 128, 128),
    (2, 8, 8, 1, 77, 64, 64),
    (2, 8, 2, 3, 515, 64, 64),
    (1, 32, 8, 16, 2048, 128, 128),
    (3, 6, 1, 1, 333, 128, 128),
    (1, 8, 1, 7, 400, 256, 256),
    (2, 4, 4, 1, 129, 80, 80),
    (1, 8, 2, 5, 300, 96, 96),
    (1, 8, 4, 2, 1025, 192, 128),
    (2, 32, 8, 16, 130, 72, 40),
    (1, 64, 1, 2, 640, 128, 128),
    (2, 14, 2, 1, 1500, 64, 64),
    (1, 8, 2, 2, 700, 96, 40),
)
Inputs = tuple[Tensor, Tensor, Tensor]


def configs() -> list[tuple[int, int]]:
    """Configuration and number of splits: what the launcher chooses, every configuration, and splits of each kind."""
    every = range(len(library.configurations(attention_kernels.DECODE)))
    splits = (*itertools.product((0, 1), (1, 2, 5)), *itertools.product((3, 5, 11), (1, 2, 5, 16)), (4, 3))
    return [(-1, 0), *((config, 0) for config in every), *splits]


def make(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> Inputs:
    """q and v as projections leave them, k as in a cache."""
    batch, heads, kv_heads, queries, keys, dim, dim_v = shape
    q = torch.randn(batch, queries, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, keys, dim, device="cuda").to(dtype)
    v = torch.randn(batch, keys, kv_heads, dim_v, device="cuda").to(dtype).transpose(1, 2)
    return q, k, v


def run(inputs: Inputs, mask: Tensor | None = None, *, config: int = -1, splits: int = 0, **options: Any) -> Tensor:
    """The kernel's answer, written over NaN."""
    q, k, v = inputs
    out = q.new_full((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), math.nan).transpose(1, 2)
    sinks, scale = options.pop("sinks", None), options.pop("scale", q.shape[-1] ** -0.5)
    return attention_kernels.decode(q, k, v, mask, sinks, out, scale=scale, config=config, splits=splits, **options)


def check(inputs: Inputs, mask: Tensor | None = None, **options: Any) -> None:
    """Against fp64, within a bound on what two-byte probabilities and results round; twice, with the same bits."""
    q, k, v = (tensor.double() for tensor in inputs)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    sinks = options.get("sinks")
    exact = attention_ref(
        *(q, k, v, wide, q.shape[-1] ** -0.5),
        *(options.get("is_causal", False), options.get("softcap", 0.0), None if sinks is None else sinks.double()),
        options.get("masked_rows", "zeros"),
    )
    unit = torch.finfo(inputs[0].dtype).eps
    bound = 2 * unit * v.nan_to_num().abs().amax().clamp(min=1.0)
    for config, splits in configs():
        got = run(inputs, mask, config=config, splits=splits, **options)
        assert torch.equal(got.isnan(), exact.isnan()), f"NaN elsewhere, configuration {config}, {splits} splits"
        error = (got.double() - exact).nan_to_num().abs().amax()
        assert error <= bound, f"error {error:.3g}, bound {bound:.3g}, configuration {config}, {splits} splits"
        again = run(inputs, mask, config=config, splits=splits, **options)
        assert torch.equal(got.nan_to_num(), again.nan_to_num()), f"two runs differ, configuration {config}"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_without_a_mask_and_causal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(shape, dtype)
    before = [tensor.clone() for tensor in inputs]
    check(inputs)
    check(inputs, is_causal=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_kind_of_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, _, queries, keys, *_ = shape
    inputs = make(shape, dtype)
    lengths = torch.arange(keys, device="cuda") < torch.randint(0, keys + 1, (batch, 1, 1, 1), device="cuda")
    check(inputs, lengths)
    check(inputs, lengths.expand(batch, 1, queries, keys), masked_rows="nan")
    check(inputs, torch.rand(batch, 1, queries, keys, device="cuda") < 0.5)
    check(inputs, torch.rand(1, heads, queries, keys, device="cuda") < 0.01)
    check(inputs, torch.rand(queries, keys, device="cuda") < 0.3)
    check(inputs, torch.randn(batch, 1, queries, keys, device="cuda").to(dtype))
    check(inputs, torch.where(torch.rand(1, 1, queries, keys, device="cuda") < 0.2, 0.5, -math.inf))


@pytest.mark.parametrize(
    "shape",
    [
        (4, 32, 8, 1, 16384, 128, 128),
        (8, 32, 8, 2, 5000, 128, 128),
        (8, 32, 8, 4, 3000, 128, 128),
        (64, 32, 8, 1, 1500, 128, 128),
        (16, 14, 2, 1, 12288, 64, 64),
        (32, 32, 8, 1, 1500, 64, 64),
        (48, 24, 3, 1, 1500, 64, 64),
    ],
)
def test_many_heads_and_long_caches(shape: tuple[int, ...]) -> None:
    batch, keys = shape[0], shape[4]
    check(make(shape), torch.arange(keys, device="cuda") < torch.randint(1, keys + 1, (batch, 1, 1, 1), device="cuda"))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_masks_filled_with_the_lowest_number(dtype: torch.dtype) -> None:
    """Such keys are skipped beside others, and all count in a row that has nothing else."""
    inputs = make((2, 8, 2, 3, 500, 64, 64), FP16 if dtype == FP16 else BF16)
    mask = torch.zeros(2, 1, 3, 500, device="cuda", dtype=dtype)
    mask[..., 200:] = torch.finfo(dtype).min
    check(inputs, mask, masked_rows="softmax")
    # Beside -3e38 a score of 1 is lost, in fp64 it is not: the mean is what a softmax in fp32 gives.
    mask[:, :, 1] = torch.finfo(dtype).min
    got = run(inputs, mask, masked_rows="softmax")[:, :, 1]
    if dtype != FP16:
        mean = inputs[2].double().mean(2).repeat_interleave(4, 1)
        assert (got.double() - mean).abs().max() < 0.01


def test_softcap_and_sinks() -> None:
    inputs = make((2, 8, 2, 3, 333, 128, 128))
    mask = torch.rand(2, 1, 3, 333, device="cuda") < 0.1
    mask[0] = False
    for sinks in (torch.randn(8, device="cuda"), torch.randn(8, device="cuda").to(BF16)):
        check(inputs, mask, sinks=sinks)
        check(inputs, sinks=sinks, softcap=3.0)
    check(inputs, mask, softcap=3.0)


def test_views_and_masks_at_odd_places() -> None:
    q, k, v = make((2, 8, 2, 2, 300, 128, 128))
    cache = torch.randn(2, 2, 700, 128, device="cuda").to(BF16)
    check((q, cache[:, :, 100:400], cache.flip(0)[:, :, 400:]))
    wide = torch.rand(2, 1, 2, 311, device="cuda") < 0.5
    check((q, k, v), wide[..., 7:307])
    check((q, k, v), wide.to(FP32).log()[..., 3:303])


def test_misaligned_addresses_are_copied_first() -> None:
    q, k, v = make((1, 8, 2, 1, 300, 128, 128))
    shifted = [
        torch.empty(tensor.numel() + 1, device="cuda", dtype=BF16)[1:].view(tensor.shape) for tensor in (q, k, v)
    ]
    for copy, tensor in zip(shifted, (q, k, v)):
        copy.copy_(tensor)
    assert torch.equal(run((q, k, v)), run((shifted[0], shifted[1], shifted[2])))


def test_scores_that_are_nan_or_infinite_give_what_the_softmax_gives() -> None:
    q, k, v = make((1, 4, 4, 3, 200, 64, 64))
    q[0, 0, 0, 0] = math.nan
    k[0, 1, 17, 0] = math.inf
    q[0, 1, 1, 0] = 1.0  # an infinite score
    got = run((q, k, v))
    assert got[0, 0, 0].isnan().all() and not got[0, 0, 1:].isnan().any()
    assert got[0, 1, 1].isnan().all() and not got[0, 2:].isnan().any()


@pytest.mark.parametrize("rise", [4.0, 60.0, 400.0, -60.0])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_scores_that_rise_along_the_keys(rise: float, dtype: torch.dtype) -> None:
    """What sums are relative to may stay behind the largest score, and must follow it before they overflow."""
    q, k, v = make((2, 14, 2, 1, 1500, 64, 64), dtype)
    ramp = torch.linspace(0.0, rise, 1500, device="cuda")[:, None] * 64**-0.5
    check((torch.ones_like(q), (0.1 * k + ramp).to(dtype), v))


def test_bytes_of_a_mask_that_are_neither_0_nor_1() -> None:
    inputs = make((2, 14, 2, 1, 333, 64, 64))
    values = torch.tensor([0, 0, 1, 2, 128, 255], device="cuda", dtype=torch.uint8)
    mask = values[torch.randint(0, 6, (2, 1, 1, 336), device="cuda")][..., :333]
    for config, splits in configs():
        plain = run(inputs, mask != 0, config=config, splits=splits)
        assert torch.equal(run(inputs, mask.view(torch.bool), config=config, splits=splits), plain)


def test_nothing_to_do_and_many_keys() -> None:
    assert run(make((0, 8, 2, 1, 5, 64, 64))).shape == (0, 8, 1, 64)
    assert torch.equal(run(make((2, 8, 2, 1, 0, 64, 64))), torch.zeros(2, 8, 1, 64, device="cuda", dtype=BF16))
    inputs = make((1, 4, 1, 1, 262144, 64, 64))
    mask = torch.zeros(262144, device="cuda", dtype=torch.bool)
    mask[[3, 100_000, 262_143]] = True
    check(inputs, mask)


def test_what_the_kernel_cannot_take_is_an_error() -> None:
    inputs = make((1, 8, 2, 1, 32, 64, 64))
    for wrong, message in (
        ((inputs[0].float(), *inputs[1:]), "dtype of q"),
        ((inputs[0], inputs[1][..., :32], inputs[2]), "head_dim of k"),
        ((inputs[0], inputs[1], inputs[2][:, :, :5]), "shape of v"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(wrong)


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_a_compiled_decode_step_is_right_for_every_length(mode: str | None) -> None:
    """The mask is computed in the graph from the position, the cache is written in place."""

    def step(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        mask = torch.arange(k.shape[2], device=k.device) <= position
        mask = mask.expand(q.shape[0], 1, 1, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    q, k, v = make((2, 32, 8, 1, 1024, 128, 128))
    with torch.no_grad(), infuse.override(kernels="always" if mode is None else "auto"):
        compiled = torch.compile(step, backend="infuse", mode=mode)
        for position in (0, 5, 600, 1023):
            at = torch.tensor(position, device="cuda")
            torch.testing.assert_close(compiled(q, k, v, at), step(q, k, v, at), atol=1e-2, rtol=1e-2)
