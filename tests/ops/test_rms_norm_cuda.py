"""infuse::rms_norm_out, the CUDA kernel of RMSNorm: every configuration, dtype, alignment and layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from infuse import build
from infuse.ops import library
from infuse.ops import rms_norm as op

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5

# x, weight (None: without), cast_before_weight, weight_offset
VARIANTS = {
    "bf16": (BF16, BF16, False, 0.0),
    "bf16, cast first": (BF16, BF16, True, 0.0),
    "bf16, offset": (BF16, BF16, False, 1.0),
    "bf16, no weight": (BF16, None, False, 0.0),
    "bf16, fp32 weight": (BF16, FP32, False, 1.0),
    "bf16, fp32 weight, cast first": (BF16, FP32, True, 0.0),
    "fp16": (FP16, FP16, False, 0.0),
    "fp16, cast first": (FP16, FP16, True, 0.0),
    "fp16, fp32 weight": (FP16, FP32, False, 0.0),
    "fp16, fp32 weight, cast first": (FP16, FP32, True, 0.0),
    "fp32": (FP32, FP32, False, 0.0),
    "fp32, cast first": (FP32, FP32, True, 0.0),
    "fp32, no weight": (FP32, None, False, 0.0),
}
DIMS = (1, 7, 64, 100, 128, 896, 1000, 4096, 8191, 16384, 20000, 262144)
Variant = tuple[torch.dtype, "torch.dtype | None", bool, float]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    reason = library.missing(torch.device("cuda"))
    assert not reason, f"these tests need the compiled kernels: {reason}"
    yield
    torch.cuda.synchronize()  # a fault belongs to the test that caused it


def configs() -> range:
    """-1, where the launcher chooses, and every configuration."""
    return range(-1, len(library.configurations("rms_norm")))


def make_weight(variant: Variant, dim: int) -> Tensor | None:
    return None if variant[1] is None else torch.randn(dim, device="cuda", dtype=variant[1])


def run(x: Tensor, weight: Tensor | None, variant: Variant, config: int, out: Tensor | None = None) -> Tensor:
    """The kernel's answer, written over NaN."""
    _, _, cast_before_weight, weight_offset = variant
    if out is None:
        out = torch.empty(x.shape, device="cuda", dtype=op.output_dtype(x, weight, cast_before_weight))
    out.fill_(float("nan"))
    torch.ops.infuse.rms_norm_out(x, weight, EPS, weight_offset, cast_before_weight, config, out)
    return out


def assert_as_good_as_eager(got: Tensor, x: Tensor, weight: Tensor | None, variant: Variant) -> None:
    """Every element is within twice the eager computation's largest error in its row, and one ulp, of the fp64 result.

    Kernel and eager round at the same places and differ in the order of the sum only. One ulp is granted because the
    eager row may be exact by luck; in fp32 four, for the sum, the addition of eps and the two of rsqrt.
    """
    _, _, cast_before_weight, weight_offset = variant
    eager = op.rms_norm_ref(x, weight, EPS, weight_offset, cast_before_weight)
    assert got.dtype == eager.dtype
    h = x.double()
    reference = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    if weight is not None:
        reference = reference * (weight_offset + weight.double())
    scale = reference.abs() + torch.finfo(x.dtype).tiny
    # Of x: cast_before_weight rounds to it also when the output is wider.
    granted = torch.finfo(x.dtype).eps * (4 if x.dtype == FP32 else 1)
    relative_eager = ((eager.double() - reference).abs() / scale).amax(-1, keepdim=True)
    relative = (got.double() - reference).abs() / scale
    excess = relative - (2 * relative_eager + granted)
    assert bool((excess <= 0).all()), f"relative error {relative.max():.3g}, eager's {relative_eager.max():.3g}"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_configuration_is_as_good_as_eager(variant: Variant, dim: int) -> None:
    rows = 3 if dim > 10_000 else 37  # neither divides the rows of a CTA
    x = torch.randn(rows, dim, device="cuda").to(variant[0])
    weight = make_weight(variant, dim)
    inputs = [x] if weight is None else [x, weight]
    before = [tensor.clone() for tensor in inputs]
    for config in configs():
        got = run(x, weight, variant, config)
        assert_as_good_as_eager(got, x, weight, variant)
        assert torch.equal(got, run(x, weight, variant, config)), f"config {config}: two runs differ"
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("variant", ["bf16", "fp32"])
def test_more_rows_than_ctas_run_at_once(variant: str) -> None:
    """Persistent kernels walk over several rows, also over a last round that not every CTA has."""
    for rows, dim in ((100_003, 128), (20_011, 896), (5_003, 4096), (2_001, 16384)):
        x = torch.randn(rows, dim, device="cuda").to(VARIANTS[variant][0])
        weight = make_weight(VARIANTS[variant], dim)
        expected = run(x, weight, VARIANTS[variant], -1)
        assert_as_good_as_eager(expected[-100:], x[-100:], weight, VARIANTS[variant])
        for config in configs():
            torch.testing.assert_close(run(x, weight, VARIANTS[variant], config), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (2, 0, 64), (0,)])
def test_empty_tensors_are_left_alone(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="cuda", dtype=BF16)
    for config in configs():
        assert run(x, None, VARIANTS["bf16, no weight"], config).shape == shape


def test_q_and_k_are_normalised_inside_a_packed_projection() -> None:
    batch, tokens, heads, kv_heads, head_dim = 2, 5, 6, 2, 128
    packed = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, device="cuda").to(BF16)
    weight = make_weight(VARIANTS["bf16"], head_dim)
    for x in (packed[:, :, :heads], packed[:, :, heads : heads + kv_heads], packed.transpose(1, 2)[:, :heads]):
        for config in configs():
            assert_as_good_as_eager(run(x, weight, VARIANTS["bf16"], config), x, weight, VARIANTS["bf16"])


def test_output_may_be_strided() -> None:
    x = torch.randn(3, 4, 96, device="cuda").to(BF16)
    weight = make_weight(VARIANTS["bf16"], 96)
    storage = torch.empty(4, 3, 200, device="cuda", dtype=BF16)
    out = storage.transpose(0, 1)[..., 8:104]
    for config in configs():
        storage.fill_(7)
        got = run(x, weight, VARIANTS["bf16"], config, out)
        assert_as_good_as_eager(got, x, weight, VARIANTS["bf16"])
        assert bool((storage[..., :8] == 7).all()) and bool((storage[..., 104:] == 7).all()), "wrote beside the rows"


def test_expanded_rows_are_read_from_one() -> None:
    x = torch.randn(1, 64, device="cuda").to(BF16).expand(9, 64)
    got = run(x, None, VARIANTS["bf16, no weight"], -1)
    assert torch.equal(got, got[:1].expand(9, 64))
    assert_as_good_as_eager(got, x, None, VARIANTS["bf16, no weight"])


@pytest.mark.parametrize("dim", [64, 100, 4096])
@pytest.mark.parametrize("variant", ["bf16", "bf16, fp32 weight, cast first", "fp16", "fp32"])
def test_misaligned_tensors_use_narrower_accesses(variant: str, dim: int) -> None:
    chosen = VARIANTS[variant]
    for offset in (1, 2, 4):
        x = torch.randn(5 * dim + offset, device="cuda").to(chosen[0])[offset:].view(5, dim)
        assert chosen[1] is not None
        weight = torch.randn(dim + offset, device="cuda").to(chosen[1])[offset:]
        out_dtype = op.output_dtype(x, weight, chosen[2])
        out = torch.empty(5 * dim + offset, device="cuda", dtype=out_dtype)[offset:].view(5, dim)
        aligned = x.clone(), weight.clone()
        for config in configs():
            assert_as_good_as_eager(run(x, aligned[1], chosen, config), x, weight, chosen)
            assert_as_good_as_eager(run(aligned[0], weight, chosen, config), x, weight, chosen)
            assert_as_good_as_eager(run(aligned[0], aligned[1], chosen, config, out), x, weight, chosen)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_fp32_at_any_scale_is_what_torch_gives(scale: float) -> None:
    """Squares may underflow or overflow; the formula is in fp32 and says what then comes out."""
    x = torch.randn(4, 1000, device="cuda") * scale
    expected = op.rms_norm_ref(x, None, EPS)
    for config in configs():
        torch.testing.assert_close(run(x, None, VARIANTS["fp32, no weight"], config), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dim", [64, 1000, 8191])
@pytest.mark.parametrize("variant", ["bf16", "fp16", "fp32"])
def test_nan_and_infinity_come_out_as_in_torch(variant: str, dim: int) -> None:
    x = torch.randn(4, dim, device="cuda").to(VARIANTS[variant][0])
    x[0, dim // 2] = float("nan")
    x[1, 0] = float("inf")
    x[2, -1] = -float("inf")
    weight = make_weight(VARIANTS[variant], dim)
    expected = op.rms_norm_ref(x, weight, EPS)
    for config in configs():
        got = run(x, weight, VARIANTS[variant], config)
        assert torch.equal(got.isnan(), expected.isnan())
        torch.testing.assert_close(got[1:3], expected[1:3], rtol=0, atol=0, equal_nan=True)
        assert_as_good_as_eager(got[3:], x[3:], weight, VARIANTS[variant])


def test_zero_rows_of_zeros_need_eps() -> None:
    x = torch.zeros(2, 512, device="cuda", dtype=BF16)
    for config in configs():
        assert bool((run(x, None, VARIANTS["bf16, no weight"], config) == 0).all())


def test_kernel_runs_on_the_current_stream() -> None:
    x = torch.randn(64, 4096, device="cuda").to(BF16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = x * 2
        got = run(y, None, VARIANTS["bf16, no weight"], -1)
    stream.synchronize()
    assert_as_good_as_eager(got, y, None, VARIANTS["bf16, no weight"])


def test_kernel_is_captured_in_a_cuda_graph() -> None:
    x = torch.randn(64, 4096, device="cuda").to(BF16)
    outs = {config: torch.empty_like(x) for config in configs()}
    for config, out in outs.items():
        run(x, None, VARIANTS["bf16, no weight"], config, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for config, out in outs.items():
            torch.ops.infuse.rms_norm_out(x, None, EPS, 0.0, False, config, out)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for out in outs.values():
        assert_as_good_as_eager(out, x, None, VARIANTS["bf16, no weight"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_runs_on_the_device_of_x() -> None:
    x = torch.randn(8, 512, device="cuda:1", dtype=FP32)
    for config in configs():
        out = torch.full_like(x, float("nan"))
        torch.ops.infuse.rms_norm_out(x, None, EPS, 0.0, False, config, out)
        torch.testing.assert_close(out, op.rms_norm_ref(x, None, EPS))
    assert torch.cuda.current_device() == 0


def test_refusals_say_what_was_got_and_expected() -> None:
    x = torch.randn(4, 64, device="cuda").to(BF16)
    weight = torch.randn(64, device="cuda").to(BF16)
    scattered = torch.empty(4, 4, 4, 4, 64, device="cuda", dtype=BF16)[::2, ::2, ::2, ::2]
    out_of_range = len(library.configurations("rms_norm"))
    cases: list[tuple[tuple[object, ...], str]] = [
        ((x.t(), None, EPS, 0.0, False, -1, torch.empty_like(x.t())), "stride of the last dimension of x, got 64"),
        ((x, weight.half(), EPS, 0.0, False, -1, torch.empty_like(x)), "dtype of weight, got float16"),
        ((x, weight[1:], EPS, 0.0, False, -1, torch.empty_like(x)), r"shape of weight, got \[63\], expected \[64\]"),
        ((x, weight, EPS, 1.0, True, -1, torch.empty_like(x)), "weight_offset with cast_before_weight"),
        ((x, weight, EPS, 0.0, False, -1, x.float()), "dtype of out, got float32, expected bfloat16"),
        ((x, weight.float(), EPS, 0.0, True, -1, torch.empty_like(x)), "dtype of out, got bfloat16, expected float32"),
        ((x, weight, EPS, 0.0, False, -1, x[1:].clone()), r"shape of out, got \[3, 64\], expected \[4, 64\]"),
        ((x, weight, EPS, 0.0, False, -1, x[:1].clone().expand(4, 64)), "stride of dimension 0 of out, got 0"),
        ((x, weight, EPS, 0.0, False, out_of_range, torch.empty_like(x)), f"config, got {out_of_range}"),
        ((x.double(), None, EPS, 0.0, False, -1, x.double()), "dtype of x"),
        ((scattered, None, EPS, 0.0, False, -1, torch.empty(2, 2, 2, 2, 64)), "device of out"),
        (
            (scattered, None, EPS, 0.0, False, -1, scattered.clone()),
            "dimensions of x that can't be merged, got 4",
        ),
        ((x, weight.cpu(), EPS, 0.0, False, -1, torch.empty_like(x)), "device of weight"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.infuse.rms_norm_out(*arguments)


def test_functional_operator_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public operator gives the bits of the kernel, not those of the fallback."""
    x = torch.randn(16, 896, device="cuda").to(BF16)
    weight = make_weight(VARIANTS["bf16"], 896)
    monkeypatch.setattr(op, "rms_norm_ref", None)
    got = torch.ops.infuse.rms_norm(x, weight, EPS)
    assert torch.equal(got, run(x, weight, VARIANTS["bf16"], -1))


def test_library_covers_this_gpu() -> None:
    assert build.covers(torch.cuda.get_device_capability())
    assert build.load(build_missing=True) is build.load(build_missing=False)
