"""The CUDA kernels of the norms' forward: every form, configuration, dtype, alignment and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import infuse
from infuse import build
from infuse.ops import library
from infuse.ops import rms_norm as op
from tests.ops.norm_forms import BF16, EPS, FEW, FORMS, FP16, FP32, Form, assert_as_good_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

RMS = FORMS["rms_norm bf16"]
DIMS = (1, 7, 64, 100, 128, 896, 1000, 4096, 8191, 16384, 20000, 40000, 262144)


def configs() -> range:
    """-1, where the launcher chooses, and every configuration."""
    return range(-1, len(library.configurations("norm")))


def inputs(form: Form, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    x = (torch.randn(shape, device="cuda") * scale).to(form.x)
    operand = torch.randn(shape, device="cuda").to(form.x) if form.has_operand else None
    return x, operand, form.vectors(shape[-1])


def check(form: Form, tensors: tuple[Any, ...], config: int) -> None:
    assert_as_good_as_eager(form.kernel(*tensors, config), form, *tensors)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_as_good_as_eager(name: str) -> None:
    form = FORMS[name]
    for dim in DIMS:
        rows = 3 if dim > 10_000 else 37  # neither divides the rows of a CTA
        check(form, inputs(form, rows, dim), -1)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", FEW)
def test_every_configuration_is_as_good_as_eager(name: str, dim: int) -> None:
    form = FORMS[name]
    tensors = inputs(form, 3 if dim > 10_000 else 37, dim)
    given = [tensor for tensor in (tensors[0], tensors[1], *tensors[2]) if tensor is not None]
    before = [tensor.clone() for tensor in given]
    for config in configs():
        got = form.kernel(*tensors, config)
        assert_as_good_as_eager(got, form, *tensors)
        again = form.kernel(*tensors, config)
        assert all(map(torch.equal, got, again)), f"config {config}: two runs differ"
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


@pytest.mark.parametrize("name", FEW)
def test_many_rows(name: str) -> None:
    form = FORMS[name]
    for rows, dim in ((100_003, 128), (20_011, 896), (5_003, 4096), (2_001, 16384)):
        tensors = inputs(form, rows, dim)
        expected = form.kernel(*tensors, -1)
        tail = [None if tensor is None else tensor[-100:] for tensor in tensors[:2]]
        assert_as_good_as_eager([result[-100:] for result in expected], form, *tail, tensors[2])  # type: ignore[arg-type]
        for config in configs():
            for result, other in zip(form.kernel(*tensors, config), expected, strict=True):
                torch.testing.assert_close(result, other, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", FEW)
def test_rows_do_not_see_those_before_them(name: str) -> None:
    """CTAs that walk over the rows, or hold several, keep nothing of one for another."""
    form = FORMS[name]
    for rows, dim in ((901, 896), (301, 40_000), (301, 20_008)):
        clean, operand, vectors = inputs(form, rows, dim)
        spoilt = clean.clone()
        spoilt[::2] = float("nan")
        for config in configs():
            expected = form.kernel(clean, operand, vectors, config)
            got = form.kernel(spoilt, operand, vectors, config)
            assert all(torch.equal(result[1::2], other[1::2]) for result, other in zip(got, expected, strict=True))
            assert bool(got[0][::2].isnan().all())


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in FEW), ("add_layer_norm fp32", True)])
def test_operators_take_what_the_kernel_does_not(name: str, compiled: bool) -> None:
    """A last dimension with a stride, rows in too many dimensions, no rows, neighbours that overlap: no crash."""
    form = FORMS[name]

    def views(base: Tensor) -> tuple[Tensor, ...]:
        scattered = base[::2, ::2, ::2, ::2]
        overlapping = base.flatten().as_strided((5, 64), (3, 1))
        return base.flatten().view(64, -1).t(), scattered, overlapping, base[:0], base[..., ::2], base[..., 1:34]

    base = [torch.randn(4, 4, 4, 4, 64, device="cuda").to(form.x) for _ in range(2)]
    function = getattr(torch.ops.infuse, form.op)
    for x, operand in zip(*map(views, base), strict=True):
        vectors = form.vectors(x.shape[-1])
        run = torch.compile(function, backend="infuse", dynamic=False) if compiled else function
        with infuse.override(kernels="always"):
            got = run(*form.arguments(x, operand if form.has_operand else None, vectors))
        expected = form.eager(x, operand if form.has_operand else None, vectors)
        tolerance = 1e-5 if form.x == FP32 else 2**-6
        for result, other in zip([got] if isinstance(got, Tensor) else got, expected, strict=False):
            torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (2, 0, 64), (0,)])
def test_empty_tensors_are_left_alone(name: str, shape: tuple[int, ...]) -> None:
    form = FORMS[name]
    for config in configs():
        assert form.kernel(*inputs(form, *shape), config)[0].shape == shape


@pytest.mark.parametrize("name", FEW)
def test_heads_are_normalised_inside_a_packed_projection(name: str) -> None:
    form = FORMS[name]
    batch, tokens, heads, kv_heads, head_dim = 2, 5, 6, 2, 128
    packed = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, device="cuda").to(form.x)
    views = (packed[:, :, :heads], packed[:, :, heads : heads + kv_heads], packed.transpose(1, 2)[:, :heads])
    for x in views:
        operand = torch.randn_like(packed)[:, :, : x.shape[2]] if x.shape[1] == tokens else torch.randn_like(x)
        for config in configs():
            check(form, (x, operand if form.has_operand else None, form.vectors(head_dim)), config)


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("name", [name for name in FORMS if name.startswith("gated_rms_norm bf16")])
def test_groups_are_normalised_one_by_one(name: str, groups: int) -> None:
    plain = FORMS[name]
    flags = (*plain.flags[:2], groups, *plain.flags[3:])
    form = Form(plain.op, plain.x, plain.weight, plain.bias, flags)
    for dim in (64, 1000, 4096):
        packed = torch.randn(7, 2 * dim, device="cuda").to(form.x)
        for config in configs():
            check(form, (packed[:, :dim], packed[:, dim:], form.vectors(dim)), config)


def test_output_may_be_strided() -> None:
    x = torch.randn(3, 4, 96, device="cuda").to(BF16)
    vectors = RMS.vectors(96)
    storage = torch.empty(4, 3, 200, device="cuda", dtype=BF16)
    out = storage.transpose(0, 1)[..., 8:104]
    for config in configs():
        storage.fill_(7)
        rstd = torch.empty(3, 4, device="cuda")
        RMS.launch(x, None, vectors, config, [out, rstd])
        assert_as_good_as_eager([out, rstd], RMS, x, None, vectors)
        assert bool((storage[..., :8] == 7).all()) and bool((storage[..., 104:] == 7).all()), "wrote beside the rows"


def test_statistics_are_optional() -> None:
    for form in map(FORMS.__getitem__, FEW):
        tensors = inputs(form, 5, 896)
        expected = form.kernel(*tensors, -1)
        results = form.empty_results(*tensors)
        kept = 2 if form.op.startswith("add_") else 1
        form.launch(*tensors, -1, results[:kept])
        assert all(map(torch.equal, results[:kept], expected[:kept]))


def test_expanded_rows_are_read_from_one() -> None:
    x = torch.randn(1, 64, device="cuda").to(BF16).expand(9, 64)
    check(RMS, (x, None, RMS.vectors(64)), -1)


@pytest.mark.parametrize("dim", [64, 100, 4096])
@pytest.mark.parametrize("name", FEW)
def test_misaligned_tensors_use_narrower_accesses(name: str, dim: int) -> None:
    form = FORMS[name]

    def shifted(tensor: Tensor | None, offset: int) -> Tensor | None:
        if tensor is None:
            return None
        room = torch.empty(tensor.numel() + offset, device="cuda", dtype=tensor.dtype)
        return room[offset:].view(tensor.shape).copy_(tensor)

    for offset in (1, 2, 4):
        x, operand, vectors = inputs(form, 5, dim)
        for config in configs():
            check(form, (shifted(x, offset), operand, vectors), config)
            check(form, (x, shifted(operand, offset), vectors), config)
            check(form, (x, operand, [shifted(vector, offset) for vector in vectors]), config)
            results = form.empty_results(x, operand, vectors)
            moved = [shifted(result, offset) for result in results]
            form.launch(x, operand, vectors, config, moved)  # type: ignore[arg-type]
            assert_as_good_as_eager(moved, form, x, operand, vectors)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e18])
@pytest.mark.parametrize("name", [name for name in FEW if "fp32" in name.split(",")[0]] + ["rms_norm bf16"])
def test_any_scale_is_what_torch_gives(name: str, scale: float) -> None:
    """Squares may underflow or overflow; the formula is in fp32 and says what then comes out."""
    form = FORMS[name]
    tensors = inputs(form, 4, 1000, scale=scale)
    expected = form.eager(*tensors)
    for config in configs():
        got = form.kernel(*tensors, config)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5 if form.x == FP32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("name", ["layer_norm fp32", "layer_norm bf16", "add_layer_norm fp32"])
def test_rows_with_an_offset_do_not_cancel(name: str) -> None:
    form = FORMS[name]
    for dim in (64, 1000, 8191, 40000):
        x, operand, vectors = inputs(form, 5, dim)
        x = x + torch.tensor([1e2, -1e3, 1e4, 0.0, 0.0], device="cuda").unsqueeze(-1).to(x.dtype)
        x[4, 0] = 1e4  # alone far away from the others
        for config in configs():
            check(form, (x, operand, vectors), config)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e30, 3e38])
def test_rows_of_one_value_have_no_deviation(value: float) -> None:
    form = FORMS["layer_norm fp32"]
    for dim in (1, 7, 1000, 4096, 40000):
        x, vectors = torch.full((3, dim), value, device="cuda"), form.vectors(dim)
        for config in configs():
            y, mean, _ = form.kernel(x, None, vectors, config)
            assert vectors[1] is not None
            torch.testing.assert_close(mean, x[:, 0], rtol=3e-7, atol=0)
            if value <= 1e4:  # the deviation is the rounding of the mean, as large as x is
                torch.testing.assert_close(y, vectors[1].expand_as(y), rtol=1e-3, atol=value * 1e-4)
            assert bool(y.isfinite().all())


@pytest.mark.parametrize("dim", [64, 1000, 8191, 40000])
@pytest.mark.parametrize("name", FEW)
def test_nan_and_infinity_come_out_as_in_torch(name: str, dim: int) -> None:
    form = FORMS[name]
    x, operand, vectors = inputs(form, 4, dim)
    x[0, dim // 2] = float("nan")
    x[1, 0] = float("inf")
    x[2, -1] = -float("inf")
    expected = form.eager(x, operand, vectors)[0]
    for config in configs():
        got = form.kernel(x, operand, vectors, config)
        assert torch.equal(got[0].isnan(), expected.isnan())
        torch.testing.assert_close(got[0][:3], expected[:3], rtol=1e-5, atol=1e-6, equal_nan=True)
        last = [None if tensor is None else tensor[3:] for tensor in (x, operand)]
        assert_as_good_as_eager([result[3:] for result in got], form, *last, vectors)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gates_of_any_size(activation: str) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-30, 0.0, 20.0, 88.0, 200.0, 1e30], device="cuda")
    gates = torch.cat([gates, torch.tensor([float("nan"), float("inf")], device="cuda")])
    for dtype in (BF16, FP16, FP32):
        gate = gates.to(dtype).expand(3, -1).contiguous()
        x = torch.randn(gate.shape, device="cuda").to(dtype)
        for before in (True, False):
            form = Form("gated_rms_norm", dtype, None, None, (before, activation, 1, False, False))
            expected = form.eager(x, gate, [None])[0]
            for config in configs():
                got = form.kernel(x, gate, [None], config)[0]
                torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


def test_zero_rows_of_zeros_need_eps() -> None:
    form = FORMS["rms_norm bf16, eps as minimum"]
    x = torch.zeros(2, 512, device="cuda", dtype=BF16)
    for config in configs():
        assert bool((form.kernel(x, None, [None], config)[0] == 0).all())


def test_kernel_runs_on_the_current_stream() -> None:
    x = torch.randn(64, 4096, device="cuda").to(BF16)
    vectors = RMS.vectors(4096)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = x * 2
        got = RMS.kernel(y, None, vectors, -1)
    stream.synchronize()
    assert_as_good_as_eager(got, RMS, y, None, vectors)


def test_kernels_that_start_early_wait_for_what_they_read() -> None:
    """A chain in which each kernel reads what the one before wrote, of many CTAs, in and out of a CUDA graph."""
    first, second = FORMS["add_rms_norm bf16"], FORMS["layer_norm bf16"]
    x, residual, weights = inputs(first, 4096, 2048)
    others = second.vectors(2048)

    def chain() -> Tensor:
        y, total = x, residual
        for _ in range(8):
            y, total, _ = first.kernel(y, total, weights, -1)
            y = second.kernel(y, None, others, -1)[0]
        return y

    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(3):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, expected)


def test_kernel_is_captured_in_a_cuda_graph() -> None:
    x = torch.randn(64, 4096, device="cuda").to(BF16)
    vectors = RMS.vectors(4096)
    outs = {config: RMS.kernel(x, None, vectors, config) for config in configs()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for config, results in outs.items():
            RMS.launch(x, None, vectors, config, results)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for results in outs.values():
        assert_as_good_as_eager(results, RMS, x, None, vectors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_runs_on_the_device_of_x() -> None:
    x = torch.randn(8, 512, device="cuda:1", dtype=FP32)
    for config in configs():
        out = torch.full_like(x, float("nan"))
        torch.ops.infuse.rms_norm_out(x, None, EPS, 0.0, False, False, config, out)
        torch.testing.assert_close(out, op.rms_norm_ref(x, None, EPS))
    assert torch.cuda.current_device() == 0


def test_refusals_say_what_was_got_and_expected() -> None:
    x = torch.randn(4, 64, device="cuda").to(BF16)
    weight = torch.randn(64, device="cuda").to(BF16)
    scattered = torch.empty(4, 4, 4, 4, 64, device="cuda", dtype=BF16)[::2, ::2, ::2, ::2]
    out_of_range = len(library.configurations("norm"))
    y, plain = torch.empty_like(x), (0.0, False, False, -1)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((x.t(), None, EPS, *plain, torch.empty_like(x.t())), "stride of the last dimension of x, got 64"),
        ((x, weight.half(), EPS, *plain, y), "dtype of weight, got float16"),
        ((x, weight[1:], EPS, *plain, y), r"shape of weight, got \[63\], expected \[64\]"),
        ((x, weight, EPS, 1.0, True, False, -1, y), "weight_offset with cast_before_weight"),
        ((x, weight, EPS, *plain, x.float()), "dtype of out, got float32, expected bfloat16"),
        ((x, weight.float(), EPS, 0.0, True, False, -1, y), "dtype of out, got bfloat16, expected float32"),
        ((x, weight, EPS, *plain, x[1:].clone()), r"shape of out, got \[3, 64\], expected \[4, 64\]"),
        ((x, weight, EPS, *plain, x[:1].clone().expand(4, 64)), "stride of dimension 0 of out, got 0"),
        ((x, weight, EPS, 0.0, False, False, out_of_range, y), f"config, got {out_of_range}"),
        ((x.double(), None, EPS, *plain, x.double()), "dtype of x"),
        ((scattered, None, EPS, *plain, torch.empty(2, 2, 2, 2, 64)), "device of out"),
        ((scattered, None, EPS, *plain, scattered.clone()), "dimensions of x that can't be merged, got 4"),
        ((x, weight.cpu(), EPS, *plain, y), "device of weight"),
        ((x, weight, EPS, *plain, y, torch.empty(3, device="cuda")), "elements of rstd, got 3"),
        ((x, weight, EPS, *plain, y, torch.empty(8, device="cuda")[::2]), "strides of rstd"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.infuse.rms_norm_out(*arguments)
    with pytest.raises(RuntimeError, match="dtype of bias, got bfloat16, expected float32"):
        torch.ops.infuse.layer_norm_out(x, weight.float(), weight, EPS, 0.0, False, -1, y)
    with pytest.raises(RuntimeError, match="shape of residual"):
        torch.ops.infuse.add_rms_norm_out(x, x[1:], weight, EPS, *plain, y, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="groups, got 3"):
        torch.ops.infuse.gated_rms_norm_out(x, x, weight, EPS, True, True, 3, False, False, -1, y)


@pytest.mark.parametrize("name", FEW)
def test_functional_operators_use_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public operators give the bits of the kernel, not those of the fallback, in inference and in training."""
    form = FORMS[name]
    tensors = inputs(form, 16, 896)
    expected = form.kernel(*tensors, -1)
    for fallback in (f"{form.op}_ref", f"{form.op}_fwd_ref", "_implementation"):
        monkeypatch.setattr(form.module, fallback, None)
    results = getattr(torch.ops.infuse, form.op)(*form.arguments(*tensors))
    for result, other in zip([results] if isinstance(results, Tensor) else results, expected, strict=False):
        assert torch.equal(result, other) and result.stride() == other.stride()
    for result, other in zip(
        getattr(torch.ops.infuse, f"{form.op}_fwd")(*form.arguments(*tensors)), expected, strict=True
    ):
        assert torch.equal(result, other) and result.stride() == other.stride()


def test_library_covers_this_gpu() -> None:
    assert build.covers(torch.cuda.get_device_capability())
    assert build.load(build_missing=True) is build.load(build_missing=False)
