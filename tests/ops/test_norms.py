"""infuse::rms_norm and infuse::add_rms_norm against float64, their registration, and what they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils import _pytree as pytree

import infuse
from infuse.ops import norm_kernels, problems
from infuse.ops import rms_norm as op
from tests.tolerances import assert_close_to_fp64, error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAGS = {"plain": (0.0, False), "offset": (1.0, False), "cast first": (0.0, True)}
MINIMUM = (0.0, False, True)
OPS = torch.ops.infuse


def norm_inputs(problem: problems.Norm, dtype: torch.dtype, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(problem.shape, dtype=dtype, requires_grad=grad)
    residual = torch.randn(problem.shape, dtype=dtype, requires_grad=grad)
    weight = torch.randn(problem.row_size, dtype=dtype, requires_grad=grad)
    return x, residual, weight


def hand_written(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """As models spell it; in float64 the reference."""
    h = x if x.dtype == torch.float64 else x.float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(x.dtype) if cast_first else (n * (offset + weight.to(h.dtype))).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("problem", problems.NORMS.values(), ids=problems.NORMS)
def test_rms_norm_is_as_near_to_float64_as_eager(problem: problems.Norm, flags: Any, dtype: torch.dtype) -> None:
    x, _, weight = norm_inputs(problem, dtype)
    got = infuse.rms_norm(x, weight, 1e-5, weight_offset=flags[0], cast_before_weight=flags[1])
    reference = hand_written(x.double(), weight.double(), 1e-5, *flags)
    assert_close_to_fp64(got, hand_written(x, weight, 1e-5, *flags), reference)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_holds_at_any_scale(scale: float) -> None:
    x = torch.randn(4, 64) * scale
    assert error(infuse.rms_norm(x, None, 1e-6), torch.nn.functional.rms_norm(x.double(), (64,), eps=1e-6)) < 1e-6


def test_cast_first_with_a_float32_weight_gives_float32() -> None:
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16)
    got = infuse.rms_norm(x, weight, 1e-6, cast_before_weight=True)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, hand_written(x, weight, 1e-6, 0.0, True), rtol=0, atol=0)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_norm_gradients_are_right_in_float64(flags: tuple[float, bool]) -> None:
    x, residual, weight = norm_inputs(problems.Norm((3, 2), 5), torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *a: OPS.rms_norm(*a, 1e-3, *flags), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: OPS.add_rms_norm(*a, 1e-3, *flags), (x, residual, weight))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_gradients_are_as_near_to_float64_as_eager(flags: tuple[float, bool], dtype: torch.dtype) -> None:
    x, _, weight = norm_inputs(problems.Norm((6, 7), 64), dtype, grad=True)
    dy = torch.randn(6, 7, 64, dtype=dtype)

    def gradients(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, dy.to(inputs[0].dtype))

    got = gradients(lambda x, w: OPS.rms_norm(x, w, 1e-5, *flags), x, weight)
    eager = gradients(lambda x, w: hand_written(x, w, 1e-5, *flags), x, weight)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    reference = gradients(lambda x, w: hand_written(x, w, 1e-5, *flags), *doubles)
    for mine, theirs, exact in zip(got, eager, reference):
        assert_close_to_fp64(mine, theirs, exact)


def test_second_derivatives_are_right() -> None:
    x, residual, weight = norm_inputs(problems.Norm((2, 2), 3), torch.float64, grad=True)
    assert torch.autograd.gradgradcheck(lambda *a: OPS.rms_norm(*a, 1e-3), (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: OPS.add_rms_norm(*a, 1e-3), (x, residual, weight), fast_mode=True)


CASES = list(itertools.product(DTYPES, FLAGS.values()))


@pytest.mark.parametrize(("dtype", "flags"), CASES[:4])
def test_norms_pass_opcheck(dtype: torch.dtype, flags: tuple[float, bool]) -> None:
    x, residual, weight = norm_inputs(problems.Norm((3, 4), 16), dtype, grad=True)
    opcheck(OPS.rms_norm.default, (x, weight, 1e-5, *flags))
    opcheck(OPS.rms_norm.default, (x, None, 1e-5))
    opcheck(OPS.add_rms_norm.default, (x, residual, weight, 1e-5, *flags))


def strided(*shape: int) -> Tensor:
    """A view with gaps and swapped dimensions."""
    return torch.randn(*shape[::-1], 2)[..., 0].permute(*reversed(range(len(shape))))


def test_norms_return_the_strides_of_their_fakes() -> None:
    x, residual, dy, weight = strided(3, 4, 16), strided(3, 4, 16), strided(3, 4, 16), torch.randn(32)[::2]
    rstd = strided(3, 4)
    calls = [
        (OPS.rms_norm, (x, weight, 1e-5)),
        (OPS.rms_norm_fwd, (x, weight, 1e-5, 0.0, False)),
        (OPS.rms_norm_bwd, (dy, x, weight, rstd, 0.0, False)),
        (OPS.rms_norm_bwd, (dy, x, None, rstd, 0.0, False)),
        (OPS.add_rms_norm, (x, residual, weight, 1e-5)),
        (OPS.add_rms_norm_fwd, (x, residual, weight, 1e-5, 0.0, True)),
        (OPS.add_rms_norm_bwd, (dy, residual, x, weight, rstd, 0.0, False)),
    ]
    assert_same_layouts(calls)


def assert_same_layouts(calls: list[tuple[Any, tuple[Any, ...]]]) -> None:
    """Real and fake results agree in shape, dtype and strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for packet, args in calls:
        real = packet.default(*args)
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, args)
            fake = packet.default(*fakes)
        pairs = zip([real], [fake]) if isinstance(real, Tensor) else zip(real, fake)
        for mine, theirs in pairs:
            assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride()), packet


def test_inputs_are_not_changed() -> None:
    x, residual, weight = norm_inputs(problems.Norm((4,), 32), torch.bfloat16)
    copies = [tensor.clone() for tensor in (x, residual, weight)]
    infuse.add_rms_norm(x, residual, weight)
    for tensor, before in zip((x, residual, weight), copies):
        assert torch.equal(tensor, before)


def test_not_a_number_and_infinity_stay_in_their_row() -> None:
    x = torch.randn(4, 16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = infuse.rms_norm(x, torch.randn(16))
    assert got[1].isnan().all()
    assert got[2, 5].isnan() and (got[2, torch.arange(16) != 5] == 0).all()
    assert got[0].isfinite().all() and got[3].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((torch.ones(3, 4, dtype=torch.int64),), TypeError, ["rms_norm", "x", "torch.int64", "torch.bfloat16"]),
        ((torch.ones(3, 4), torch.ones(5)), ValueError, ["weight", "got 5", "expected 4"]),
        ((torch.ones(3, 4), torch.ones(3, 4)), ValueError, ["weight", "2 dimensions", "[D]"]),
        ((torch.tensor(1.0),), ValueError, ["x", "scalar"]),
    ],
)
def test_wrong_arguments_name_what_was_got_and_expected(arguments: Any, kind: Any, words: list[str]) -> None:
    for call in (infuse.rms_norm, lambda *a: OPS.rms_norm(*a, *[None] * (2 - len(a)), 1e-6)):
        with pytest.raises(kind) as raised:
            call(*arguments)
        assert all(word in str(raised.value) for word in words), raised.value


def test_add_rms_norm_refuses_other_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"residual: size of dimension 0: got 1, expected 3"):
        infuse.add_rms_norm(torch.ones(3, 4), torch.ones(1, 4))
    with pytest.raises(TypeError, match="one dtype"):
        infuse.add_rms_norm(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16))


def test_an_offset_with_cast_before_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_offset: got 1.0, expected 0"):
        infuse.rms_norm(torch.ones(2, 4), torch.ones(4), weight_offset=1.0, cast_before_weight=True)


def test_inline_is_seen_through_by_autograd() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    assert "RMSNorm" in type(OPS.rms_norm(x, None, 1e-6).grad_fn).__name__
    assert "RMSNorm" not in type(OPS.rms_norm.inline(x, None, 1e-6).grad_fn).__name__
    torch.testing.assert_close(OPS.rms_norm(x, None, 1e-6), OPS.rms_norm.inline(x, None, 1e-6))


def test_the_kernel_takes_what_it_says() -> None:
    x, weight = torch.empty(2, 8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)
    assert op.can_run(x, weight) == ""
    assert "float64" in op.can_run(x.double())
    assert "float16" in op.can_run(x, weight.half())
    assert "stride" in op.can_run(torch.empty(8, 2, dtype=torch.bfloat16).t(), weight)
    assert "dimensions" in op.can_run(torch.empty(1, 1, 1, 1, 8))


def bounded_below(x: Tensor, weight: Tensor, minimum: float) -> Tensor:
    return x / x.pow(2).mean(-1, keepdim=True).clamp(min=minimum).sqrt() * weight


def test_rows_at_one_distance_are_not_scattered() -> None:
    packed = torch.empty(2, 8, 6, 16)
    together = packed, packed[:, :, 1:2], packed[..., :8], packed[:1, 1:5], packed[0, 0, 0], packed[:, :1, 0]
    assert not any(norm_kernels.are_scattered(x) for x in together)
    assert all(norm_kernels.are_scattered(x) for x in (packed[:, :, :4], packed.transpose(0, 1), packed[:, 1:, 0]))


def test_eps_as_minimum_bounds_the_mean_of_squares() -> None:
    x, residual, weight = norm_inputs(problems.Norm((5,), 16), torch.float64, grad=True)
    x = (x.detach() * torch.tensor([0.0, 0.1, 1.0, 1.0, 9.0]).unsqueeze(-1)).requires_grad_()
    expected = bounded_below(x, weight, 0.3)
    torch.testing.assert_close(infuse.rms_norm(x, weight, 0.3, eps_as_minimum=True), expected)
    torch.testing.assert_close(OPS.rms_norm.inline(x, weight, 0.3, *MINIMUM), expected)
    y, total = infuse.add_rms_norm(x, residual, weight, 0.3, eps_as_minimum=True)
    torch.testing.assert_close(y, bounded_below(total, weight, 0.3))
    dy = torch.randn_like(x)
    got = torch.autograd.grad(OPS.rms_norm(x, weight, 0.3, *MINIMUM), (x, weight), dy)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (x, weight), dy))


def test_gradients_with_eps_as_minimum_are_right_in_float64() -> None:
    x, residual, weight = norm_inputs(problems.Norm((3, 2), 5), torch.float64, grad=True)
    for inputs, op_under_test in (((x, weight), OPS.rms_norm), ((x, residual, weight), OPS.add_rms_norm)):
        assert torch.autograd.gradcheck(lambda *a, op=op_under_test: op(*a, 0.8, *MINIMUM), inputs)
        assert torch.autograd.gradgradcheck(lambda *a, op=op_under_test: op(*a, 0.8, *MINIMUM), inputs, fast_mode=True)
    opcheck(OPS.rms_norm.default, (x, weight, 0.8, *MINIMUM))
    opcheck(OPS.add_rms_norm.default, (x, residual, weight, 0.8, *MINIMUM))
