"""infuse::attention_forward_out, the CUDA kernels for many query rows: shapes, masks, configurations, layouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.ops import attention_dropout, attention_kernels, library
from infuse.ops.attention_formulas import attention_fwd_ref, expand_kv

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, heads, kv_heads, queries, keys, head_dim, head_dim of v
SHAPES = (
    (1, 4, 4, 1, 1, 64, 64),
    (2, 4, 2, 77, 77, 64, 64),
    (1, 8, 2, 256, 256, 128, 128),
    (1, 4, 1, 300, 515, 128, 128),
    (1, 6, 1, 515, 200, 96, 96),
    (1, 4, 2, 200, 333, 80, 80),
    (1, 4, 2, 333, 300, 192, 128),
    (2, 2, 1, 190, 257, 256, 256),
    (3, 4, 4, 64, 129, 72, 40),
    (1, 2, 2, 40, 2500, 128, 128),
)
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(shape: tuple[int, ...], dtype: torch.dtype = BF16, size: float = 1.0) -> Inputs:
    """q and v as projections leave them, k as in a cache."""
    batch, heads, kv_heads, queries, keys, dim, dim_v = shape
    q = (size * torch.randn(batch, queries, heads, dim, device="cuda")).to(dtype).transpose(1, 2)
    k = (size * torch.randn(batch, kv_heads, keys, dim, device="cuda")).to(dtype)
    v = torch.randn(batch, keys, kv_heads, dim_v, device="cuda").to(dtype).transpose(1, 2)
    return q, k, v


def variants(inputs: Inputs, mask: Tensor | None, **options: Any) -> Iterator[dict[str, Any]]:
    """What to run a problem with: what the launcher chooses, every configuration that takes it, splits, no map."""
    yield {}
    names = library.configurations(attention_kernels.FORWARD)
    for config, splits in (*((config, 0) for config in range(len(names))), *itertools.product((0, 1), (1, 3))):
        variant = {"config": config, "splits": splits, "has_map": config != 1}
        try:
            run(inputs, mask, **options, **variant)
        except RuntimeError as error:
            assert names[config] in str(error)
        else:
            yield variant


def run(inputs: Inputs, mask: Tensor | None = None, *, has_map: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse of the kernels, written over NaN."""
    q, k, v = inputs
    out = q.new_full((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), math.nan).transpose(1, 2)
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    sinks, scale = options.pop("sinks", None), options.pop("scale", q.shape[-1] ** -0.5)
    tiles = attention_kernels.tile_map(mask, q.shape[2], k.shape[2]) if mask is not None and has_map else None
    attention_kernels.forward(q, k, v, mask, tiles, sinks, out, lse, scale=scale, **options)
    return out, lse


def exact_result(inputs: Inputs, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """In fp64."""
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    options = {**options, "scale": options.get("scale", inputs[0].shape[-1] ** -0.5)}
    if (sinks := options.get("sinks")) is not None:
        options["sinks"] = sinks.double()
    return attention_fwd_ref(*(tensor.double() for tensor in inputs), wide, **{"is_causal": False, **options})


def check(inputs: Inputs, mask: Tensor | None = None, **options: Any) -> None:
    """Against fp64, within a bound on what two-byte probabilities and results round; twice, with the same bits."""
    out, lse = exact_result(inputs, mask, **options)
    largest = inputs[2].double().nan_to_num().abs().amax() if inputs[2].numel() else out.new_zeros(())
    bound = 2 * torch.finfo(inputs[0].dtype).eps * largest.clamp(min=1.0) / (1 - options.get("dropout_p", 0.0))
    for variant in variants(inputs, mask, **options):
        got, got_lse = run(inputs, mask, **options, **variant)
        assert torch.equal(got.isnan(), out.isnan()), f"NaN elsewhere, {variant}"
        error = (got.double() - out).nan_to_num().abs().amax()
        assert error <= bound, f"error {error:.3g}, bound {bound:.3g}, {variant}"
        torch.testing.assert_close(got_lse.double(), lse, atol=1e-3, rtol=1e-5)
        again, again_lse = run(inputs, mask, **options, **variant)
        assert torch.equal(got.nan_to_num(), again.nan_to_num()), f"two runs differ, {variant}"
        assert torch.equal(got_lse, again_lse), f"lse of two runs differ, {variant}"


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
    check(inputs, torch.rand(1, heads, queries, keys, device="cuda") < 0.005, masked_rows="nan")
    check(inputs, torch.rand(queries, keys, device="cuda") < 0.3)
    check(inputs, torch.randn(batch, 1, queries, keys, device="cuda").to(dtype))
    check(inputs, torch.where(torch.rand(1, 1, queries, keys, device="cuda") < 0.2, 0.5, -math.inf))


@pytest.mark.parametrize("dtype", [torch.bool, BF16, FP32])
@pytest.mark.parametrize("size", [(512, 512), (130, 1500), (700, 300)])
def test_masks_with_tiles_that_are_skipped_or_open(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Causal with an offset, a sliding window, a prefix, documents."""
    queries, keys = size
    inputs = make((1, 4, 2, queries, keys, 128, 128))
    row = torch.arange(queries, device="cuda")[:, None] + max(0, keys - queries)
    key = torch.arange(keys, device="cuda")
    for seen in (
        key <= row,
        (key <= row) & (key > row - 100),
        (key <= row) | (key < 170),
        (key <= row) & (key // 150 == row // 150),
    ):
        mask = seen if dtype == torch.bool else torch.zeros(size, device="cuda").masked_fill(~seen, -math.inf).to(dtype)
        check(inputs, mask)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_masks_filled_with_the_lowest_number(dtype: torch.dtype) -> None:
    """Such keys are skipped beside others, and all count in a row that has nothing else."""
    inputs = make((2, 4, 2, 100, 500, 64, 64), FP16 if dtype == FP16 else BF16)
    mask = torch.zeros(2, 1, 100, 500, device="cuda", dtype=dtype)
    mask[..., 200:] = torch.finfo(dtype).min
    check(inputs, mask, masked_rows="softmax")
    # Beside -3e38 a score of 1 is lost, in fp64 it is not: the mean is what a softmax in fp32 gives.
    mask[:, :, 1] = torch.finfo(dtype).min
    got = run(inputs, mask, masked_rows="softmax")[0][:, :, 1]
    if dtype != FP16:
        mean = expand_kv(inputs[2].double().mean(2, keepdim=True), 4)[:, :, 0]
        assert (got.double() - mean).abs().max() < 0.01


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_softcap_and_sinks(dim: int) -> None:
    inputs = make((2, 8, 2, 130, 333, dim, dim))
    mask = torch.rand(2, 1, 130, 333, device="cuda") < 0.01
    mask[0] = False
    for sinks in (torch.randn(8, device="cuda"), torch.randn(8, device="cuda").to(BF16)):
        check(inputs, mask, sinks=sinks)
        check(inputs, sinks=sinks, softcap=3.0, is_causal=True)
    check(inputs, mask, softcap=3.0)


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
def test_scales(scale: float) -> None:
    inputs = make((1, 4, 2, 100, 200, 64, 64))
    check(inputs, scale=scale)
    check(inputs, torch.rand(100, 200, device="cuda") < 0.2, scale=scale)


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_large_and_small_scores(size: float) -> None:
    inputs = make((1, 4, 2, 150, 300, 128, 128), size=size)
    out, lse = exact_result(inputs, None, is_causal=True)
    got, got_lse = run(inputs, is_causal=True)
    torch.testing.assert_close(got_lse.double(), lse, atol=1e-3, rtol=1e-5)
    assert (got.double() - out).abs().max() <= 4 * torch.finfo(BF16).eps * inputs[2].double().abs().max()


@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4], SHAPES[7]])
def test_dropout_keeps_what_the_generator_says(shape: tuple[int, ...], dropout_p: float) -> None:
    inputs = make(shape)
    seed = torch.tensor([(7 << 40) + 11, (5 << 33) + 3], device="cuda")
    check(inputs, dropout_p=dropout_p, seed=seed)
    check(inputs, dropout_p=dropout_p, seed=seed, is_causal=True)
    check(inputs, torch.rand(shape[3], shape[4], device="cuda") < 0.5, dropout_p=dropout_p, seed=seed)


def test_dropout_is_as_frequent_as_it_should_be() -> None:
    """One value of 1 for each key, all of the same probability: a row's result is its share of kept keys."""
    q = torch.zeros(2, 4, 512, 64, device="cuda", dtype=BF16)
    v = torch.ones_like(q)
    seed = attention_dropout.draw_seed(torch.device("cuda"))
    out, _ = run((q, q, v), dropout_p=0.3, seed=seed)
    kept = out[..., 0].double() * 0.7
    assert abs(kept.mean() - 0.7) < 0.002
    assert 0.9 < kept.std() / math.sqrt(0.3 * 0.7 / 512) < 1.1


def test_views_and_masks_at_odd_places() -> None:
    q, k, v = make((2, 8, 2, 120, 300, 128, 128))
    cache = torch.randn(2, 2, 700, 128, device="cuda").to(BF16)
    check((q, cache[:, :, 100:400], cache.flip(0)[:, :, 400:]))
    packed = torch.randn(2, 150, 3, 4, 64, device="cuda").to(BF16)
    check(tuple(packed.permute(2, 0, 3, 1, 4)), is_causal=True)  # type: ignore[arg-type]
    wide = torch.rand(2, 1, 120, 311, device="cuda") < 0.5
    check((q, k, v), wide[..., 7:307])
    check((q, k, v), wide.to(FP32).log()[..., 3:303])
    check((q, k, v), wide.to(BF16).log()[..., 3:303])


def test_scores_that_are_nan_or_infinite_give_what_the_softmax_gives() -> None:
    q, k, v = make((1, 4, 4, 130, 200, 64, 64))
    q[0, 0, 0, 0] = math.nan
    k[0, 1, 17, 0] = math.inf
    q[0, 1, 1, 0] = 1.0  # an infinite score
    got = run((q, k, v))[0]
    assert got[0, 0, 0].isnan().all() and not got[0, 0, 1:].isnan().any()
    assert got[0, 1, 1].isnan().all() and not got[0, 2:].isnan().any()


def test_nothing_to_do() -> None:
    assert run(make((0, 8, 2, 70, 5, 64, 64)))[0].shape == (0, 8, 70, 64)
    assert run(make((2, 8, 2, 0, 5, 64, 64)))[0].shape == (2, 8, 0, 64)
    out, lse = run(make((2, 8, 2, 70, 0, 64, 64)))
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -math.inf))


def test_the_results_of_a_captured_graph_are_the_same() -> None:
    inputs = make((1, 8, 2, 100, 3000, 128, 128))
    q, k, v = inputs
    mask = torch.rand(100, 3000, device="cuda") < 0.2
    expected = run(inputs, mask)[0]
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tiles = attention_kernels.tile_map(mask, 100, 3000)
        attention_kernels.forward(q, k, v, mask, tiles, None, out, scale=128**-0.5)
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, expected)


def test_what_the_kernels_cannot_take_is_an_error() -> None:
    q, k, v = make((1, 8, 2, 70, 32, 64, 64))
    for wrong, message in (
        ((q.float(), k, v), "dtype of q"),
        ((q, k[..., :32], v), "head_dim of k"),
        ((q, k, v[:, :, :5]), "shape of v"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(wrong)
    for options, message in (
        ({"config": 10_000}, "config"),
        ({"splits": -1}, "splits"),
        ({"dropout_p": 0.5}, "seed"),
        ({"mask": torch.ones(70, 32, device="cuda") > 0, "is_causal": True}, "is_causal"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run((q, k, v), **options)  # type: ignore[arg-type]
