"""infuse::skinny_linear_out, the CUDA kernels for linears of few rows: features, sizes, configurations, layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import library, skinny_linear_kernels
from infuse.ops.rms_norm import rms_norm_ref
from infuse.ops.swiglu import swiglu_ref
from tests.tolerances import assert_close_to_fp64

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EPS = 1e-5
needs_kernels = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


@dataclass(frozen=True, slots=True)
class Operands:
    """One call; `flags` are those of the norm."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...] = ()
    residual: Tensor | None = None
    norm: bool = False
    norm_weight: Tensor | None = None
    flags: tuple[float, bool, bool] = (0.0, False, False)
    activation: str = ""
    addend: Tensor | None = None

    def outs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Results to be written, in x's dtype unless one is given, full of NaN."""
        shapes = [(self.x.shape[0], weight.shape[0]) for weight in self.weights[: 1 if self.activation else None]]
        return [self.x.new_full(shape, math.nan, dtype=dtype or self.x.dtype) for shape in shapes]

    def formula(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """The results and the sum as eager torch computes them in a dtype."""
        # fp64 keeps what the norm multiplies by in fp64.
        wide = dtype == FP64
        y = total = self.x.to(dtype) if self.residual is None else self.x.to(dtype) + self.residual.to(dtype)
        if wide and self.residual is not None:
            total = total.to(self.x.dtype)
            y = total.double()
        if self.norm:
            weight = self.norm_weight.double() if wide and self.norm_weight is not None else self.norm_weight
            y = rms_norm_ref(y, weight, EPS, *self.flags)
        biases = [*self.biases, None, None, None]
        outs = [
            F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
            for weight, bias in zip(self.weights, biases)
        ]
        if self.activation:
            outs = [swiglu_ref(*outs, self.activation)]
        if self.addend is not None:
            outs[0] = outs[0] + self.addend.to(dtype)
        return outs, total

    def run(self, config: int = -1, outs: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor | None]:
        """The kernels' results and sum."""
        outs = self.outs() if outs is None else outs
        total = None if self.residual is None else torch.full_like(self.residual, math.nan).contiguous()
        options = dict(zip(("weight_offset", "cast_before_weight", "eps_as_minimum"), self.flags))
        skinny_linear_kernels.run(
            *(self.x, self.weights, outs, self.biases),
            residual=self.residual,
            norm=self.norm,
            norm_weight=self.norm_weight,
            eps=EPS,
            activation=self.activation,
            addend=self.addend,
            sum_out=total,
            config=config,
            **options,
        )
        return outs, total


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def make(rows: int, dim: int, features: Sequence[int], dtype: torch.dtype = BF16) -> Operands:
    weights = tuple(random(count, dim, dtype=dtype, scale=dim**-0.5) for count in features)
    return Operands(random(rows, dim, dtype=dtype), weights)


def with_biases(operands: Operands) -> Operands:
    biases = tuple(random(weight.shape[0], dtype=weight.dtype) for weight in operands.weights)
    return replace(operands, biases=biases)


def with_norm(operands: Operands, dtype: torch.dtype | None = None, residual: bool = True) -> Operands:
    x = operands.x
    weight = (1 + random(x.shape[1], dtype=FP32, scale=0.2)).to(x.dtype if dtype is None else dtype)
    added = random(*x.shape, dtype=x.dtype) if residual else None
    return replace(operands, norm=True, norm_weight=weight, residual=added)


def with_addend(operands: Operands) -> Operands:
    return replace(operands, addend=random(operands.x.shape[0], operands.weights[0].shape[0], dtype=operands.x.dtype))


def run_mlps(
    mlps: Sequence[tuple[Tensor, Tensor]], norm_weight: Tensor, states: list[Tensor], hidden: Tensor, config: int
) -> None:
    """Writes the state behind each MLP, from the one before it; weights are gate and up packed, and down."""
    for (packed, down), x, out in zip(mlps, states, states[1:]):
        gate, up = packed.chunk(2)
        Operands(x, (gate, up), norm=True, norm_weight=norm_weight, activation="silu").run(config, [hidden])
        Operands(hidden, (down,), addend=x).run(config, [out])


def every_config() -> range:
    return range(-1, len(library.configurations(skinny_linear_kernels.FAMILY)))


def check(operands: Operands) -> None:
    """Every configuration: as near to fp64 as eager is, and twice the same bits."""
    reference, _ = operands.formula(FP64)
    eager, total = operands.formula(operands.x.dtype)
    for config in every_config():
        outs, summed = operands.run(config)
        again, _ = operands.run(config)
        for got, expected, exact, same in zip(outs, eager, reference, again):
            assert_close_to_fp64(got, expected, exact)
            assert torch.equal(got, same), f"two runs differ, configuration {config}"
        assert summed is None or torch.equal(summed, total), f"the sum, configuration {config}"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class TestKernels:
    pytestmark = needs_kernels

    @pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 31, 64])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_norm_and_three_projections(self, rows: int, dtype: torch.dtype) -> None:
        check(with_norm(with_biases(make(rows, 896, (896, 128, 128), dtype))))
        check(with_norm(make(rows, 2048, (2048, 512, 512), dtype), residual=False))
        check(with_norm(with_biases(make(rows, 1000, (100, 3), dtype)), dtype=FP32))

    @pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 64])
    @pytest.mark.parametrize("activation", skinny_linear_kernels.ACTIVATIONS)
    def test_norm_and_gated_projection(self, rows: int, activation: str) -> None:
        for dtype, dim, features in ((BF16, 4096, 3584), (FP16, 896, 4864), (BF16, 72, 77)):
            operands = replace(with_norm(make(rows, dim, (features, features), dtype)), activation=activation)
            check(operands)
            check(with_biases(replace(operands, norm=False, norm_weight=None, residual=None)))

    @pytest.mark.parametrize("rows", [1, 4, 8, 13, 32, 64])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_output_and_addend(self, rows: int, dtype: torch.dtype) -> None:
        check(with_addend(make(rows, 14336, (512,), dtype)))
        check(with_addend(with_biases(make(rows, 4864, (896,), dtype))))
        check(with_addend(replace(make(rows, 264, (65, 65), dtype), activation="silu")))

    @pytest.mark.parametrize("rows", [1, 8, 64])
    @pytest.mark.parametrize(("dim", "features"), [(8, 1), (16, 8), (64, 7), (120, 9), (136, 1000), (4096, 20000)])
    def test_odd_sizes(self, rows: int, dim: int, features: int) -> None:
        check(make(rows, dim, (features,)))
        check(with_norm(make(rows, dim, (features, 5, 33))))

    def test_the_flags_of_the_norm(self) -> None:
        for rows in (1, 6, 40):
            operands = with_norm(make(rows, 512, (256,)))
            check(replace(operands, flags=(1.0, False, False)))
            check(replace(operands, flags=(0.0, True, False)))
            check(replace(operands, flags=(0.0, False, True), x=operands.x * 1e-4, residual=operands.x * 1e-4))
            check(replace(operands, norm_weight=None))

    @pytest.mark.parametrize("scale", [1e-3, 100.0])
    def test_scales(self, scale: float) -> None:
        for rows in (1, 16):
            operands = with_norm(make(rows, 1024, (512, 512)))
            check(replace(operands, x=operands.x * scale, residual=None, activation="silu"))
            check(with_addend(replace(make(rows, 1024, (512,)), x=operands.x * scale)))

    def test_views_of_packed_weights_and_padded_rows(self) -> None:
        for rows in (1, 8, 24):
            packed = random(2 * 328, 512, scale=512**-0.5)
            wide = random(rows, 3 * 512)
            for pair in ((packed[:328], packed[328:]), (packed[0::2], packed[1::2]), (packed[1::2], packed[0::2])):
                check(with_norm(Operands(wide[:, 512:1024], pair, activation="silu")))
                check(replace(with_norm(Operands(wide[:, :512], pair)), residual=wide[:, 1024:]))
            check(Operands(wide[:, :512], (random(100, 1024, scale=0.04)[:, 512:],), addend=wide[:, 101:201]))

    def test_results_at_odd_places(self) -> None:
        operands = make(5, 256, (64,))
        (expected,), _ = operands.run()
        for config in every_config():
            place = torch.full((5, 131), 7.0, device="cuda", dtype=BF16)
            operands.run(config, [place[:, 3:67]])
            torch.testing.assert_close(place[:, 3:67], expected, rtol=0.02, atol=0.02)
            assert (place[:, :3] == 7).all() and (place[:, 67:] == 7).all()

    @pytest.mark.parametrize("rows", [1, 8, 16, 64])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_results_in_float32_are_the_rounded_ones(self, rows: int, dtype: torch.dtype) -> None:
        for operands in (
            with_norm(make(rows, 896, (20000,), dtype)),
            with_norm(make(rows, 4096, (4096,), dtype), residual=False),
            with_norm(with_biases(make(rows, 1000, (100, 3, 77), dtype))),
            with_addend(replace(make(rows, 264, (65, 65), dtype), activation="silu")),
        ):
            for config in every_config():
                narrow, total = operands.run(config)
                wide, same = operands.run(config, operands.outs(FP32))
                for expected, got in zip(narrow, wide):
                    assert torch.equal(got, expected.float()), f"configuration {config}"
                assert total is None or same is None or torch.equal(total, same)

    def test_results_in_float32_at_odd_places(self) -> None:
        for rows in (1, 5, 16):
            operands = make(rows, 256, (64,))
            for config in every_config():
                (expected,), _ = operands.run(config)
                place = torch.full((rows, 131), 7.0, device="cuda")
                operands.run(config, [place[:, 3:67]])
                assert torch.equal(place[:, 3:67], expected.float()), f"configuration {config}"
                assert (place[:, :3] == 7).all() and (place[:, 67:] == 7).all()

    def test_nan_and_infinity_stay_in_their_row(self) -> None:
        for rows in (3, 20):
            operands = replace(with_norm(make(rows, 512, (96, 96)), residual=False), activation="silu")
            operands.x[0, 5] = math.nan
            operands.x[1, 7] = math.inf
            for config in every_config():
                (got,), _ = operands.run(config)
                assert got[:2].isnan().all() and not got[2:].isnan().any(), f"configuration {config}"
            plain = make(rows, 512, (96,))
            plain.x[1, 7] = math.inf
            for config in every_config():
                (got,), _ = plain.run(config)
                assert torch.equal(got[1].sign(), plain.weights[0][:, 7].sign()) and got[1].isinf().all()
                assert got[0].isfinite().all() and got[2:].isfinite().all()

    def test_inputs_stay_as_they_are(self) -> None:
        operands = with_addend(with_biases(with_norm(make(8, 896, (300, 40)))))
        tensors = [operands.x, *operands.weights, *operands.biases, operands.residual, operands.addend]
        before = [tensor.clone() for tensor in tensors]
        for config in every_config():
            operands.run(config)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before))

    def test_nothing_to_do(self) -> None:
        (out,), _ = make(0, 64, (32,)).run()
        assert out.shape == (0, 32)
        outs, _ = make(2, 64, (0, 8)).run()
        assert outs[0].shape == (2, 0) and not outs[1].isnan().any()

    @pytest.mark.parametrize("rows", [1, 8, 64])
    def test_a_chain_reads_what_the_kernel_before_it_wrote(self, rows: int) -> None:
        """Kernels start before their predecessors have ended; three layers in a graph, with other inputs each time."""
        dim, features, layers = 896, 4864, 3
        mlps = [
            (random(2 * features, dim, scale=dim**-0.5), random(dim, features, scale=features**-0.5))
            for _ in range(layers)
        ]
        norm_weight = random(dim) * 0.1 + 1
        for config in every_config():
            states = [random(rows, dim) for _ in range(layers + 1)]
            hidden = random(rows, features)
            run_mlps(mlps, norm_weight, states, hidden, config)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run_mlps(mlps, norm_weight, states, hidden, config)
            for _ in range(3):
                states[0].copy_(random(rows, dim))
                graph.replay()
                x = states[0].clone()
                for packed, down in mlps:
                    y = F.rms_norm(x, (dim,), norm_weight, EPS)
                    gate, up = F.linear(y, packed).chunk(2, -1)
                    x = x + F.linear(F.silu(gate) * up, down)
                torch.testing.assert_close(states[-1], x, rtol=0.03, atol=0.06)

    @pytest.mark.parametrize("rows", [1, 16])
    def test_weights_that_the_kernel_before_it_wrote(self, rows: int) -> None:
        """Only in a CUDA graph are weights loaded before that kernel has ended."""
        x = random(rows, 4096)
        for config in every_config():
            made = make(64, 4096, (4096,))
            weight = torch.zeros(64, 4096, dtype=BF16, device="cuda")
            made.run(config, [weight])
            (out,), _ = Operands(x, (weight,)).run(config)
            torch.testing.assert_close(out, F.linear(x, weight), rtol=0.03, atol=2.0)

    def test_what_the_kernel_cannot_take_is_an_error(self) -> None:
        good = make(2, 64, (32,))
        for wrong, message in (
            (make(65, 64, (32,)), "rows of x"),
            (make(2, 60, (32,)), "last dimension of x"),
            (replace(good, x=good.x.float()), "dtype of x"),
            (replace(good, x=random(2, 65)[:, 1:]), "rows of x"),
            (replace(good, weights=(random(32, 72),)), "shape of weight0"),
            (replace(good, residual=good.x), "without a norm"),
            (replace(good, activation="silu"), "weights of an activation"),
            (replace(good, weights=good.weights * 2, activation="relu"), "activation, got relu"),
            (replace(good, addend=good.x), "shape of addend"),
        ):
            with pytest.raises(RuntimeError, match=message):
                wrong.run()
        with pytest.raises(RuntimeError, match="dtype of out0, got float16, expected bfloat16 or float32"):
            good.run(outs=good.outs(FP16))
        with pytest.raises(RuntimeError, match="config"):
            good.run(1000)


def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def test_what_the_kernels_take_and_why_not() -> None:
    can_run, x, weight = skinny_linear_kernels.can_run, tensor(2, 4, 64), tensor(32, 64)
    pair = (weight, weight)
    assert can_run(x, pair, activation="silu", norm=True, norm_weight=tensor(64, dtype=FP32)) == ""
    assert can_run(x, (tensor(64, 64)[0::2], tensor(32, 128)[:, 64:]), residual=x, norm=True) == ""
    for reason in (
        can_run(x.float(), (weight.float(),)),
        can_run(tensor(65, 64), (weight,)),
        can_run(tensor(2, 60), (tensor(32, 60),)),
        can_run(x, pair, activation="relu"),
        can_run(x, pair, activation="silu", limit=7.0),
        can_run(x, (weight,), activation="silu"),
        can_run(x, (weight, tensor(16, 64)), activation="silu"),
        can_run(x, (weight,) * 4),
        can_run(x, (weight,), (tensor(32, dtype=FP32),)),
        can_run(x, (weight,), residual=x),
        can_run(x, (weight,), norm=True, norm_weight=tensor(64, dtype=FP32), cast_before_weight=True),
        can_run(x, (tensor(64, 32).t(),)),
        can_run(x, (tensor(32, 68)[:, :64],)),
        can_run(x[:, :1].expand(2, 4, 64), (weight,)),
    ):
        assert reason.startswith(("no kernel for ", "gate and up differ"))
