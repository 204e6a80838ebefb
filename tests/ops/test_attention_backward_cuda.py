"""infuse::attention_backward_out, the CUDA kernels of attention's gradients: shapes, masks, configurations, layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.ops import attention_backward_kernels as kernels
from infuse.ops import attention_dropout, library
from infuse.ops.attention_formulas import attention_bwd_ref, attention_fwd_ref, expand_kv
from infuse.ops.attention_tile_map import tile_map_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, heads, kv_heads, queries, keys, head_dim, head_dim of v
SHAPES = (
    (1, 4, 4, 1, 1, 64, 64),
    (2, 4, 2, 77, 77, 64, 64),
    (1, 8, 2, 256, 256, 128, 128),
    (2, 4, 4, 300, 515, 128, 128),
    (1, 6, 1, 515, 200, 96, 96),
    (1, 4, 2, 200, 333, 80, 80),
    (1, 4, 2, 333, 300, 192, 128),
    (2, 2, 1, 190, 257, 256, 256),
    (3, 4, 4, 64, 129, 72, 40),
    (1, 2, 2, 1100, 1030, 64, 64),
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # dout, q, k, v
Gradients = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(shape: tuple[int, ...], dtype: torch.dtype = BF16, size: float = 1.0) -> Inputs:
    """q, v and dout as projections leave them, k as in a cache."""
    batch, heads, kv_heads, queries, keys, dim, dim_v = shape

    def rows(length: int, num_heads: int, head_dim: int) -> Tensor:
        return (size * torch.randn(batch, length, num_heads, head_dim, device="cuda")).to(dtype).transpose(1, 2)

    k = (size * torch.randn(batch, kv_heads, keys, dim, device="cuda")).to(dtype)
    return rows(queries, heads, dim_v), rows(queries, heads, dim), k, rows(keys, kv_heads, dim_v)


def empty_like(tensor: Tensor) -> Tensor:
    """NaN, in the memory layout [B, S, H, D]."""
    batch, heads, length, dim = tensor.shape
    return tensor.new_full((batch, length, heads, dim), math.nan).transpose(1, 2)


def forward(inputs: Inputs, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse in fp64."""
    _, q, k, v = (tensor.double() for tensor in inputs)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    scale = options.get("scale", q.shape[-1] ** -0.5)
    return attention_fwd_ref(q, k, v, wide, scale, **_rest(options))


def exact_gradients(inputs: Inputs, out: Tensor, lse: Tensor, mask: Tensor | None, **options: Any) -> Gradients:
    dout, q, k, v = (tensor.double() for tensor in inputs)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    scale = options.get("scale", q.shape[-1] ** -0.5)
    rest = _rest(options)
    return attention_bwd_ref(dout, q, k, v, out, lse, wide, scale, rest.pop("is_causal"), False, **rest)[:3]


def _rest(options: dict[str, Any]) -> dict[str, Any]:
    sinks = options.get("sinks")
    names = ("softcap", "dropout_p", "seed")
    given = {name: options[name] for name in names if name in options}
    return {"is_causal": options.get("is_causal", False), "sinks": None if sinks is None else sinks.double(), **given}


def eager_gradients(inputs: Inputs, mask: Tensor | None, **options: Any) -> Gradients:
    """Autograd through the formula in the dtype of the inputs, the softmax in fp32."""
    dout = inputs[0]
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in inputs[1:])
    scale, softcap = options.get("scale", q.shape[-1] ** -0.5), options.get("softcap", 0.0)
    scores = (q @ expand_kv(k, q.shape[1]).transpose(-2, -1)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if options.get("is_causal"):
        seen = seen.tril()
    if mask is not None:
        seen = mask.expand_as(seen) if mask.dtype == torch.bool else (mask != -math.inf).expand_as(seen)
        scores = scores if mask.dtype == torch.bool else scores + torch.where(mask == -math.inf, 0.0, mask)
    some = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & some, -math.inf)
    if (sinks := options.get("sinks")) is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        probabilities = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        probabilities = torch.softmax(scores, -1)
    probabilities = torch.where(some, probabilities, 0.0).to(q.dtype)
    if p := options.get("dropout_p", 0.0):
        kept = attention_dropout.kept(options["seed"], p, tuple(scores.shape))  # type: ignore[arg-type]
        probabilities = torch.where(kept, probabilities / (1 - p), 0.0)
    out = probabilities @ expand_kv(v, q.shape[1])
    return torch.autograd.grad(out, (q, k, v), dout)  # type: ignore[return-value]


def run(inputs: Inputs, out: Tensor, lse: Tensor, mask: Tensor | None, **options: Any) -> Gradients:
    """The kernels' answer, written over NaN. tile_map: whether the mask's map is given."""
    dout, q, k, v = inputs
    results = (empty_like(q), empty_like(k), empty_like(v))
    has_map = options.pop("tile_map", False) and mask is not None
    tile_map = tile_map_ref(mask, q.shape[2], k.shape[2]) if has_map else None  # type: ignore[arg-type]
    sinks, scale = options.pop("sinks", None), options.pop("scale", q.shape[-1] ** -0.5)
    kernels.backward(dout, q, k, v, out, lse, mask, tile_map, sinks, *results, scale=scale, **options)
    return results


def variants(inputs: Inputs, out: Tensor, lse: Tensor, mask: Tensor | None, **options: Any) -> Iterator[dict[str, Any]]:
    """What to run a problem with: every configuration that takes it, deterministic and not, with a map or not."""
    names = library.configurations(kernels.BACKWARD)
    for deterministic in (False, True):
        yield {"config": -1, "deterministic": deterministic}
        yield {"config": -1, "deterministic": deterministic, "tile_map": True}
        for config in range(len(names)):
            variant = {"config": config, "deterministic": deterministic, "tile_map": True}
            try:
                run(inputs, out, lse, mask, **options, **variant)
            except RuntimeError as error:
                assert f"configuration {names[config]}" in str(error)
            else:
                yield variant


def check(inputs: Inputs, mask: Tensor | None = None, **options: Any) -> None:
    """Against fp64: at most twice as far off as eager's gradients, besides the rounding of the result."""
    exact_out, exact_lse = forward(inputs, mask, **options)
    exact = exact_gradients(inputs, exact_out, exact_lse, mask, **options)
    eager = eager_gradients(inputs, mask, **options)
    eps = torch.finfo(inputs[0].dtype).eps
    bounds = [2 * _distance(e, x) + eps * float(x.abs().amax()) + 1e-6 for e, x in zip(eager, exact)]
    out, lse = exact_out.to(inputs[0].dtype), exact_lse.float()
    out = torch.where(exact_lse[..., None] == -math.inf, math.nan, out)  # such rows may hold anything
    for variant in variants(inputs, out, lse, mask, **options):
        got = run(inputs, out, lse, mask, **options, **variant)
        for name, result, x, bound in zip(("dq", "dk", "dv"), got, exact, bounds):
            error = _distance(result, x)
            assert error <= bound, f"error of {name} {error:.3g}, bound {bound:.3g}, {variant}"
        again = run(inputs, out, lse, mask, **options, **variant)
        same = [torch.equal(a, b) for a, b in zip(got, again)]
        assert all(same[1:]) and (same[0] or not variant["deterministic"]), f"two runs differ, {variant}"


def _distance(result: Tensor, exact: Tensor) -> float:
    """Infinite where the result is not finite."""
    distance = (result.double() - exact).abs().amax() if exact.numel() else exact.new_zeros(())
    return float(distance) if bool(result.isfinite().all()) else math.inf


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
    check(inputs, lengths.expand(batch, 1, queries, keys))
    check(inputs, torch.rand(1, heads, queries, keys, device="cuda") < 0.02)
    check(inputs, torch.rand(queries, keys, device="cuda") < 0.5)
    check(inputs, torch.randn(batch, 1, queries, keys, device="cuda").to(dtype))
    check(inputs, torch.where(torch.rand(1, 1, queries, keys, device="cuda") < 0.2, 0.5, -math.inf))


def test_masks_of_which_most_tiles_are_skipped() -> None:
    inputs = make((1, 4, 2, 700, 700, 64, 64))
    near = torch.arange(700, device="cuda")
    window = (near[:, None] >= near) & (near[:, None] - near < 100)
    check(inputs, window)
    check(inputs, torch.where(window, 0.0, -math.inf))
    check(inputs, torch.where(window, 0.0, torch.finfo(FP32).min))
    window[64:192] = False
    window[:, 256:512] = False
    check(inputs, window)
    check(inputs, torch.zeros(700, 700, device="cuda", dtype=torch.bool))


def test_long_sequences() -> None:
    """More blocks of queries, and of keys, than a warp has lanes."""
    inputs = make((1, 2, 1, 2500, 4500, 64, 64))
    blocks = torch.rand(40, 71, device="cuda") < 0.1
    mask = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:2500, :4500]
    check(inputs, mask)
    check(inputs, is_causal=True)


def test_softcap_and_sinks() -> None:
    inputs = make((2, 8, 2, 130, 333, 128, 128))
    mask = torch.rand(2, 1, 130, 333, device="cuda") < 0.1
    mask[0, :, :70] = False
    check(inputs, softcap=3.0, is_causal=True)
    check(inputs, mask, softcap=3.0)
    for sinks in (torch.randn(8, device="cuda"), torch.randn(8, device="cuda").to(BF16)):
        check(inputs, mask, sinks=sinks)
        check(inputs, sinks=sinks, softcap=3.0)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[6]])
@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
def test_dropout(shape: tuple[int, ...], dropout_p: float) -> None:
    inputs, drawn = make(shape), torch.tensor([-12345678901, 987654321987], device="cuda")
    check(inputs, dropout_p=dropout_p, seed=drawn, is_causal=True)
    mask = torch.rand(shape[3], shape[4], device="cuda") < 0.5
    check(inputs, mask, dropout_p=dropout_p, seed=drawn, softcap=5.0)


@pytest.mark.parametrize("size", [0.01, 6.0])
def test_small_and_large_scores(size: float) -> None:
    inputs = make((1, 4, 2, 200, 200, 64, 64), size=size)
    check(inputs)
    check(inputs, is_causal=True, scale=-0.3)


def test_views_and_masks_at_odd_places() -> None:
    dout, q, k, v = make((2, 8, 2, 100, 300, 128, 128))
    cache = torch.randn(2, 2, 700, 128, device="cuda").to(BF16)
    check((dout, q, cache[:, :, 100:400], cache.flip(0)[:, :, 400:]))
    wide = torch.rand(2, 1, 100, 311, device="cuda") < 0.5
    check((dout, q, k, v), wide[..., 7:307])
    check((dout, q, k, v), wide.to(FP32).log()[..., 3:303])
    check((dout, q, k, v), torch.rand(2, 1, 1, 300, device="cuda") < 0.5)


def test_a_gradient_that_is_expanded_or_misaligned_is_copied_first() -> None:
    dout, q, k, v = make((1, 4, 2, 70, 70, 64, 64))
    check((dout[..., :1].expand_as(dout), q, k, v))
    shifted = torch.empty(q.numel() + 1, device="cuda", dtype=BF16)[1:].view(q.shape).copy_(q)
    check((dout, shifted, k, v))


def test_rows_of_which_the_mask_leaves_only_its_filling_have_no_gradient() -> None:
    inputs = make((1, 2, 2, 70, 70, 64, 64))
    mask = torch.zeros(70, 70, device="cuda")
    mask[3] = torch.finfo(FP32).min
    out, lse = forward(inputs, mask)
    dq, dk, dv = run(inputs, out.to(BF16), lse.float(), mask, tile_map=True)
    assert (dq[:, :, 3] == 0).all() and all(bool(result.isfinite().all()) for result in (dq, dk, dv))


def test_scores_that_are_nan_stay_in_their_heads() -> None:
    dout, q, k, v = make((1, 4, 4, 200, 200, 64, 64))
    q[0, 1, 7, 0] = math.nan
    out, lse = forward((dout, q, k, v), None)
    got = run((dout, q, k, v), out.to(BF16), lse.float(), None)
    for result in got:
        assert result[0, 1].isnan().any() and not result[0, [0, 2, 3]].isnan().any()
    assert got[0][0, 1, 7].isnan().all() and not got[0][0, 1, 8:].isnan().any()


def test_no_queries_and_no_keys() -> None:
    for shape in ((2, 4, 2, 0, 100, 64, 64), (2, 4, 2, 100, 0, 64, 64), (0, 4, 2, 100, 100, 64, 64)):
        inputs = make(shape)
        out, lse = forward(inputs, None)
        for deterministic in (False, True):
            got = run(inputs, out.to(BF16), lse.float(), None, deterministic=deterministic)
            assert all(bool((result == 0).all()) for result in got)


def test_what_the_kernel_cannot_take_is_an_error() -> None:
    inputs = make((1, 8, 2, 32, 32, 64, 64))
    out, lse = (result.float() for result in forward(inputs, None))
    out = out.to(BF16)
    dout, q, k, v = inputs
    for wrong, message in (
        ((dout, q, k[..., :32], v), "head_dim of k"),
        ((dout, q, k, v[:, :, :5]), "shape of v"),
        ((dout[:, :4], q, k, v), "shape of dout"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(wrong, out, lse, None)
    with pytest.raises(RuntimeError, match="shape of lse"):
        run(inputs, out, lse[:, :4], None)
    large = make((1, 2, 2, 32, 32, 192, 192))
    out, lse = forward(large, None)
    with pytest.raises(RuntimeError, match="head_dim for configuration mma_k128"):
        run(large, out.to(BF16), lse.float(), None, config=0)
