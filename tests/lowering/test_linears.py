"""Linears with a norm, a gate or a residual around them: when a kernel runs, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import infuse
from infuse.lowering import decisions, linears
from infuse.lowering.heuristics import H200
from infuse.lowering.heuristics import linears as heuristics
from infuse.lowering.policy import place
from infuse.ops import library, linear_kernels
from infuse.settings import Settings
from tests.lowering.compiled import compiled_code
from tests.lowering.pretended_linears import gated_on_cpu, skinny_on_cpu

OPS = torch.ops.infuse
DIM, HIDDEN = 16, 24


@pytest.fixture
def calls(implement_on_cpu: Callable[[str, Callable[..., Any]], None]) -> list[str]:
    """The families of kernels that were called."""
    found: list[str] = []

    def watched(name: str, run: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            found.append(name)
            run(*args)

        return call

    implement_on_cpu("skinny_linear_out", watched("skinny", skinny_on_cpu))
    implement_on_cpu("gated_linear_out", watched("gated", gated_on_cpu))
    for kind, site in linear_kernels.KINDS.items():
        implement_on_cpu(f"{kind}_kernel", linear_kernels.implementation(site))
    return found


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16() * shape[-1] ** -0.5


def sites(rows: int) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """A function around each operator, whose neighbours Inductor makes, and its tensors."""
    x, residual, norm_weight = torch.randn(2, rows // 2, DIM).bfloat16(), tensor(2, rows // 2, DIM), tensor(DIM) + 1
    gate, up, gate_bias, packed, down = (
        tensor(HIDDEN, DIM),
        tensor(HIDDEN, DIM),
        tensor(HIDDEN),
        tensor(2 * HIDDEN, DIM),
        tensor(DIM, HIDDEN),
    )

    def norm_linear(x: Tensor, residual: Tensor, *rest: Tensor) -> Any:
        norm_weight, w0, w1, bias = rest
        return OPS.norm_linear(x * 2, residual, [w0, w1], [bias, None], norm_weight, 1e-6)

    def norm_linear_swiglu(x: Tensor, *rest: Tensor) -> Any:
        norm_weight, gate, up, bias = rest
        return OPS.norm_linear_swiglu(x * 2, None, [gate, up], [bias, None], "gate_up", norm_weight, 1e-6)

    def linear_swiglu(x: Tensor, packed: Tensor) -> Any:
        return OPS.linear_swiglu(x * 2, [packed], [None], "interleaved_up_first", "gelu_erf") + 1

    def linear_add(h: Tensor, down: Tensor, residual: Tensor) -> Any:
        return OPS.linear_add(h, down, None, residual) * 2

    def grouped(x: Tensor, experts: Tensor, offsets: Tensor) -> Any:
        return OPS.grouped_linear_swiglu(x.flatten(0, 1) * 2, [experts.transpose(1, 2)], offsets, "up_gate") + 1

    offsets = torch.tensor([2, 2, rows], dtype=torch.int32)
    return {
        "grouped_linear_swiglu": (grouped, (x, tensor(3, 2 * HIDDEN, DIM), offsets)),
        "norm_linear": (norm_linear, (x, residual, norm_weight, gate, up, gate_bias)),
        "norm_linear_swiglu": (norm_linear_swiglu, (x, norm_weight, gate, up, gate_bias)),
        "linear_swiglu": (linear_swiglu, (x, packed)),
        "linear_add": (linear_add, (tensor(2, rows // 2, HIDDEN), down, residual)),
    }


@pytest.mark.parametrize("kind", linear_kernels.KINDS)
def test_the_kernel_gets_what_is_there(calls: list[str], kind: str) -> None:
    function, tensors = sites(rows=6)[kind]
    with infuse.override(kernels="always"):
        out, code = compiled_code(function, *tensors)
    torch.testing.assert_close(out, function(*tensors), atol=3e-2, rtol=3e-2)
    family = "gated" if kind == "grouped_linear_swiglu" else "skinny"
    assert calls == [family] and f"infuse.{kind}_kernel" in code
    assert [decision.chosen for decision in decisions.decisions()] == [f"{family}_-1"]


def test_equal_groups_of_rows_are_given_their_ends(calls: list[str]) -> None:
    def batched(x: Tensor, experts: Tensor) -> Any:
        return OPS.grouped_linear_swiglu(x * 2, [experts.transpose(1, 2)], None, "gate_up") + 1

    x, experts = tensor(3, 5, DIM), tensor(3, 2 * HIDDEN, DIM)
    with infuse.override(kernels="always"):
        out, _ = compiled_code(batched, x, experts)
    torch.testing.assert_close(out, batched(x, experts), atol=3e-2, rtol=3e-2)
    assert calls == ["gated"]


def test_the_policy_knows_what_no_kernel_computes(calls: list[str]) -> None:
    """Composites are left to their parts there, which may have kernels of their own."""

    def form(kind: str, *args: Any, training: bool = False, max_autotune: bool = True, **settings: Any) -> str:
        found = place(kind, args, training, settings=Settings(**settings), max_autotune=max_autotune)
        return found.overload or found.declined

    x, gate, up = tensor(6, DIM), tensor(HIDDEN, DIM), tensor(HIDDEN, DIM)
    args = (x, [gate, up], [None, None], "gate_up")
    assert form("linear_swiglu", *args) == form("linear_swiglu", *args, "gelu_tanh") == "default"
    assert form("linear_swiglu", *args, max_autotune=False) == "torch's products are as fast"
    assert "gradients" in form("linear_swiglu", *args, training=True)
    assert "off" in form("linear_swiglu", *args, kernels="never")
    assert "exact" in form("linear_swiglu", *args, kernels="always", numerics="exact")
    assert "limits" in form("linear_swiglu", *args, "quick_gelu", 7.0, 1.702, 1.0)
    four = (x, None, [gate] * 4, [None] * 4, None, 1e-6)
    assert "4 weights" in form("norm_linear", *four)
    assert "65 rows" in form("norm_linear", tensor(65, DIM), None, [gate], [None], None, 1e-6)


def test_by_stored_measurements_few_rows_take_the_kernel(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "capability", lambda device: H200)
    monkeypatch.setattr(heuristics, "runs_well", lambda kind, family, sizes, capability: family == "skinny")
    function, tensors = sites(rows=6)["linear_add"]
    out, _ = compiled_code(function, *tensors)
    torch.testing.assert_close(out, function(*tensors), atol=3e-2, rtol=3e-2)
    assert calls == ["skinny"]


def test_many_rows_take_the_kernel_for_many(calls: list[str]) -> None:
    function, tensors = sites(rows=80)["linear_swiglu"]
    with infuse.override(kernels="always"):
        out, _ = compiled_code(function, *tensors)
    torch.testing.assert_close(out, function(*tensors), atol=3e-2, rtol=3e-2)
    assert calls == ["gated"]


@pytest.mark.parametrize(
    ("kind", "winner"),
    [
        ("norm_linear", linears.FORMULA),
        ("norm_linear", "skinny_1"),
        ("linear_swiglu", "gated_0"),
        ("grouped_linear_swiglu", "gated_1"),
    ],
)
def test_max_autotune_measures_every_configuration(
    calls: list[str], choose_always: Callable[[str], list[set[str]]], kind: str, winner: str
) -> None:
    timed = choose_always(winner)
    function, tensors = sites(rows=6)[kind]
    out, code = compiled_code(function, *tensors, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, function(*tensors), atol=3e-2, rtol=3e-2)
    families = {"linear_swiglu": ["skinny", "gated"], "grouped_linear_swiglu": ["gated"]}.get(kind, ["skinny"])
    assert timed[0] == {linears.FORMULA, *(f"{family}_{config}" for family in families for config in (-1, 0, 1))}
    assert (f"infuse.{kind}_kernel" in code) == (winner != linears.FORMULA)


def test_where_kernels_are_known_to_be_faster_nothing_is_timed(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions.clear()
    monkeypatch.setattr(heuristics, "beats_tuned", lambda kind, family, sizes, capability: family == "skinny")
    function, tensors = sites(rows=6)["linear_swiglu"]
    out, _ = compiled_code(function, *tensors, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, function(*tensors), atol=3e-2, rtol=3e-2)
    (decision,) = decisions.decisions()
    assert decision.chosen == "skinny_-1" and not decision.timings_ms
    assert calls == ["skinny"]


def test_products_of_a_residual_are_timed_from_where_they_are_as_fast() -> None:
    def known(kind: str, family: str, *sizes: int) -> bool:
        return heuristics.beats_tuned(kind, family, linear_kernels.Sizes(*sizes), H200)

    assert known("linear_add", "skinny", 32, 4096, 4096) and known("norm_linear", "skinny", 64, 4096, 6144)
    assert not known("linear_add", "skinny", 33, 4096, 4096) and known("norm_linear", "skinny", 1, 4096, 128256)
    assert not heuristics.beats_tuned("norm_linear", "skinny", linear_kernels.Sizes(1, 896, 1024), (8, 6))


def test_gate_and_up_are_timed_where_that_was_not_measured() -> None:
    def known(*sizes: int, kind: str = "linear_swiglu") -> bool:
        return heuristics.beats_tuned(kind, "gated", linear_kernels.Sizes(*sizes), H200)

    assert known(128, 4096, 28672) and known(8192, 8192, 57344)
    assert not (known(127, 4096, 28672) or known(512, 3584, 28672) or known(512, 4096, 18944))
    assert not known(4096, 2048, 1536 * 128, kind="grouped_linear_swiglu")
    assert not heuristics.beats_tuned("linear_swiglu", "gated", linear_kernels.Sizes(512, 4096, 28672), (8, 6))


def test_without_a_measurement_only_what_was_measured_takes_a_kernel() -> None:
    def runs(kind: str, family: str, *sizes: int) -> bool:
        assert not heuristics.runs_well(kind, family, linear_kernels.Sizes(*sizes), (8, 6))
        return heuristics.runs_well(kind, family, linear_kernels.Sizes(*sizes), H200)

    assert runs("norm_linear", "skinny", 1, 896, 1152) and runs("linear_add", "skinny", 64, 14336, 4096)
    assert not runs("norm_linear", "skinny", 1, 4096, 128256) and not runs("norm_linear", "skinny", 1, 256, 1152)
    assert runs("linear_swiglu", "gated", 128, 4096, 28672) and runs("linear_swiglu", "gated", 512, 2048, 8192)
    assert not runs("linear_swiglu", "gated", 128, 4096, 11008) and not runs("linear_swiglu", "gated", 8192, 896, 9728)
    assert runs("grouped_linear_swiglu", "gated", 4096, 2048, 1536)
    assert not runs("grouped_linear_swiglu", "gated", 64, 2048, 1536)
    for kind in ("linear_swiglu", "grouped_linear_swiglu"):
        assert runs(kind, "gated", 65536, 1024, 4096) and not runs(kind, "gated", 16384, 1024, 4096)


def head(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, (DIM,), norm_weight, 1e-6), weight).float()


@pytest.mark.parametrize("winner", ["skinny_1", linears.FORMULA])
def test_logits_that_are_returned_in_float32_are_written_so(
    calls: list[str], choose_always: Callable[[str], list[set[str]]], winner: str
) -> None:
    choose_always(winner)
    tensors = (torch.randn(2, 3, DIM).bfloat16(), tensor(DIM) + 1, tensor(HIDDEN, DIM))
    out, code = compiled_code(head, *tensors, mode="max-autotune-no-cudagraphs")
    assert out.dtype == torch.float32 and torch.equal(out, out.bfloat16().float())
    torch.testing.assert_close(out, head(*tensors), atol=3e-2, rtol=3e-2)
    is_kernel = winner != linears.FORMULA
    assert ("infuse.norm_linear_kernel" in code) == is_kernel and ("cpp_fused" in code) == (not is_kernel)
