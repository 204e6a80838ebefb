"""Gates around any producer: packed, experts, convolutions, adapters; sigmoid gates, and what only looks alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.patterns.passes import rewrite
from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, default_overload, parameters

DIM, HIDDEN = 8, 12
Halves = Callable[[Tensor], tuple[Tensor, Tensor]]


def by_unflatten(y: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = y.unflatten(-1, (2, HIDDEN)).unbind(-2)
    return gate, up


def by_view(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.view(*y.shape[:-1], 2, HIDDEN)
    return y[..., 0, :], y[..., 1, :]


def by_select(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.reshape(*y.shape[:-1], 2, HIDDEN)
    return y.select(-2, 1), torch.select(y, -2, 0)


def by_leading_dimension(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.view(*y.shape[:-1], 2, HIDDEN).permute(2, 0, 1, 3)
    return y[0], y[1]


def by_narrow(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.narrow(-1, HIDDEN, HIDDEN), torch.narrow(y, -1, 0, HIDDEN)


def by_interleaved_view(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.view(*y.shape[:-1], HIDDEN, 2)
    return y[..., 0], y[..., 1]


def by_tensor_split(y: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = y.tensor_split(2, dim=-1)
    return gate, up


HALVES: list[tuple[Halves, str]] = [
    (by_unflatten, "first"),
    (by_view, "first"),
    (by_select, "second"),
    (by_leading_dimension, "first"),
    (by_narrow, "second"),
    (by_interleaved_view, "first"),
    (by_tensor_split, "first"),
]


class Packed(nn.Module):
    def __init__(self, halves: Halves, bias: bool = False) -> None:
        super().__init__()
        self.w = nn.Linear(DIM, 2 * HIDDEN, bias=bias)
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.halves(self.w(x))
        return F.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("halves", "place"), HALVES)
def test_packed_projection(halves: Halves, place: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = parameters(Packed(halves, bias=True), dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module, x, training=training, dynamic=dynamic)
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings == [f"packed linear with bias, gate {place}, gelu tanh, act * up"]
    assert_same_results(captured, training)


class Experts(nn.Module):
    """Mixture of experts. form: how the experts' weights are applied."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.w13 = nn.Parameter(torch.randn(2, DIM, 2 * HIDDEN))
        self.w2 = nn.Parameter(torch.randn(2, HIDDEN, DIM))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "bmm":
            gate, up = torch.bmm(x, self.w13).chunk(2, dim=-1)
            return torch.bmm(F.silu(gate) * up, self.w2)
        if self.form == "einsum":
            gate, up = torch.einsum("etd,edf->etf", x, self.w13).chunk(2, dim=-1)
            return torch.einsum("etf,efd->etd", up * F.silu(gate), self.w2)
        results = []
        for expert in range(2):
            gate, up = (x[expert] @ self.w13[expert]).chunk(2, dim=-1)
            results.append((F.silu(gate) * up) @ self.w2[expert])
        return torch.stack(results)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("form", ["bmm", "einsum", "loop"])
def test_experts(form: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = parameters(Experts(form), dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module, x, training=training, dynamic=dynamic)
    assert captured.counts == {"swiglu": 2 if form == "loop" else 1}
    assert all("packed matmul, gate first" in spelling for spelling in captured.spellings)
    assert_same_results(captured, training)


def test_grouped_matmul_experts() -> None:
    def experts(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        gate, up = torch._grouped_mm(x, w, offs=offsets).chunk(2, dim=-1)
        return torch.sigmoid(gate) * up

    x, w = torch.randn(8, 16).bfloat16(), torch.randn(2, 16, 32).bfloat16()
    captured = capture(experts, x, w, torch.tensor([3, 8], dtype=torch.int32))
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings[0].startswith("packed grouped matmul, gate first, sigmoid")


class Convolutions(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = nn.Conv2d(3, 4, 1)
        self.up = nn.Conv2d(3, 4, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.up(x)


@pytest.mark.parametrize("act", [F.silu, torch.sigmoid, F.relu, F.gelu])
def test_gate_over_the_channels_of_convolutions(act: Callable[[Tensor], Tensor]) -> None:
    module = parameters(Convolutions(act), torch.float32)
    captured = capture(module, torch.randn(2, 3, 5, 5, requires_grad=True), training=True)
    assert captured.counts == {"swiglu": 1}
    assert captured.spellings[0].startswith("separate convolutions, ")
    assert_same_results(captured, training=True)


class LoRA(nn.Module):
    """A linear with a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, HIDDEN, bias=False)
        self.a = nn.Linear(DIM, 2, bias=False)
        self.b = nn.Linear(2, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


class NormedLoRA(nn.Module):
    """LoRA in gate and up; a norm between the product and the down projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = LoRA(), LoRA()
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


def test_lora_beside_and_a_norm_behind() -> None:
    module = parameters(NormedLoRA(), torch.float32)
    captured = capture(module, torch.randn(2, 3, DIM, requires_grad=True), training=True)
    assert captured.counts == {"swiglu": 1, "rms_norm": 1}
    assert_same_results(captured, training=True)


class Gates(nn.Module):
    """Two projections a, b of x. form: what is made of them and x."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.a(x), self.b(x), x)


SIGMOID_GATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "of two projections": lambda a, b, x: torch.sigmoid(a) * b,
    "of x itself": lambda a, b, x: x * a.sigmoid(),
    "added to the residual": lambda a, b, x: x + torch.sigmoid(a) * b,
    "beside silu": lambda a, b, x: torch.sigmoid(a) * F.silu(b),
    "beside x * sigmoid(x)": lambda a, b, x: torch.sigmoid(a) * (b * torch.sigmoid(b)),
    "beside gelu, second": lambda a, b, x: F.gelu(b) * torch.sigmoid(a),
    "in float32": lambda a, b, x: (x.float() * torch.sigmoid(a.float())).to(x.dtype),
    "of heads, viewed": lambda a, b, x: (b.view(2, 3, 2, 4) * torch.sigmoid(a.view(2, 3, 2, 4))).flatten(2),
    "with a scale and a shift": lambda a, b, x: torch.sigmoid(0.5 * a + 1.0) * b,
    "relu of two projections": lambda a, b, x: F.relu(a) * b,
    "tanh of two projections": lambda a, b, x: torch.tanh(a) * b,
    "of tanh, as in WaveNet": lambda a, b, x: torch.tanh(a) * torch.sigmoid(b),
    "of tanh, added to x": lambda a, b, x: x + torch.sigmoid(a) * torch.tanh(b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", SIGMOID_GATES.values(), ids=SIGMOID_GATES)
def test_gate_out_of_a_projection(form: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    module = parameters(Gates(form), dtype)
    captured = capture(module, torch.randn(2, 3, DIM, dtype=dtype, requires_grad=True), training=True)
    assert captured.counts == {"swiglu": 1}
    assert captured.refusals == []
    assert_same_results(captured, training=True)


NO_GATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a gate per head": lambda a, b, x: b.view(2, 3, 2, 4) * torch.sigmoid(a[..., :2]).unsqueeze(-1),
    "one number a token": lambda a, b, x: torch.sigmoid(a[..., :1]) * b,
    "a number": lambda a, b, x: torch.sigmoid(a) * 16,
    "a vector": lambda a, b, x: torch.sigmoid(a) * b[0, 0],
    "a mixture of two": lambda a, b, x: (z := torch.sigmoid(a)) * b + (1 - z) * x,
    "scores of two kinds": lambda a, b, x: torch.sigmoid(a) * torch.sigmoid(b),
    "a recurrent cell's output": lambda a, b, x: torch.sigmoid(a) * torch.tanh(b * x),
    "a recurrent cell's state": lambda a, b, x: torch.sigmoid(a) * x + torch.sigmoid(b) * torch.tanh(b),
    "tanh of what is no projection": lambda a, b, x: torch.tanh(x) * b,
    "tanh over what is no projection": lambda a, b, x: torch.tanh(a) * x,
    "plain mish": lambda a, b, x: F.mish(a) + b,
    "a gate over a sum of projections": lambda a, b, x: torch.sigmoid(a + b) * x,
    "a mask": lambda a, b, x: F.relu(a) * (x > 0),
    "relu of what is no projection": lambda a, b, x: F.relu(x) * b,
    "its own score": lambda a, b, x: torch.sigmoid(a) * a,
    "a score of x": lambda a, b, x: torch.sigmoid(x * x) * b,
    "squeeze and excitation": lambda a, b, x: x * torch.sigmoid(a.mean(1, keepdim=True)),
    "the mean of itself": lambda a, b, x: F.silu(a) * b.mean(1, keepdim=True),
}


@pytest.mark.parametrize("form", NO_GATES.values(), ids=NO_GATES)
def test_other_products_are_no_sites(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    captured = capture(Gates(form), torch.randn(2, 3, DIM), settings=Settings(strict=True))
    assert captured.records == []


@pytest.mark.parametrize("act", [F.softplus, F.elu, F.leaky_relu, F.hardswish])
def test_gate_with_an_activation_that_the_operator_has_not(act: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Gates(lambda a, b, x: act(a) * b), torch.randn(2, 3, DIM))
    assert [f"no {act.__name__}" in reason for reason in captured.refusals] == [True]
    assert captured.counts == {}


class Cell(nn.Module):
    """A recurrent cell: kind lstm (one packed projection), lstm of two projections, gru, highway."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.joint = nn.Linear(2 * DIM, 4 * DIM)
        self.x, self.h = nn.Linear(DIM, 4 * DIM), nn.Linear(DIM, 4 * DIM)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        packed = self.joint(torch.cat((x, h), -1)) if "packed" in self.kind else self.x(x) + self.h(h)
        i, f, g, o = packed.chunk(4, dim=-1)
        if "lstm" in self.kind:
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c)
        if "gru" in self.kind:
            z = torch.sigmoid(i)
            n = torch.tanh(g + torch.sigmoid(f) * o) if "packed" not in self.kind else torch.tanh(g)
            return (1 - z) * n + z * h
        t = torch.sigmoid(i)
        return t * F.relu(g) + (1 - t) * x


@pytest.mark.parametrize("kind", ["lstm", "packed lstm", "gru", "packed gru", "highway", "packed highway"])
def test_recurrent_cells_are_no_sites(kind: str) -> None:
    captured = capture(Cell(kind), *(torch.randn(2, DIM) for _ in range(3)))
    assert captured.records == []


def test_one_dimension_is_enough_behind_a_projection() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.gate(x)) * self.up(x)

    captured = capture(parameters(Vector(), torch.float32), torch.randn(DIM, requires_grad=True), training=True)
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured, training=True)


class Exported(nn.Module):
    """Four gates as export writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(DIM, 2 * DIM)
        self.conv = nn.Conv1d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w(x).chunk(2, dim=-1)
        x = F.gelu(gate, approximate="tanh") * up
        packed = self.w(x).unflatten(-1, (2, DIM))
        gate = packed[..., 0, :]
        x = 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * packed.select(-2, 1)
        x = torch.sigmoid(self.w(x)[..., :DIM]) * x
        gate, up = self.w(x).split(DIM, dim=-1)
        x = torch.square(F.relu(gate)) * up
        return F.glu(self.conv(x), dim=1)


def test_exported_graph() -> None:
    module = parameters(Exported(), torch.float32)
    x = torch.randn(2, 3, DIM)
    exported = torch.export.export(module, (x,))
    graph_module = exported.graph_module
    with torch.no_grad():
        records = rewrite(graph_module.graph, Settings(), default_overload, training=False)
    assert [(record.kind, record.status) for record in records] == [("swiglu", "rewritten")] * 5
    graph_module.recompile()
    torch.testing.assert_close(exported.module()(x), module(x))


class Heads(nn.Module):
    """Two projections, one of them a gate, and what is done with them."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.form = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.gate(x), self.up(x))


def heads_of_a_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return up.unflatten(-1, (3, 4)) * torch.sigmoid(gate).view(*gate.shape[:-1], 3, 4)


def heads_of_silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).unflatten(-1, (3, -1)) * up.unflatten(-1, (3, 4))


def heads_of_quick_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return (gate * torch.sigmoid(1.702 * gate)).unflatten(-1, (3, -1)) * up.unflatten(-1, (3, 4))


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("form", [heads_of_a_sigmoid, heads_of_silu])
def test_gate_that_is_viewed_as_heads(
    form: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    x = torch.randn(2, 5, DIM, dtype=dtype, requires_grad=training)
    captured = capture(Heads(form).to(dtype), x, training=training, dynamic=dynamic)
    assert captured.counts == {"swiglu": 1}
    assert captured.refusals == []
    assert_same_results(captured, training)


def transposed_heads(gate: Tensor, up: Tensor) -> Tensor:
    viewed = torch.sigmoid(gate).view(*gate.shape[:-1], 3, 4).transpose(-1, -2)
    return viewed * up.unflatten(-1, (4, 3))


def broadcast_heads(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate)[..., None] * up.unsqueeze(-2)


def heads_of_one_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate).unflatten(-1, (3, 4)) * torch.sigmoid(up).unflatten(-1, (3, 4))


def heads_read_twice(gate: Tensor, up: Tensor) -> Tensor:
    act = F.silu(gate).unflatten(-1, (3, 4))
    return act * up.unflatten(-1, (3, 4)) + act


@pytest.mark.parametrize(
    "form", [transposed_heads, broadcast_heads, heads_of_one_sigmoid, heads_read_twice, heads_of_quick_gelu]
)
def test_other_views_of_a_gate_are_left_alone(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    captured = capture(Heads(form), torch.randn(2, 5, DIM))
    assert captured.counts == {}
    assert_same_results(captured)


def test_a_mask_between_the_factors_is_refused() -> None:
    def masked(gate: Tensor, up: Tensor) -> Tensor:
        keep = torch.arange(gate.shape[1], device=gate.device)[:, None] > 1
        return keep.to(gate.dtype) * torch.sigmoid(gate) * up

    captured = capture(Heads(masked), torch.randn(2, 5, DIM))
    assert captured.counts == {}
    assert captured.refusals == ["a smaller tensor multiplies the activation before the other factor does"]
