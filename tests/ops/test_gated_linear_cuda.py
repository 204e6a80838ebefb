"""infuse::gated_linear_out, both products and the activation of a gated MLP in one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from infuse.ops import gated_linear_kernels, library
from infuse.ops.swiglu import swiglu_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16 = torch.bfloat16, torch.float16
# rows, dim, columns: less than a tile, several with ragged ends along each; more tiles than SMs, too short and long
# enough to hide the end of one beside the next
SHAPES = (
    *((1, 64, 8), (129, 200, 136), (300, 256, 512), (513, 72, 1792), (1000, 1024, 1000)),
    *((3000, 128, 2200), (3000, 776, 2200)),
)
Weights = tuple[Tensor, Tensor]


def configs(by_columns: bool = False) -> list[int]:
    """What the launcher chooses and every configuration that takes such weights."""
    names = library.configurations(gated_linear_kernels.NAME)
    return [-1, *(i for i, name in enumerate(names) if not by_columns or name.startswith(("wgmma_128x128", "mma")))]


def make(rows: int, dim: int, columns: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> tuple[Tensor, Weights]:
    """The gate and the up projection are about as large as `scale`."""
    x = torch.randn(rows, dim, device="cuda").to(dtype)
    gate, up = ((scale * dim**-0.5 * torch.randn(columns, dim, device="cuda")).to(dtype) for _ in range(2))
    return x, (gate, up)


def exact(x: Tensor, weights: Weights, biases: Sequence[Tensor | None] = (None, None)) -> Weights:
    """Gate and up in float64."""
    gate, up = (
        x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        for weight, bias in zip(weights, biases)
    )
    return gate, up


def assert_close(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """NaN in the same places, and infinities where rounding gives them; elsewhere within the bound."""
    assert torch.equal(got.isnan(), want.isnan()), "NaN elsewhere"
    rounded = want.to(got.dtype)
    same = rounded.isinf() | (got == rounded)
    error = torch.where(same, 0.0, got.double() - want).nan_to_num().abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, {error.div(bound).max():.3g} times the bound"


def rounded_once(want: Tensor, terms: float, dtype: torch.dtype) -> Tensor:
    """Half an ulp, and what sums in float32 of such `terms` lose."""
    return 1.01 * torch.finfo(dtype).eps / 2 * want.abs().nan_to_num() + terms * 2**-18


def rounded_between(gate: Tensor, up: Tensor, want: Tensor, terms: float, dtype: torch.dtype) -> Tensor:
    """Gate, up, the activation, whose slope is at most 1.13, and the result are rounded."""
    return 1.13 * rounded_once(gate * up, 0.0, dtype) + 3 * rounded_once(want, terms, dtype)


def check(
    x: Tensor, weights: Weights, biases: Sequence[Tensor | None] = (None, None), *, activation: str = "silu"
) -> None:
    """Against float64, for inference and for training, over NaN; twice, with the same bits."""
    gate, up = exact(x, weights, biases)
    want = swiglu_ref(gate, up, activation)
    rows, columns = want.shape
    largest = [float(value.nan_to_num().abs().max().clamp(min=1.0)) for value in (gate, up)]
    for config in configs(weights[0].stride(-1) != 1):
        runs = []
        for _ in range(2):
            out = x.new_full((rows, columns), math.nan)
            gated_linear_kernels.gated_linear(x, *weights, *biases, None, out, activation=activation, config=config)
            runs.append(out)
        assert_close(runs[0], want, rounded_between(gate, up, want, 4 * largest[0] * largest[1], x.dtype))
        assert torch.equal(runs[0].nan_to_num(), runs[1].nan_to_num()), f"two runs differ, configuration {config}"
        gate_up = x.new_full((rows, 2 * columns), math.nan)
        gated_linear_kernels.gated_linear(
            *(x, *weights, *biases, None, out, gate_up), activation=activation, config=config
        )
        both = torch.cat([gate, up], 1)
        assert_close(gate_up, both, rounded_once(both, 4 * max(largest), x.dtype))
        # The activation is rounded on its own here, which a last bit of it may turn either way.
        of_rounded = swiglu_ref(*gate_up.chunk(2, -1), activation)
        assert torch.equal(out.isnan(), of_rounded.isnan())
        apart = torch.where(out == of_rounded, 0.0, out.double() - of_rounded.double()).nan_to_num().abs()
        assert (
            apart <= 2 * torch.finfo(x.dtype).eps * of_rounded.double().abs().nan_to_num() + 2**-23 * largest[1]
        ).all()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weights = make(*shape, dtype=dtype)
    before = [tensor.clone() for tensor in (x, *weights)]
    check(x, weights)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, *weights), before))


@pytest.mark.parametrize("activation", gated_linear_kernels.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_activations_biases_and_scales(activation: str, dtype: torch.dtype) -> None:
    for scale in (1e-3, 1.0, 30.0):
        x, weights = make(200, 136, 264, dtype, scale)
        biases = [torch.randn(264, device="cuda").to(dtype) for _ in range(2)]
        check(x, weights, biases, activation=activation)
        check(x, weights, (None, biases[0]), activation=activation)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_as_views(dtype: torch.dtype) -> None:
    """Halves and every second row of a packed weight, transposed weights; x with padding behind its rows."""
    x, packed = make(300, 328, 1056, dtype)[0], torch.randn(1056, 328, device="cuda").to(dtype) / 16
    wide = torch.randn(300, 400, device="cuda").to(dtype)
    check(x, (packed[:528], packed[528:]))
    check(wide[:, 8:336], (packed[0::2], packed[1::2]))
    by_columns = packed.T.contiguous()
    check(x, (by_columns[:, :528].T, by_columns[:, 528:].T))


def test_a_view_of_a_wider_result() -> None:
    x, weights = make(150, 64, 200)
    wide = x.new_full((150, 304), math.nan)
    gated_linear_kernels.gated_linear(x, *weights, None, None, None, wide[:, 40:240])
    assert wide[:, :40].isnan().all() and wide[:, 240:].isnan().all()
    gate, up = exact(x, weights)
    want = swiglu_ref(gate, up)
    assert_close(wide[:, 40:240], want, rounded_between(gate, up, want, 100.0, BF16))


def test_infinities_and_nan_stay_in_their_rows() -> None:
    x, weights = make(300, 128, 256)
    x[3, 5], x[140, 7], x[141, 8] = math.inf, math.nan, -math.inf
    check(x, weights)


def test_without_rows() -> None:
    x, weights = make(0, 64, 72)
    out = x.new_empty(0, 72)
    assert gated_linear_kernels.gated_linear(x, *weights, None, None, None, out).shape == (0, 72)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(
    "sizes", [(130, 0, 7, 300), (0, 0, 512, 0), (1, 1, 1, 1, 1), (256, 128, 64, 65), (900, 0, 1, 1300, 127, 1500), ()]
)
def test_groups_of_rows(sizes: tuple[int, ...], by_columns: bool) -> None:
    """Rows behind the last end, and those of the next group, are left as they are."""
    rows, (dim, columns) = sum(sizes) + 70, (136, 264) if sum(sizes) < 1000 else (776, 800)
    x = torch.randn(rows, dim, device="cuda").to(BF16)
    weights = [torch.randn(len(sizes), columns, dim, device="cuda").to(BF16) / dim**0.5 for _ in range(2)]
    if by_columns:
        weights = [weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in weights]
    ends = torch.tensor(sizes, device="cuda").cumsum(0).int()
    gate, up = torch.full((2, rows, columns), math.nan, device="cuda", dtype=torch.float64)
    for i, part in enumerate(torch.tensor(range(sum(sizes))).split(list(sizes)) if sizes else ()):
        rows_of = slice(sum(sizes[:i]), sum(sizes[:i]) + len(part))
        gate[rows_of], up[rows_of] = exact(x[rows_of], (weights[0][i], weights[1][i]))
    want, both = swiglu_ref(gate, up), torch.cat([gate, up], 1)
    for config in configs(by_columns):
        out = x.new_full((rows, columns), math.nan)
        gated_linear_kernels.gated_linear(x, *weights, None, None, ends, out, config=config)
        assert_close(out, want, rounded_between(gate, up, want, 100.0, BF16))
        gate_up = x.new_full((rows, 2 * columns), math.nan)
        gated_linear_kernels.gated_linear(x, *weights, None, None, ends, out, gate_up, config=config)
        assert_close(gate_up, both, rounded_once(both, 20.0, BF16))


def test_in_a_cuda_graph_behind_another_kernel() -> None:
    """The kernel starts before the one that writes x has ended, and must wait for it."""
    x, weights = make(512, 256, 1024)
    out, source = x.new_empty(512, 1024), torch.empty_like(x)
    gated_linear_kernels.gated_linear(x, *weights, None, None, None, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(source)
        gated_linear_kernels.gated_linear(x, *weights, None, None, None, out)
    for _ in range(3):
        source.normal_()
        graph.replay()
        gate, up = exact(source, weights)
        want = swiglu_ref(gate, up)
        assert_close(out, want, rounded_between(gate, up, want, 100.0, BF16))


def test_errors_name_the_argument() -> None:
    x, (gate, up) = make(16, 64, 72)
    out = x.new_empty(16, 72)
    operator = torch.ops.infuse.gated_linear_out
    for arguments, message in (
        ((x, gate, up, None, None, None, "relu", -1, out, None), "activation"),
        ((x, gate, up[:64], None, None, None, "silu", -1, out, None), "shape of up_weight"),
        ((x, gate, up, None, None, None, "silu", 99, out, None), "config"),
        ((x, gate, up, None, None, None, "silu", -1, out[:, :64], None), "shape of out"),
        ((x, gate, up, None, None, None, "silu", -1, out, x.new_empty(16, 72)), "shape of gate_up"),
        ((x, gate, up.half(), None, None, None, "silu", -1, out, None), "dtype of up_weight"),
        ((x[:, 1:57], gate[:, :56], up[:, :56], None, None, None, "silu", -1, out, None), "address of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
