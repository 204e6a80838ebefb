"""infuse::norm_backward, the CUDA kernels of the norms' backward: every configuration, dtype, alignment and layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from infuse import build
from infuse.ops import add_layer_norm, add_rms_norm, gated_rms_norm, layer_norm, library, rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = torch.ops.infuse
FP32_ULP = 2.0**-24
DIMS = (1, 7, 8, 64, 100, 128, 896, 1000, 1536, 4096, 5120, 8191, 8192, 16384, 20000, 262144)


@dataclass(frozen=True, slots=True)
class Form:
    """What is there beside x and dy. weight: its dtype, None without one; bias has it too."""

    dtype: torch.dtype
    weight: torch.dtype | None
    centered: bool = False
    add: bool = False
    offset: float = 0.0

    def make(self, *shape: int, scale: float = 1.0) -> tuple[Tensor | None, ...]:
        """dy, dsum, x, weight, bias, mean, rstd."""
        x, dy, dsum = ((torch.randn(shape, device="cuda") * scale).to(self.dtype) for _ in range(3))
        return self.around(dy, dsum if self.add else None, x)

    def around(self, dy: Tensor, dsum: Tensor | None, x: Tensor) -> tuple[Tensor | None, ...]:
        weight = bias = None
        if self.weight is not None:
            weight = (1 + 0.2 * torch.randn(x.shape[-1], device="cuda")).to(self.weight)
            bias = torch.randn_like(weight) if self.centered else None
        h = x.float()
        mean = h.mean(-1) if self.centered else None
        rstd = torch.rsqrt((h if mean is None else h - mean.unsqueeze(-1)).square().mean(-1) + 1e-5)
        return dy, dsum, x, weight, bias, mean, rstd


FORMS = {
    "rms bf16": Form(BF16, BF16),
    "rms bf16, fp32 weight": Form(BF16, FP32, offset=1.0),
    "rms fp16, no weight": Form(FP16, None),
    "rms fp16, fp32 weight": Form(FP16, FP32),
    "rms fp32": Form(FP32, FP32),
    "layer bf16": Form(BF16, BF16, centered=True),
    "layer bf16, fp32 weight": Form(BF16, FP32, centered=True),
    "layer fp16": Form(FP16, FP16, centered=True, offset=0.5),
    "layer fp32, no weight": Form(FP32, None, centered=True),
    "add + rms bf16": Form(BF16, BF16, add=True),
    "add + rms fp32": Form(FP32, FP32, add=True),
    "add + layer bf16": Form(BF16, BF16, centered=True, add=True),
    "add + layer fp16, fp32 weight": Form(FP16, FP32, centered=True, add=True),
}
RMS = FORMS["rms bf16"]


def configs() -> range:
    """-1, where the launcher chooses, and every configuration."""
    return range(-1, len(library.configurations("norm_backward")))


def run(form: Form, tensors: tuple[Tensor | None, ...], config: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's answer, in memory that held NaN: the allocator hands out freed blocks again."""
    x = tensors[2]
    assert x is not None
    sizes = (x.shape, (x.shape[-1],), (x.shape[-1],), (1 << 20,))
    blocks = [torch.full(size, math.nan, dtype=x.dtype, device="cuda") for size in sizes]
    del blocks
    found: tuple[Tensor, Tensor, Tensor] = OPS.norm_backward(*tensors, form.offset, config)
    return found


def check(form: Form, tensors: tuple[Tensor | None, ...], found: tuple[Tensor, ...]) -> None:
    """Each result is one rounding to its dtype away from the fp64 answer, and what the fp32 sums add.

    A sum's error is at most the number of additions that a term goes through times half an ulp of the sum of the terms'
    magnitudes: 64 covers the longest chains here (a thread's elements of a row, its rows, the parts of all CTAs).
    """
    dy, dsum, x, weight, bias, mean, rstd = (None if t is None else t.double() for t in tensors)
    assert dy is not None and x is not None and rstd is not None
    rstd = rstd.unsqueeze(-1)
    n = (x if mean is None else x - mean.unsqueeze(-1)) * rstd
    g = dy if weight is None else dy * (weight + form.offset)
    mean_g = g.mean(-1, keepdim=True) if form.centered else torch.zeros_like(rstd)
    dx = rstd * (g - mean_g - n * (g * n).mean(-1, keepdim=True))
    magnitude = g.abs() + g.abs().mean(-1, keepdim=True) + n.abs() * (1 + (g * n).abs().mean(-1, keepdim=True))
    magnitude = rstd * magnitude
    if dsum is not None:
        dx, magnitude = dx + dsum, magnitude + dsum.abs()
    _check("dx", found[0], dx, magnitude, form.dtype)
    for what, got, there, terms in (("dweight", found[1], weight, dy * n), ("dbias", found[2], bias, dy)):
        if there is None:
            assert got.shape == (0,)
        else:
            terms = terms.reshape(-1, terms.shape[-1])
            assert form.weight is not None
            _check(what, got, terms.sum(0), terms.abs().sum(0), form.weight)


def _check(what: str, got: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
    allowed = torch.finfo(dtype).eps * expected.abs() + 64 * FP32_ULP * magnitude + torch.finfo(dtype).tiny
    excess = ((got.double() - expected).abs() / allowed).max().item() if got.numel() else 0.0
    assert excess <= 1, f"{what}: error {excess:.3g} times the bound"


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_right(name: str) -> None:
    form = FORMS[name]
    for dim in DIMS:
        tensors = form.make(3 if dim > 10_000 else 37, dim)  # neither divides the rows of a CTA
        check(form, tensors, run(form, tensors))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["rms bf16", "add + layer bf16", "rms fp32"])
def test_every_configuration_is_right_and_leaves_its_inputs(name: str, dim: int) -> None:
    form = FORMS[name]
    tensors = form.make(3 if dim > 10_000 else 37, dim)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    for config in configs():
        check(form, tensors, run(form, tensors, config))
    for now, then in zip(tensors, before):
        assert then is None or (now is not None and torch.equal(now, then))


@pytest.mark.parametrize("dim", [128, 896, 4096])
def test_more_rows_than_fit_the_machine_at_once(dim: int) -> None:
    for form in (RMS, FORMS["add + layer bf16"]):
        tensors = form.make(5003, dim)
        for config in configs():
            check(form, tensors, run(form, tensors, config))


@pytest.mark.parametrize("dim", [896, 1024, 4096])
def test_more_rows_than_fit_the_machine_at_once_with_every_gradient_in_several_terms(dim: int) -> None:
    form = FORMS["add + rms bf16"]
    dy, dsum, x, *rest = form.make(70_001, dim)
    assert dy is not None and x is not None
    for more in ([torch.randn_like(x)], [torch.randn_like(x), torch.randn_like(x)]):
        total = torch.stack([dy, *more]).double().sum(0)
        for config in configs():
            found = OPS.norm_backward(dy, dsum, x, *rest, form.offset, config, **dict(zip(("dy_1", "dy_2"), more)))
            check(form, (total, dsum, x, *rest), found)


@pytest.mark.parametrize("name", FORMS)
def test_the_same_input_gives_the_same_bits(name: str) -> None:
    form = FORMS[name]
    for dim in (100, 128, 896, 4096, 20000):
        tensors = form.make(1000, dim)
        first = run(form, tensors)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(form, tensors)))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 3e4])
@pytest.mark.parametrize("name", ["rms bf16", "layer bf16, fp32 weight", "add + rms fp32"])
def test_magnitudes(name: str, scale: float) -> None:
    form = FORMS[name]
    tensors = form.make(100, 1024, scale=scale)
    check(form, tensors, run(form, tensors))


def strided_terms(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors of one shape: rows behind one another, padded rows, and one row for all."""
    plain = torch.randn(shape, device="cuda", dtype=dtype)
    padded = torch.randn((*shape[:-1], shape[-1] + 16), device="cuda", dtype=dtype)[..., 8:-8]
    return plain, padded, torch.randn(shape[-1], device="cuda", dtype=dtype).expand(shape)


@pytest.mark.parametrize("dim", [7, 128, 896, 4096, 8192, 16384, 20000])
@pytest.mark.parametrize("name", ["rms bf16", "add + rms bf16", "add + layer bf16", "layer fp32, no weight"])
def test_a_gradient_that_is_a_sum_is_added_up_in_fp32(name: str, dim: int) -> None:
    form = FORMS[name]
    _, dsum, x, *rest = form.make(3 if dim > 10_000 else 37, dim)
    assert x is not None
    dy, *more = strided_terms(*x.shape, dtype=form.dtype)
    for terms in (more[:1], more):
        total = torch.stack([dy, *terms]).double().sum(0)
        names = dict(zip(("dy_1", "dy_2"), terms))
        for config in configs():
            found = OPS.norm_backward(dy, dsum, x, *rest, form.offset, config, **names)
            check(form, (total, dsum, x, *rest), found)


@pytest.mark.parametrize("dim", [7, 100, 128, 896, 4096, 8192, 20000])
@pytest.mark.parametrize("name", ["rms bf16", "add + rms bf16", "add + layer bf16", "layer fp32, no weight"])
def test_dx_may_take_the_place_of_a_gradient_that_is_read(name: str, dim: int) -> None:
    form = FORMS[name]
    dy, dsum, x, *rest = form.make(1000 if dim < 1000 else 150, dim)
    assert dy is not None and x is not None
    terms = [torch.randn_like(x) for _ in range(2)]
    for config in configs():
        expected = OPS.norm_backward(dy, dsum, x, *rest, form.offset, config, *terms)
        for place in range(4 if form.add else 3):
            copies = [tensor.clone() for tensor in (dy, *terms)] + ([dsum.clone()] if dsum is not None else [])
            sums = copies[3] if form.add else None
            gradients = OPS.norm_backward_into(
                *(copies[place], copies[0], sums, x, *rest, form.offset, config, copies[1], copies[2])
            )
            found = (copies[place], *gradients)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dim", [100, 128, 4096, 20000])
@pytest.mark.parametrize("name", ["rms bf16", "rms fp32", "add + rms bf16"])
def test_where_the_minimum_is_in_force_rstd_depends_on_nothing(name: str, dim: int) -> None:
    form, minimum = FORMS[name], 1.0
    dy, dsum, x, weight, *_ = form.make(20, dim)
    assert dy is not None and x is not None
    x[::2] *= 0.5
    x[1::2] *= 2
    rstd = torch.rsqrt(x.float().square().mean(-1).clamp(min=minimum))
    wide = [None if tensor is None else tensor.double() for tensor in (dy, x, weight)]
    expected, expected_dweight = rms_norm.rms_norm_bwd_ref(*wide, rstd.double(), 0.0, False, minimum)  # type: ignore[arg-type]
    for config in configs():
        dx, dweight, _ = OPS.norm_backward(dy, dsum, x, weight, None, None, rstd, form.offset, config, minimum=minimum)
        wanted = expected if dsum is None else expected + dsum
        ulp = torch.finfo(form.dtype).eps
        torch.testing.assert_close(dx.double(), wanted, rtol=ulp, atol=8 * ulp)
        torch.testing.assert_close(dweight.double(), expected_dweight, rtol=ulp, atol=1e-4)


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("dim", [7, 128, 896, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype, weight_dtype", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)])
def test_gates(dtype: torch.dtype, weight_dtype: torch.dtype, dim: int, gate_first: bool) -> None:
    dy, x, gate = strided_terms(37, dim, dtype=dtype)
    more = tuple(torch.randn_like(dy) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(dim, device="cuda")).to(weight_dtype)
    for is_silu, terms in ((True, ()), (False, more)):
        activation = "silu" if is_silu else "sigmoid"
        wide_gate = gate.double()
        act = torch.nn.functional.silu(wide_gate) if is_silu else wide_gate.sigmoid()
        normed = x.double() * (act if gate_first else 1)
        rstd = torch.rsqrt(normed.square().mean(-1) + 1e-5).float()
        total = torch.stack([dy, *terms]).double().sum(0)
        wide = (total, x.double(), wide_gate, weight.double(), rstd.double().unsqueeze(-1))
        expected = gated_rms_norm.gated_rms_norm_bwd_ref(*wide, not gate_first, activation, 1, False, False)
        names = dict(zip(("dy_1", "dy_2"), terms))
        for config in configs():
            found = OPS.gated_norm_backward(dy, x, gate, weight, rstd, gate_first, is_silu, config, **names)
            again = OPS.gated_norm_backward(dy, x, gate, weight, rstd, gate_first, is_silu, config, **names)
            for mine, same, theirs in zip(found, again, expected, strict=True):
                assert torch.equal(mine, same)
                ulp = torch.finfo(mine.dtype).eps
                atol = 16 * FP32_ULP * dim**0.5 * theirs.abs().max().item() + 1e-5
                torch.testing.assert_close(mine.double(), theirs, rtol=ulp, atol=atol)


@pytest.mark.parametrize("dim", [128, 896, 4096])
def test_strided_views(dim: int) -> None:
    """Heads of a packed projection, padded rows, an expanded gradient, and three leading dimensions."""
    form = FORMS["add + rms bf16"]
    packed = torch.randn(5, 7, 3 * 4 * dim, device="cuda", dtype=BF16)
    q, k, v = (part.unflatten(-1, (4, dim)).transpose(1, 2) for part in packed.chunk(3, -1))
    padded = torch.randn(5, 4, 7, dim + 8, device="cuda", dtype=BF16)[..., :dim]
    expanded = torch.randn(dim, device="cuda", dtype=BF16).expand(5, 4, 7, dim)
    for dy, dsum, x in ((q, k, v), (padded, q, k), (expanded, padded, q)):
        tensors = form.around(dy, dsum, x)
        for config in configs():
            check(form, tensors, run(form, tensors, config))


@pytest.mark.parametrize("dim", [64, 896, 4096])
@pytest.mark.parametrize("elements", [1, 2, 4])
def test_misaligned_tensors(dim: int, elements: int) -> None:
    for form in (RMS, FORMS["layer fp32, no weight"]):
        storage = torch.randn(3, 40 * dim + elements, device="cuda").to(form.dtype)
        for which in range(2):
            parts = [storage[i, elements if i == which else 0 :][: 40 * dim].view(40, dim) for i in range(2)]
            tensors = form.around(parts[0], None, parts[1])
            check(form, tensors, run(form, tensors))
    weight = torch.randn(dim + elements, device="cuda", dtype=BF16)[elements:]
    tensors = RMS.make(40, dim)
    tensors = (*tensors[:3], weight, *tensors[4:])
    check(RMS, tensors, run(RMS, tensors))


@pytest.mark.parametrize("dim", [64, 4096])
def test_misaligned_terms_gates_and_places(dim: int) -> None:
    dy, dsum, x, *rest = FORMS["add + rms bf16"].make(40, dim)
    assert dy is not None and dsum is not None and x is not None
    off = torch.randn(40 * dim + 1, device="cuda", dtype=BF16)[1:].view(40, dim)
    check(
        FORMS["add + rms bf16"],
        (dy.double() + off.double(), dsum, x, *rest),
        (*OPS.norm_backward(dy, dsum, x, *rest, 0.0, -1, off),),
    )
    expected = OPS.norm_backward(dy, dsum, x, *rest, 0.0, -1, off.clone())
    gradients = OPS.norm_backward_into(off, dy, dsum, x, *rest, 0.0, -1, off)
    torch.testing.assert_close((off, *gradients), tuple(expected), rtol=1e-2, atol=1e-2)
    gate = torch.randn_like(x)
    plain = OPS.gated_norm_backward(dy, x, gate, rest[0], rest[3], True, True, -1)
    off.copy_(gate)
    found = OPS.gated_norm_backward(dy, x, off, rest[0], rest[3], True, True, -1)
    torch.testing.assert_close(tuple(found), tuple(plain), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dim", [128, 4096, 20000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stays_in_its_row_and_column(dim: int, value: float) -> None:
    dy, _, x, weight, _, _, rstd = RMS.make(9, dim)
    assert dy is not None and x is not None and rstd is not None
    dy[4, 7] = value
    dx, dweight, _ = run(RMS, (dy, None, x, weight, None, None, rstd))
    assert not dx[4].isfinite().any()
    assert not dweight[7].isfinite()
    others = torch.arange(9, device="cuda") != 4
    assert dx[others].isfinite().all() and dweight.isfinite().sum() == dim - 1
    x[4, 7], dy[4, 7] = value, 1.0
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-5)
    dx, dweight, _ = run(RMS, (dy, None, x, weight, None, None, rstd))
    expected_dx, expected_dweight = rms_norm.rms_norm_bwd_ref(dy, x, weight, rstd, 0.0, False)
    assert torch.equal(dx.isnan(), expected_dx.isnan()) and torch.equal(dweight.isnan(), expected_dweight.isnan())


def test_no_rows_and_no_columns() -> None:
    for form in (RMS, FORMS["add + layer bf16"]):
        for config in configs():
            dx, dweight, dbias = run(form, form.make(0, 64), config)
            assert dx.shape == (0, 64) and not dweight.any() and not dbias.any() and dweight.shape == (64,)
            dx, dweight, _ = run(form, form.make(5, 0), config)
            assert dx.shape == (5, 0) and dweight.shape == (0,)


def test_errors_name_what_is_wrong() -> None:
    dy, _, x, weight, _, _, rstd = RMS.make(4, 64)
    assert dy is not None and x is not None and weight is not None and rstd is not None
    wrong = {
        "config, got 99": (dy, None, x, weight, None, None, rstd, 0.0, 99),
        "dtype of dy, got float32": (dy.float(), None, x, weight, None, None, rstd, 0.0, -1),
        "shape of dsum": (dy, dy[:2], x, weight, None, None, rstd, 0.0, -1),
        "shape of weight": (dy, None, x, weight[:8], None, None, rstd, 0.0, -1),
        "bias, got one without mean": (dy, None, x, weight, weight, None, rstd, 0.0, -1),
        "shape of rstd": (dy, None, x, weight, None, None, rstd[:2], 0.0, -1),
        "shape of dy_2": (dy, None, x, weight, None, None, rstd, 0.0, -1, dy, dy[:2]),
        "stride of the last dimension of x": (dy, None, x.t().contiguous().t(), weight, None, None, rstd, 0.0, -1),
    }
    for message, args in wrong.items():
        with pytest.raises(RuntimeError, match=f"norm_backward: {message}"):
            OPS.norm_backward(*args)


def test_the_operators_use_the_kernel_and_fall_back() -> None:
    """Each of the four, for tensors that the kernel takes and for a transposed gradient that it does not."""
    for name, (module, form) in {
        "rms_norm": (rms_norm, RMS),
        "layer_norm": (layer_norm, FORMS["layer bf16"]),
        "add_rms_norm": (add_rms_norm, FORMS["add + rms bf16"]),
        "add_layer_norm": (add_layer_norm, FORMS["add + layer bf16"]),
    }.items():
        for transposed in (False, True):
            dy, *rest = (tensor for tensor in form.make(33, 64) if tensor is not None)
            dy = dy.t().contiguous().t() if transposed else dy
            found = getattr(OPS, f"{name}_bwd")(dy, *rest, 0.0, False)
            expected = getattr(module, f"{name}_bwd_ref")(dy, *rest, 0.0, False)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_the_gated_operator_uses_the_kernel_and_falls_back() -> None:
    dy, x, gate = (torch.randn(33, 64, device="cuda", dtype=BF16) for _ in range(3))
    weight = torch.rand(64, device="cuda", dtype=BF16)
    for norm_before_gate in (False, True):
        for groups in (1, 4):
            flags = (norm_before_gate, "silu", groups, False, False)
            _, rstd = gated_rms_norm.gated_rms_norm_fwd_ref(x, gate, weight, 1e-5, *flags)
            found = OPS.gated_rms_norm_bwd(dy, x, gate, weight, rstd, *flags)
            expected = gated_rms_norm.gated_rms_norm_bwd_ref(dy, x, gate, weight, rstd, *flags)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_gradients_flow_through_the_public_functions() -> None:
    x, residual = (torch.randn(6, 5, 256, device="cuda", dtype=BF16, requires_grad=True) for _ in range(2))
    weight = torch.rand(256, device="cuda", dtype=BF16, requires_grad=True)
    y, total = add_rms_norm.add_rms_norm(x, residual, weight)
    douts = torch.randn_like(y), torch.randn_like(total)
    found = torch.autograd.grad((y, total), (x, residual, weight), douts)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, residual, weight)]
    outs = add_rms_norm.add_rms_norm_ref(*wide, 1e-6)
    expected = torch.autograd.grad(outs, wide, [dout.double() for dout in douts])
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine.double(), theirs, rtol=3e-2, atol=3e-2)


def test_a_cuda_graph_replays_the_kernel() -> None:
    tensors = RMS.make(513, 4096)
    expected = run(RMS, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = OPS.norm_backward(*tensors, 0.0, -1)
    for tensor in found:
        tensor.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_the_library_knows_its_configurations() -> None:
    assert build.load(build_missing=False).loaded
    names = library.configurations("norm_backward")
    assert len(set(names)) == len(names) >= 3
