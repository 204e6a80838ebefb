"""Norm + linears, packed linears, gate + down projection: what the rules propose, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse import lock
from infuse.lowering.policy import place as lowering_place
from infuse.patterns.packed_linear import NOT_CONSTANT
from infuse.report import Placement, Report
from infuse.settings import Settings
from tests.patterns.capture import (
    MODES,
    Captured,
    assert_same_results,
    capture,
    composite_overload,
    default_overload,
    parameters,
)

DIM, HIDDEN = 8, 12


class Block(nn.Module):
    """Norm, q, k and v; residual add, norm, gate and up, down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, 4, bias=False), nn.Linear(DIM, DIM)
        self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        h = x + self.q(y) * self.k(y).sum(-1, keepdim=True) * self.v(y)
        y = self.norm2(h)
        return h + self.down(F.silu(self.gate(y)) * self.up(y))


def composed(function: Callable[..., Any], *args: Any, **options: Any) -> Captured:
    return capture(function, *args, place=composite_overload, **options)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_block_of_a_decoder(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = parameters(Block(), dtype)
    x = torch.randn(2, 3, DIM, dtype=dtype, requires_grad=training)
    captured = composed(module, x, training=training, dynamic=dynamic)
    mlp = ["add_rms_norm", "gated_mlp"] if training else ["norm_linear_swiglu", "linear_add"]
    assert captured.counts == {"norm_linear": 1, **dict.fromkeys(mlp, 1)}
    assert [record.kind for record in captured.records] == ["norm_linear", *mlp]
    assert captured.spellings[0].endswith(", 3 linears")
    gate = "separate linears, silu, act * up"
    spellings = (
        ["residual add, rms_norm", f"{gate}; linear"]
        if training
        else [f"residual add, rms_norm; {gate}", "linear, residual add"]
    )
    assert captured.spellings[1:] == spellings
    assert_same_results(captured, training)


@pytest.mark.parametrize("training", [False, True])
def test_they_stand_the_trial_while_compiling(training: bool) -> None:
    module, x = parameters(Block(), torch.float32), torch.randn(2, 3, DIM, requires_grad=training)
    captured = composed(module, x, training=training, settings=Settings(verify="compile"))
    assert [record.kind for record in captured.records] == [
        "norm_linear",
        *(("add_rms_norm", "gated_mlp") if training else ("norm_linear_swiglu", "linear_add")),
    ]
    assert all(record.verified.startswith("verified: error") for record in captured.records)


@pytest.mark.parametrize("training", [False, True])
def test_counts_are_the_same_with_and_without_kernels(training: bool) -> None:
    class TwoBlocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    reports = []
    for place in (composite_overload, default_overload):
        captured = capture(TwoBlocks(), torch.randn(2, 3, DIM), training=training, place=place)
        reports.append(Report(tuple(captured.records), 1))
    with_kernels, without = reports
    assert without.rewritten == {"rms_norm": 1, "add_rms_norm": 3, "swiglu": 2} == with_kernels.rewritten
    assert lock.entry(with_kernels) == lock.entry(without)
    larger = {"gated_mlp": 2} if training else {"norm_linear_swiglu": 2, "linear_add": 2}
    assert (with_kernels.larger, without.larger) == ({"norm_linear": 2, **larger}, {})
    assert "; taken together in " in with_kernels.summary()
    assert Report.from_json(with_kernels.to_json()) == with_kernels


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "always", "never"])
def test_lowering_leaves_them_to_their_parts(kernels: str, training: bool) -> None:
    settings = Settings(kernels=kernels)

    def place(kind: str, args: tuple[object, ...], training: bool) -> Placement:
        return lowering_place(kind, args, training, settings=settings, max_autotune=True)

    captured = capture(Block(), torch.randn(2, 3, DIM), training=training, settings=settings, place=place)
    assert {record.kind for record in captured.records} == {"rms_norm", "add_rms_norm", "swiglu"}
    reason = "kernels are off" if kernels == "never" else "no kernel for cpu"
    mlp = ("gated_mlp", "linear_add", "norm_linear_swiglu", "linear_swiglu", "norm_linear")
    assert captured.notes == [
        f"{', '.join(mlp[not training :])}: left to their parts ({reason})",
        f"packed_linear: left to its parts ({NOT_CONSTANT})",
    ]


class NormThen(nn.Module):
    """A norm of x, and what reads it."""

    def __init__(self, read: Callable[[NormThen, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM, eps=1e-6)
        self.a, self.b = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN)
        self.adapter = nn.Parameter(torch.randn(HIDDEN, DIM))
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self, self.norm(x), x)


def under_autocast(module: NormThen, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module.a(y)


def written_before_the_linear(module: NormThen, y: Tensor, x: Tensor) -> Tensor:
    x.add_(1)
    return module.a(y)


def weight_written_before(module: NormThen, y: Tensor, x: Tensor) -> Tensor:
    first = module.a(y)
    with torch.no_grad():
        module.b.weight.mul_(2)
    return first + module.b(y)


NORM_KEPT: dict[str, Callable[[NormThen, Tensor, Tensor], Any]] = {
    "another reader": lambda m, y, x: m.a(y) + m.b(y) + y.sum(-1, keepdim=True),
    "returned too": lambda m, y, x: (m.a(y), y),
    "no linear": lambda m, y, x: y * 2,
    "a weight out of the graph": lambda m, y, x: F.linear(y, m.a.weight + m.adapter),
    "LoRA of its dropout": lambda m, y, x: m.a(y) + F.linear(F.dropout(y, 0.5), m.adapter),
    "a view in between": lambda m, y, x: m.a(y.view(-1, DIM)),
    "the weight itself is normed": lambda m, y, x: F.linear(x, y.view(-1, DIM)),
    "autocast in between": under_autocast,
    "another dtype": lambda m, y, x: F.linear(y.bfloat16(), m.adapter.bfloat16()),
    "x is written before": written_before_the_linear,
    "a weight is written before": weight_written_before,
}


@pytest.mark.parametrize("read", NORM_KEPT.values(), ids=NORM_KEPT)
def test_norm_that_others_read_or_write_to_stays_a_norm(read: Callable[[NormThen, Tensor, Tensor], Any]) -> None:
    captured = composed(NormThen(read).requires_grad_(False), torch.randn(2, 3, DIM))
    assert captured.counts.get("norm_linear", 0) == 0
    assert_same_results(captured)


def test_lora_beside_a_linear_is_one_more_linear() -> None:
    def read(module: NormThen, y: Tensor, x: Tensor) -> Tensor:
        return module.a(y) + F.linear(y, module.adapter)

    captured = composed(parameters(NormThen(read), torch.float32), torch.randn(2, 3, DIM), training=True)
    assert captured.counts == {"norm_linear": 1}
    assert_same_results(captured, training=True)


def test_sum_that_is_read_before_the_linear() -> None:
    def read(module: NormThen, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        total = x + 2 * x
        y = module.norm(total)
        early = total.sin()
        return module.a(y), early, total

    module, x = parameters(NormThen(read), torch.float32), torch.randn(2, 3, DIM, requires_grad=True)
    captured = composed(module, x, training=True)
    assert captured.counts["norm_linear"] == 1
    assert_same_results(captured, training=True)


class Constants(nn.Module):
    """Linears whose weights are made constants of the graph. read: what they read."""

    def __init__(self, read: Callable[[Tensor, list[nn.Linear]], Any]) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(DIM, 4), nn.Linear(DIM, 6, bias=False), nn.Linear(DIM, 4)])
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(F.silu(x) * x.flip(0), list(self.linears))  # type: ignore[arg-type]


def frozen(module: Constants) -> Callable[[torch.fx.Graph], None]:
    """Turns the placeholders of a module's parameters into attributes, as freezing does."""

    def before(graph: torch.fx.Graph) -> None:
        owner = graph.owning_module
        for node in [*graph.nodes]:
            if node.op == "placeholder" and isinstance(node.meta.get("example_value"), nn.Parameter):
                _, _, name = node.target.partition("linears_modules_")
                index, _, which = name.partition("_parameters_")
                owner.register_parameter(node.name, getattr(module.linears[int(index)], which.rstrip("_")))
                with graph.inserting_before(node):
                    constant = graph.get_attr(node.name)
                constant.meta["example_value"] = node.meta["example_value"].detach()
                node.replace_all_uses_with(constant)

    return before


def packs(read: Callable[[Tensor, list[nn.Linear]], Any], freeze: bool = True, **options: Any) -> Captured:
    module = Constants(read).eval()
    return composed(module, torch.randn(2, 3, DIM), before=frozen(module) if freeze else None, **options)


def test_constant_linears_of_one_input_are_packed() -> None:
    captured = packs(lambda x, linears: [linear(x) for linear in linears])
    assert captured.counts == {"swiglu": 1, "packed_linear": 1}
    assert captured.spellings[-1] == "3 linears of one input"
    assert_same_results(captured)


PACKED_NOT: dict[str, Callable[[Tensor, list[nn.Linear]], Any]] = {
    "different inputs": lambda x, ls: [ls[0](x), ls[1](x + 1)],
    "one linear": lambda x, ls: ls[0](x),
    "one of another dtype": lambda x, ls: [ls[0](x), F.linear(x.bfloat16(), ls[1].weight.bfloat16())],
    "a weight out of the graph": lambda x, ls: [ls[0](x), F.linear(x, ls[1].weight * 2)],
    "the input is written between": lambda x, ls: [ls[0](x), ls[1](x.mul_(2))],
    "one reads the other": lambda x, ls: F.linear(F.pad(ls[0](x), (0, 4)), ls[1].weight),
}


@pytest.mark.parametrize("read", PACKED_NOT.values(), ids=PACKED_NOT)
def test_linears_that_are_not_packed(read: Callable[[Tensor, list[nn.Linear]], Any]) -> None:
    captured = packs(read)
    assert captured.counts.get("packed_linear", 0) == 0
    assert_same_results(captured)


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_may_change_are_never_packed(training: bool) -> None:
    captured = packs(lambda x, linears: [linear(x) for linear in linears], freeze=False, training=training)
    assert captured.counts == {"swiglu": 1}
    assert captured.notes == [f"packed_linear: left to its parts ({NOT_CONSTANT})"]
