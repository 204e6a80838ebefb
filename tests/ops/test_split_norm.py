"""infuse::linear_add_scale, scaled_linear and scaled_linear_swiglu: an RMSNorm in two halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.ops import library, linear_kernels, skinny_linear_kernels, split_norm
from infuse.ops.linear_add import linear_add_ref
from infuse.ops.norm_linear import norm_linear_ref
from infuse.ops.norm_linear_swiglu import norm_linear_swiglu_ref
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
EPS = 1e-5
needs_kernels = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


@dataclass(frozen=True, slots=True)
class Operands:
    """A linear with a residual, and the linears behind the norm of its sum."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    norm_weight: Tensor | None
    behind: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    offset: float = 0.0
    eps: float = EPS
    eps_as_minimum: bool = False
    activation: str = ""

    def to(self, dtype: torch.dtype) -> Operands:
        tensors = {name: getattr(self, name) for name in ("x", "weight", "bias", "residual", "norm_weight")}
        changed: dict[str, Any] = {name: None if value is None else value.to(dtype) for name, value in tensors.items()}
        behind = tuple(weight.to(dtype) for weight in self.behind)
        biases = tuple(None if bias is None else bias.to(dtype) for bias in self.biases)
        return replace(self, **changed, behind=behind, biases=biases)

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        args = (self.x, self.weight, self.bias, self.residual, self.norm_weight, self.offset)
        found: tuple[Tensor, Tensor, Tensor] = OPS.linear_add_scale(*args)
        return found

    def second(self, scaled: Tensor, squares: Tensor, in_float32: bool = False) -> list[Tensor]:
        given = (scaled, squares, self.behind, self.biases)
        if self.activation:
            return list(OPS.scaled_linear_swiglu(*given, "gate_up", self.activation, self.eps, self.eps_as_minimum))
        return list(OPS.scaled_linear(*given, self.eps, self.eps_as_minimum, in_float32))

    def whole_sum(self) -> Tensor:
        """The sum by the kernel that leaves no half of a norm."""
        run = linear_kernels.implementation(linear_kernels.KINDS["linear_add"])
        found: Tensor = run(self.x, self.weight, self.bias, self.residual, "skinny", -1)
        return found

    def run(self) -> list[Tensor]:
        total, scaled, squares = self.first()
        return [total, *self.second(scaled, squares)]

    def unsplit(self, total: Tensor | None = None) -> list[Tensor]:
        """The same by the operators whose norm is in one piece; behind `total`, if that is given."""
        if total is None:
            total = linear_add_ref(self.x, self.weight, self.bias, self.residual)
        flags = (self.eps, self.offset, False, self.eps_as_minimum)
        given = (total, None, self.behind, self.biases)
        if self.activation:
            found = norm_linear_swiglu_ref(*given, "gate_up", self.norm_weight, *flags, self.activation)
        else:
            found = norm_linear_ref(*given, self.norm_weight, *flags)
        return [total, *found]


def make(
    rows: int,
    dims: tuple[int, int],
    features: Sequence[int],
    dtype: torch.dtype = BF16,
    device: str = "cuda",
    biased: bool = True,
) -> Operands:
    inputs, dim = dims

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    behind = tuple(random(size, dim, scale=dim**-0.5) for size in features)
    biases = tuple(random(size) if biased else None for size in features)
    norm_weight = (torch.randn(dim, device=device) * 0.2 + 1).to(dtype)
    weight, bias = random(dim, inputs, scale=inputs**-0.5), random(dim) if biased else None
    return Operands(random(2, rows // 2, inputs), weight, bias, random(2, rows // 2, dim), norm_weight, behind, biases)


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "silu"},
    {"activation": "gelu_tanh"},
    {"offset": 1.0},
    {"eps_as_minimum": True, "eps": 2.0},
    {"norm_weight": None},
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_formulas_are_the_norm_in_one_piece(variant: dict[str, Any]) -> None:
    operands = replace(make(6, (24, 32), (40, 40), FP64, "cpu"), **variant)
    for got, expected in zip(operands.run(), operands.unsplit(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["", "silu"])
def test_the_operators_are_what_torch_expects(activation: str) -> None:
    operands = replace(make(6, (24, 32), (40, 40), device="cpu"), activation=activation)
    _, scaled, squares = operands.first()
    given = (operands.x, operands.weight, None, operands.residual, operands.norm_weight, 0.5)
    torch.library.opcheck(OPS.linear_add_scale.default, given)
    behind = (scaled, squares, operands.behind, operands.biases)
    if activation:
        torch.library.opcheck(OPS.scaled_linear_swiglu.default, (*behind, "gate_up", activation, EPS, False))
    else:
        torch.library.opcheck(OPS.scaled_linear.default, (*behind, EPS, True, True))


def test_wide_results_are_the_rounded_ones() -> None:
    operands = make(6, (24, 32), (40,), device="cpu")
    _, *halves = operands.first()
    (narrow,), (wide,) = operands.second(*halves), operands.second(*halves, in_float32=True)
    assert wide.dtype == FP32 and torch.equal(wide, narrow.float())


def test_wrong_sizes_are_errors() -> None:
    operands = make(6, (24, 32), (40,), device="cpu")
    _, scaled, squares = operands.first()
    with pytest.raises(ValueError, match="squares: size of the last dimension"):
        operands.second(scaled, squares[..., 1:])
    with pytest.raises(ValueError, match="norm_weight: size"):
        replace(operands, norm_weight=torch.ones(31, dtype=BF16)).first()


def test_what_can_be_split_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "capability", lambda device: (9, 0))
    x, weight = torch.empty(16, 1, 24, dtype=BF16), torch.empty(32, dtype=BF16)
    assert split_norm.can_split(x, weight, 32) == split_norm.can_split(x, None, 32) == ""
    reasons = [
        split_norm.can_split(x.half(), weight.half(), 32),
        split_norm.can_split(x, weight.float(), 32),
        split_norm.can_split(x[:8], weight, 32),
        split_norm.can_split(x, weight, 40),
    ]
    monkeypatch.setattr(library, "capability", lambda device: (8, 0))
    reasons.append(split_norm.can_split(x, weight, 32))
    assert all(reason.startswith("no half of a norm") for reason in reasons) and len(set(reasons)) == len(reasons)


class TestKernels:
    pytestmark = needs_kernels

    @pytest.mark.parametrize("rows", [10, 16, 24, 32, 64])
    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_as_near_to_fp64_as_in_one_piece(self, rows: int, variant: dict[str, Any]) -> None:
        for dims, features in (
            ((896, 896), (4864, 4864)),
            ((4864, 896), (896, 896)),
            ((512, 48), (77, 77)),
            ((14336, 4096), (1024, 1024)),
        ):
            operands = replace(make(rows, dims, features), **variant)
            total, scaled, squares = operands.first()
            assert torch.equal(total, operands.whole_sum())
            wide = total.double()
            weight = 1.0 if operands.norm_weight is None else operands.norm_weight.float() + operands.offset
            torch.testing.assert_close(scaled, (total.float() * weight).to(BF16), rtol=0, atol=0)
            exact_squares = wide.square().unflatten(-1, (-1, 4)).sum(-1)
            torch.testing.assert_close(squares.double(), exact_squares, rtol=1e-6, atol=0)
            exact = operands.to(FP64).unsplit(wide)[1:]
            eager = operands.unsplit(total)[1:]
            got, again = operands.second(scaled, squares), operands.second(scaled, squares)
            for found, expected, reference, same in zip(got, eager, exact, again, strict=True):
                assert_close_to_fp64(found, expected, reference)
                assert torch.equal(found, same)

    def test_three_projections_and_wide_results(self) -> None:
        operands = make(16, (896, 896), (896, 128, 128))
        total, scaled, squares = operands.first()
        exact, eager = operands.to(FP64).unsplit(total.double())[1:], operands.unsplit(total)[1:]
        narrow, wide = operands.second(scaled, squares), operands.second(scaled, squares, in_float32=True)
        for found, expected, reference, widened in zip(narrow, eager, exact, wide, strict=True):
            assert_close_to_fp64(found, expected, reference)
            assert torch.equal(widened, found.float())

    @pytest.mark.parametrize("rows", [9, 16, 40])
    def test_every_configuration_writes_everything(self, rows: int) -> None:
        x, weight, residual = (torch.randn(*shape, device="cuda").to(BF16) for shape in _shapes(rows))
        norm_weight = torch.randn(896, device="cuda").to(BF16)
        expected: list[Tensor] = []
        for config in range(-1, len(library.configurations(skinny_linear_kernels.FAMILY)) - 1):
            total, scaled = (torch.full((rows, 896), torch.nan, device="cuda", dtype=BF16) for _ in range(2))
            squares = torch.full((rows, 224), torch.nan, device="cuda")
            written = {"scaled_out": scaled, "squares_out": squares, "norm_weight": norm_weight}
            skinny_linear_kernels.run(x, [weight], [total], addend=residual, config=config, **written)
            out = torch.full((rows, 4864), torch.nan, device="cuda", dtype=BF16)
            behind = torch.ones(4864, 896, device="cuda", dtype=BF16) / 30
            skinny_linear_kernels.run(scaled, [behind], [out], squares=squares, eps=EPS, config=config)
            assert not out.isnan().any() and not total.isnan().any()
            torch.testing.assert_close(scaled, total * norm_weight, rtol=0, atol=0)
            expected = expected or [total, out]
            for got, first in zip((total, out), expected):
                torch.testing.assert_close(got, first, rtol=0.02, atol=0.02)

    def test_nan_and_infinity_stay_in_their_row(self) -> None:
        operands = make(16, (896, 896), (300,))
        operands.residual[0, 0, 5] = torch.nan
        operands.residual[0, 1, 7] = torch.inf
        _, out = operands.run()
        rows = out.flatten(0, 1)
        assert rows[:2].isnan().all() and rows[2:].isfinite().all()

    def test_large_rows_do_not_overflow(self) -> None:
        operands = make(16, (896, 896), (300,))
        large = replace(operands, residual=operands.residual * 1e15)
        total, *halves = large.first()
        exact, eager = large.to(FP64).unsplit(total.double())[1:], large.unsplit(total)[1:]
        assert_close_to_fp64(large.second(*halves)[0], eager[0], exact[0])

    @pytest.mark.parametrize("rows", [16, 64])
    def test_a_chain_in_a_graph(self, rows: int) -> None:
        """Kernels start before their predecessors have ended; other inputs each time."""
        layers = [make(rows, (4864, 896), (4864, 4864), biased=False) for _ in range(3)]
        down, norm_weight = layers[0].x.clone(), layers[0].norm_weight

        def run() -> list[Tensor]:
            h, residual, found = down, layers[0].residual, []
            for layer in layers:
                operands = replace(layer, x=h, residual=residual, norm_weight=norm_weight, activation="silu")
                residual, h = operands.run()
                found.append(h)
            return found

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for _ in range(3):
            down.copy_(torch.randn_like(down))
            graph.replay()
            torch.cuda.synchronize()
            for got, expected in zip(found, run(), strict=True):
                assert torch.equal(got, expected)

    def test_what_the_kernel_cannot_take_is_an_error(self) -> None:
        operands = make(16, (64, 64), (32,))
        _, scaled, squares = operands.first()
        for wrong, message in (
            (lambda: make(8, (64, 64), (32,)).first(), "rows of x beside half a norm, got 8"),
            (lambda: make(16, (64, 40), (32,)).first(), "weights with scaled_out"),
            (lambda: operands.second(scaled, squares.half()), "dtype of squares"),
            (lambda: operands.second(scaled, squares[..., :8]), "shape of squares"),
            (lambda: replace(operands, norm_weight=torch.ones(64, device="cuda")).first(), "dtype of norm_weight"),
        ):
            with pytest.raises(RuntimeError, match=message):
                wrong()


def _shapes(rows: int) -> tuple[tuple[int, int], ...]:
    return (rows, 4864), (896, 4864), (rows, 896)
