"""Norms between two linears of few rows: split between their kernels, and left alone in every other case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import infuse
from infuse.lowering import decisions
from infuse.lowering.heuristics import H200
from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import library, linear_kernels, split_norm
from tests.lowering.compiled import compiled_code
from tests.lowering.pretended_linears import skinny_on_cpu

OPS = torch.ops.infuse
INPUTS, DIM, HIDDEN = 24, 32, 40
SPLIT = "infuse.linear_add_scale"


@pytest.fixture(autouse=True)
def measured_device(
    monkeypatch: pytest.MonkeyPatch, implement_on_cpu: Callable[[str, Callable[..., Any]], None]
) -> Iterator[None]:
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "capability", lambda device: H200)
    implement_on_cpu("skinny_linear_out", skinny_on_cpu)
    for kind, site in linear_kernels.KINDS.items():
        implement_on_cpu(f"{kind}_kernel", linear_kernels.implementation(site))
    implement_on_cpu("linear_add_scale", split_norm.run_first)
    implement_on_cpu("scaled_linear", split_norm.run_second)
    implement_on_cpu("scaled_linear_swiglu", split_norm.run_second_swiglu)
    decisions.clear()
    yield


@pytest.fixture
def any_size_runs_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "SKINNY_INPUTS", range(1, 100))
    monkeypatch.setattr(heuristics, "SKINNY_OUTPUTS", range(1, 100))


def tensors(rows: int = 16, dtype: torch.dtype = torch.bfloat16, dim: int = DIM) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        "x": torch.randn(rows, 1, INPUTS),
        "weight": torch.randn(dim, INPUTS) / INPUTS**0.5,
        "residual": torch.randn(rows, 1, dim),
        "norm_weight": torch.randn(dim) * 0.2 + 1,
        "first": torch.randn(HIDDEN, dim) / dim**0.5,
        "second": torch.randn(HIDDEN, dim) / dim**0.5,
        "bias": torch.randn(HIDDEN),
    }
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def total(t: dict[str, Tensor]) -> Tensor:
    found: Tensor = OPS.linear_add(t["x"], t["weight"], None, t["residual"])
    return found


def projections(t: dict[str, Tensor]) -> Any:
    h = total(t)
    q, k = OPS.norm_linear(h, None, [t["first"], t["second"]], [t["bias"], None], t["norm_weight"], 1e-5)
    return h + 1, q, k


def gate(t: dict[str, Tensor]) -> Any:
    h = total(t)
    weights = [t["first"], t["second"]]
    (y,) = OPS.norm_linear_swiglu(h, None, weights, [t["bias"], None], "gate_up", t["norm_weight"], 1e-5, 0.5)
    return y, h


def logits(t: dict[str, Tensor]) -> Any:
    (y,) = OPS.norm_linear(total(t), None, [t["first"]], [None], t["norm_weight"], 1e-5)
    return y.float()


def compiled(function: Callable[[dict[str, Tensor]], Any], given: dict[str, Tensor]) -> tuple[Any, str]:
    names = [*given]
    return compiled_code(lambda *args: function(dict(zip(names, args))), *given.values())


@pytest.mark.parametrize(
    ("function", "behind"),
    [(projections, "scaled_linear"), (gate, "scaled_linear_swiglu"), (logits, "scaled_linear")],
)
def test_a_norm_between_two_kernels_is_split(function: Callable[..., Any], behind: str) -> None:
    given = tensors()
    with infuse.override(kernels="always"):
        out, code = compiled(function, given)
    assert SPLIT in code and f"infuse.{behind}.default" in code and "_kernel.default" not in code
    torch.testing.assert_close(out, function(given), atol=3e-2, rtol=3e-2)
    kind = "norm_linear_swiglu" if function is gate else "norm_linear"
    assert [(decision.op, decision.chosen) for decision in decisions.decisions()] == [
        ("linear_add", "skinny_-1"),
        (kind, "skinny_-1"),
    ]


def test_two_layers_are_split_twice() -> None:
    def layers(t: dict[str, Tensor]) -> Any:
        h = total(t)
        (y,) = OPS.norm_linear(h, None, [t["weight"].t().contiguous()], [None], t["norm_weight"], 1e-5)
        return OPS.norm_linear(OPS.linear_add(y, t["weight"], None, h), None, [t["first"]], [None], None, 1e-5)[0]

    given = tensors()
    with infuse.override(kernels="always"):
        out, code = compiled(layers, given)
    assert code.count(f"{SPLIT}.default(") == code.count("infuse.scaled_linear.default(") == 2
    torch.testing.assert_close(out, layers(given), atol=3e-2, rtol=3e-2)


def two_norms(t: dict[str, Tensor]) -> Any:
    h = total(t)
    return [OPS.norm_linear(h, None, [t[name]], [None], t["norm_weight"], 1e-5)[0] for name in ("first", "second")]


def another_residual(t: dict[str, Tensor]) -> Any:
    return OPS.norm_linear(total(t), t["residual"], [t["first"]], [None], t["norm_weight"], 1e-5)


def norm_of_other_rows(t: dict[str, Tensor]) -> Any:
    h = total(t) * 2
    return OPS.norm_linear(h, None, [t["first"]], [None], t["norm_weight"], 1e-5)


def weight_made_later(t: dict[str, Tensor]) -> Any:
    h = total(t)
    return OPS.norm_linear(h, None, [t["first"]], [None], t["norm_weight"] + h[0, 0, 0], 1e-5)


def limited_gate(t: dict[str, Tensor]) -> Any:
    weights, rest = [t["first"], t["second"]], (t["norm_weight"], 1e-5, 0.0, False, False, "silu", 7.0)
    return OPS.norm_linear_swiglu(total(t), None, weights, [None, None], "gate_up", *rest)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (projections, tensors(rows=8)),
        (projections, tensors(dtype=torch.float16)),
        (projections, tensors(dim=40)),
        (projections, {**tensors(), "norm_weight": torch.ones(DIM)}),
        (two_norms, tensors()),
        (another_residual, tensors()),
        (norm_of_other_rows, tensors()),
        (weight_made_later, tensors()),
        (limited_gate, tensors()),
    ],
    ids=[
        *("rows", "float16", "features", "wide weight", "two norms", "residual", "scaled", "later weight"),
        "limited gate",
    ],
)
def test_other_norms_stay_whole(
    any_size_runs_well: None, function: Callable[..., Any], given: dict[str, Tensor]
) -> None:
    out, code = compiled(function, given)
    assert "infuse.linear_add_kernel" in code and SPLIT not in code, code
    torch.testing.assert_close(out, function(given), atol=3e-2, rtol=3e-2)


def test_kernels_that_are_not_known_to_be_faster_keep_the_norm() -> None:
    for kernels in ("auto", "never"):
        with infuse.override(kernels=kernels):
            _, code = compiled(projections, tensors())
        assert "torch.ops.infuse" not in code


@pytest.mark.parametrize(("most", "is_split"), [(16 * DIM, True), (16 * DIM - 1, False)])
def test_by_stored_measurements_only(
    any_size_runs_well: None, monkeypatch: pytest.MonkeyPatch, most: int, is_split: bool
) -> None:
    monkeypatch.setattr(heuristics, "MOST_SPLIT_ELEMENTS", most)
    _, code = compiled(projections, tensors())
    assert (SPLIT in code) == is_split and ("infuse.linear_add_kernel" in code) == (not is_split)
