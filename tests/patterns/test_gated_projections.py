"""Gated activations and the projections around them: every spelling, and what keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.report import Placement
from infuse.settings import Settings
from tests.patterns.capture import MODES, Captured, assert_same_results, capture, composite_overload, composites
from tests.patterns.capture import parameters as with_values

DIM, HIDDEN = 8, 12
Read = Callable[["MLP", Tensor], Any]
# Trained in bfloat16 with static shapes; not trained, with dynamic ones.
TWO_MODES = pytest.mark.parametrize(("dtype", "training", "dynamic"), [MODES[1], (torch.float32, False, True)])


class MLP(nn.Module):
    """Projections, separate and packed, with and without a bias; read: what is done with them."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM, eps=1e-6)
        self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN)
        self.packed, self.biased = nn.Linear(DIM, 2 * HIDDEN, bias=False), nn.Linear(DIM, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)
        self.adapter = nn.Linear(DIM, HIDDEN, bias=False)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self, x)


def halves(m: MLP, x: Tensor) -> Tensor:
    gate, up = m.packed(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def second_half(m: MLP, x: Tensor) -> Tensor:
    up, gate = m.biased(x).split(HIDDEN, dim=-1)
    return up * F.gelu(gate, approximate="tanh")


def narrowed(m: MLP, x: Tensor) -> Tensor:
    y = m.packed(x)
    return F.silu(y.narrow(-1, HIDDEN, HIDDEN)) * y.narrow(-1, 0, HIDDEN)


def interleaved_view(m: MLP, x: Tensor) -> Tensor:
    y = m.packed(x).view(*x.shape[:-1], HIDDEN, 2)
    return F.silu(y[..., 1]) * y[..., 0]


def stacked_view(m: MLP, x: Tensor) -> Tensor:
    gate, up = m.packed(x).unflatten(-1, (2, HIDDEN)).unbind(-2)
    return F.gelu(gate) * up


def sliced(m: MLP, x: Tensor) -> Tensor:
    y = m.biased(x)
    return F.silu(y[..., :HIDDEN]) * y[..., HIDDEN:]


def contiguous_halves(m: MLP, x: Tensor) -> Tensor:
    gate, up = m.packed(x).tensor_split(2, dim=-1)
    return F.silu(gate.contiguous()) * up.contiguous()


def clamped(m: MLP, x: Tensor) -> Tensor:
    y = m.biased(x)
    gate, up = y[..., ::2].clamp(max=0.5), y[..., 1::2].clamp(-0.5, 0.5)
    return (up + 1) * (gate * torch.sigmoid(1.3 * gate))


# (how it is written, order of the rows of the packed weight)
SPELLINGS: dict[str, tuple[Read, str]] = {
    "separate": (lambda m, x: F.silu(m.gate(x)) * m.up(x), "gate_up"),
    "up first": (lambda m, x: m.up(x) * F.silu(m.gate(x)), "gate_up"),
    "written out": (lambda m, x: m.up(x) * (lambda g: g * torch.sigmoid(g))(m.gate(x)), "gate_up"),
    "chunk": (halves, "gate_up"),
    "split, gate second": (second_half, "up_gate"),
    "narrow, gate second": (narrowed, "up_gate"),
    "slices": (sliced, "gate_up"),
    "contiguous halves": (contiguous_halves, "gate_up"),
    "unflatten and unbind": (stacked_view, "gate_up"),
    "every second column": (lambda m, x: F.silu(m.packed(x)[..., ::2]) * m.packed(x)[..., 1::2], ""),
    "interleaved, gate second": (interleaved_view, "interleaved_up_first"),
    "clamped, interleaved": (clamped, "interleaved"),
}


def order_of(captured: Captured, kind: str) -> str:
    (node,) = [node for node in captured.operators() if str(node.target).startswith(f"infuse.{kind}.")]
    return next(arg for arg in node.args if arg in ("gate_up", "up_gate", "interleaved", "interleaved_up_first"))


def run(
    read: Read, *kinds: str, dtype: torch.dtype = torch.float32, training: bool = False, **options: Any
) -> Captured:
    module = with_values(MLP(read), dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module, x, training=training, place=composites(*kinds), **options)
    assert_same_results(captured, training)
    return captured


@TWO_MODES
@pytest.mark.parametrize(("read", "order"), SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(read: Read, order: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = run(read, "linear_swiglu", dtype=dtype, training=training, dynamic=dynamic)
    if not order:  # two products of one weight, neither of which is read as a whole
        assert captured.counts == {"swiglu": 1}
        return
    assert captured.counts == {"linear_swiglu": 1}
    assert order_of(captured, "linear_swiglu") == order
    assert "linear" not in captured.targets()


@TWO_MODES
@pytest.mark.parametrize("spelling", ["separate", "split, gate second", "clamped, interleaved"])
def test_mlp_trains_as_one_operator(spelling: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    read, order = SPELLINGS[spelling]
    captured = run(lambda m, x: m.down(read(m, x)), "gated_mlp", dtype=dtype, training=training, dynamic=dynamic)
    assert captured.counts == {"gated_mlp" if training else "swiglu": 1}
    if training:
        assert order_of(captured, "gated_mlp") == order
        assert captured.targets() & {"linear", "silu"} == set()


@TWO_MODES
@pytest.mark.parametrize("spelling", ["separate", "split, gate second", "interleaved, gate second"])
def test_norm_that_only_gate_and_up_read(spelling: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    read, order = SPELLINGS[spelling]
    kinds = ("norm_linear_swiglu", "linear_swiglu", "norm_linear")
    options: dict[str, Any] = {"dtype": dtype, "training": training, "dynamic": dynamic}
    captured = run(lambda m, x: read(m, m.norm(x)), *kinds, **options)
    assert captured.counts == {"norm_linear_swiglu": 1}
    assert order_of(captured, "norm_linear_swiglu") == order

    def with_residual(m: MLP, x: Tensor) -> Any:
        total = x + x.flip(0)
        return read(m, m.norm(total)), total * 2

    captured = run(with_residual, *kinds, **options)
    assert captured.counts == {"norm_linear_swiglu": 1}
    assert captured.spellings[0].startswith("residual add, rms_norm; ")


def test_norm_with_another_reader_stays_a_norm() -> None:
    def read(m: MLP, x: Tensor) -> Any:
        y = m.norm(x)
        return F.silu(m.gate(y)) * m.up(y), y

    captured = run(read, "norm_linear_swiglu", "linear_swiglu", "norm_linear")
    assert captured.counts == {"rms_norm": 1, "linear_swiglu": 1}


@TWO_MODES
@pytest.mark.parametrize("first", [False, True])
def test_residual_behind_a_linear(first: bool, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    def read(m: MLP, x: Tensor) -> Any:
        h = x.sin()
        h = m.down(F.relu(m.gate(x))) + h if first else h + m.down(F.relu(m.gate(x)))
        return m.norm(h), h

    kinds = ("linear_add", "norm_linear")
    captured = run(read, *kinds, dtype=dtype, training=training, dynamic=dynamic)
    assert captured.counts == {"linear_add": 1, "rms_norm": 1}
    captured = run(read, dtype=dtype, training=training, dynamic=dynamic)
    assert captured.counts == {"add_rms_norm": 1}


NO_RESIDUAL: dict[str, Read] = {
    "adapter": lambda m, x: m.gate(x) + m.adapter(x),
    "scaled adapter": lambda m, x: m.gate(x) + 2.0 * m.adapter(x),
    "read elsewhere": lambda m, x: (lambda y: (x + y, y))(m.down(m.gate(x))),
    "broadcast": lambda m, x: m.down(m.gate(x)) + x[:1],
    "scaled": lambda m, x: x + 2 * m.down(m.gate(x)),
    "a weight out of the graph": lambda m, x: x + F.linear(m.gate(x), m.down.weight * 2),
    "wider residual": lambda m, x: x.double() + m.down(m.gate(x)),
    "dropout": lambda m, x: x + F.dropout(m.down(m.gate(x)), 0.5, training=True) * 0,
    "a number": lambda m, x: m.down(m.gate(x)) + 1,
}


@pytest.mark.parametrize("read", NO_RESIDUAL.values(), ids=NO_RESIDUAL)
def test_sums_that_are_no_residual(read: Read) -> None:
    assert run(read, "linear_add").counts == {}


def under_autocast(m: MLP, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.silu(m.gate(x)) * m.up(x)


def gate_read_elsewhere(m: MLP, x: Tensor) -> Any:
    gate = m.gate(x)
    return F.silu(gate) * m.up(x), gate


def up_returned(m: MLP, x: Tensor) -> Any:
    up = m.up(x)
    return F.silu(m.gate(x)) * up, up


def half_read_elsewhere(m: MLP, x: Tensor) -> Any:
    gate, up = m.packed(x).chunk(2, -1)
    return F.silu(gate) * up, up.sum()


def packed_returned(m: MLP, x: Tensor) -> Any:
    y = m.packed(x)
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up, y


def input_written_between(m: MLP, x: Tensor) -> Tensor:
    x = x.sin()
    gate = m.gate(x)
    x.mul_(2)
    return F.silu(gate) * m.up(x)


ELSEWHERE, COMPUTED, MIXED = "read elsewhere too", "a weight is computed in the graph", "differ in dtype"
# (how it is written, what the report says of it)
KEPT: dict[str, tuple[Read, str]] = {
    "merged adapter": (lambda m, x: F.silu(F.linear(x, m.gate.weight + m.adapter.weight)) * m.up(x), COMPUTED),
    "scaled weight": (lambda m, x: F.silu(m.gate(x)) * F.linear(x, m.up.weight * 0.5), COMPUTED),
    "adapter beside the gate": (lambda m, x: F.silu(m.gate(x) + m.adapter(x)) * m.up(x), "merge it into the weight"),
    "adapter beside up": (lambda m, x: F.silu(m.gate(x)) * (m.up(x) + m.adapter(x)), "merge it into the weight"),
    "autocast": (under_autocast, MIXED),
    "gate returned": (gate_read_elsewhere, ELSEWHERE),
    "up returned": (up_returned, ELSEWHERE),
    "half read elsewhere": (half_read_elsewhere, ELSEWHERE),
    "packed product returned": (packed_returned, ELSEWHERE),
    "different inputs": (lambda m, x: F.silu(m.gate(x)) * m.up(x.flip(0)), "project different inputs"),
    "written between": (input_written_between, "project different inputs"),
    "dropout between": (lambda m, x: F.silu(F.dropout(m.gate(x), 0.5, training=False).exp()) * m.up(x), ""),
    "quarters": (lambda m, x: F.silu(m.packed(x)[..., :6]) * m.packed(x)[..., 6:12], ""),
    "one half twice": (lambda m, x: (lambda y: F.silu(y[..., :6]) * y[..., :6].clone())(m.gate(x)), ""),
    "flattened rows": (lambda m, x: F.silu(m.gate(x).view(-1, HIDDEN)) * m.up(x).view(-1, HIDDEN), ""),
}


@pytest.mark.parametrize(("read", "reason"), KEPT.values(), ids=KEPT)
def test_projections_that_stay_apart(read: Read, reason: str) -> None:
    captured = run(read, "linear_swiglu", "norm_linear_swiglu", "gated_mlp")
    assert "linear_swiglu" not in captured.counts
    notes = [note for note in captured.notes if note.startswith("linear_swiglu: left to its parts (")]
    assert len(notes) == bool(reason) and all(reason in note for note in notes)


DOWN_KEPT: dict[str, Read] = {
    "two readers": lambda m, x: (lambda h: m.down(h) + m.down(h))(halves(m, x)),
    "returned too": lambda m, x: (lambda h: (m.down(h), h))(halves(m, x)),
    "a norm in between": lambda m, x: m.down(F.layer_norm(halves(m, x), (HIDDEN,))),
    "dropout in between": lambda m, x: m.down(F.dropout(halves(m, x), 0.0, training=True) * 1.5),
    "a weight out of the graph": lambda m, x: F.linear(halves(m, x), m.down.weight * 2),
    "another dtype": lambda m, x: F.linear(halves(m, x).bfloat16(), m.down.weight.bfloat16()),
}


@pytest.mark.parametrize("read", DOWN_KEPT.values(), ids=DOWN_KEPT)
def test_down_projection_that_is_not_taken_in(read: Read) -> None:
    captured = run(read, "gated_mlp", training=True)
    assert captured.counts["swiglu"] == 1
    assert "gated_mlp" not in captured.counts


def test_tied_weights_get_the_gradients_of_both_places() -> None:
    def read(m: MLP, x: Tensor) -> Tensor:
        gate = F.linear(x, m.up.weight)
        return m.down(F.silu(gate) * F.linear(x, m.up.weight, m.up.bias)) + m.up(x).sum()

    assert run(read, "gated_mlp", "linear_swiglu", training=True).counts == {"gated_mlp": 1}
    assert run(read, "linear_swiglu", training=True).counts == {"linear_swiglu": 1}


def test_exact_numerics_keep_what_the_gate_rounds() -> None:
    def read(m: MLP, x: Tensor) -> Tensor:
        gate = m.gate(x)
        return m.down(gate * torch.sigmoid(gate) * m.up(x))

    assert run(read, "gated_mlp", training=True, settings=Settings(numerics="exact")).counts == {}


def test_mlp_may_keep_its_input_alone() -> None:
    def place(kind: str, examples: tuple[object, ...], training: bool) -> Placement:
        return (
            Placement("recompute", "reference") if kind == "gated_mlp" else composite_overload(kind, examples, training)
        )

    module = with_values(MLP(lambda m, x: m.down(halves(m, x))), torch.float32)
    captured = capture(module, torch.randn(2, 3, DIM, requires_grad=True), training=True, place=place)
    assert captured.counts == {"gated_mlp": 1}
    assert_same_results(captured, training=True)
