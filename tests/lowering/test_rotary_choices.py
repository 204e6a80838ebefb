"""Rotations, with a norm before and a cache behind them: what runs where, and what the graph pays for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import infuse
from infuse.lowering import decisions
from infuse.lowering import rope as lowering
from infuse.lowering.heuristics import H200
from infuse.lowering.heuristics import rope as heuristics
from infuse.lowering.policy import place
from infuse.ops.qk_norm_rope import qk_norm_rope_ref
from infuse.ops.rope import rope_bwd_ref, rope_ref
from infuse.settings import Settings
from tests.lowering.compiled import compiled_code

OPS = torch.ops.infuse
FLAGS = (False, False, False, False)
INTERLEAVED = (True, False, False, False)
NORM = (None, 1e-6, False, 0.0, True, False)  # bias, eps, centered, weight_offset, cast_before_weight, eps_as_minimum


@pytest.fixture
def cpu_kernel(
    implement_on_cpu: Callable[[str, Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The kernel by its formula, measured here; the list of configurations that it was called with."""
    calls: list[int] = []
    monkeypatch.setattr(heuristics, "is_measured", lambda problem: True)

    def run(x, other, cos, sin, weight, other_weight, eps, offset, cast, *rest):  # type: ignore[no-untyped-def]
        *flags, is_backward, config, out, _ = rest
        calls.append(config)
        if eps is not None:
            out.copy_(qk_norm_rope_ref(x, cos, sin, weight, None, eps, False, offset, cast, False, *flags))
        else:
            out.copy_((rope_bwd_ref if is_backward else rope_ref)(x, cos, sin, *flags))

    implement_on_cpu("rope_out", run)
    return calls


def between_products(x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    heads = (x @ matrix).view(2, 5, 3, 8)
    y: Tensor = OPS.qk_norm_rope(heads, cos[:, None], sin[:, None], weight, *NORM, *INTERLEAVED)
    return y.flatten(2) @ matrix


def between_pointwise(x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    heads = (x @ matrix).exp().view(2, 5, 3, 8).transpose(1, 2)
    return torch.relu(OPS.qk_norm_rope(heads, cos, sin, weight, *NORM, *INTERLEAVED))


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "_MANY_ELEMENTS", 1)


def arguments() -> tuple[Tensor, ...]:
    return torch.randn(2, 5, 24), torch.randn(24, 24), torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)


def is_kernel(code: str) -> bool:
    return f"{lowering._CHOICE.name}(" in code


@pytest.mark.usefixtures("everything_is_large")
def test_kernel_between_products_is_taken_by_the_heuristic(cpu_kernel: list[int]) -> None:
    args = arguments()
    out, code = compiled_code(between_products, *args)
    torch.testing.assert_close(out, between_products(*args))
    assert is_kernel(code) and cpu_kernel[0] == -1
    assert decisions.decisions()[-1].why == "heuristic"


@pytest.mark.usefixtures("everything_is_large")
def test_neighbours_that_would_fuse_keep_the_formula(cpu_kernel: list[int]) -> None:
    args = arguments()
    out, code = compiled_code(between_pointwise, *args)
    torch.testing.assert_close(out, between_pointwise(*args))
    assert not is_kernel(code)
    assert decisions.decisions()[-1].why == "fusing with the neighbours saves 4 passes"


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("winner", ["kernel_1", "decomposition"])
def test_max_autotune_measures_every_candidate(
    cpu_kernel: list[int], choose_always: Callable[[str], list[set[str]]], winner: str
) -> None:
    timed = choose_always(winner)
    args = arguments()
    out, code = compiled_code(between_products, *args, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, between_products(*args), rtol=1e-4, atol=1e-4)
    assert timed == [{"decomposition", "kernel_-1", "kernel_0", "kernel_1"}]
    assert is_kernel(code) == (winner == "kernel_1")


@pytest.mark.parametrize("kernels", ["always", "never"])
def test_settings_decide_first(cpu_kernel: list[int], kernels: str) -> None:
    args = arguments()
    with infuse.override(kernels=kernels):
        out, code = compiled_code(between_pointwise, *args)
    torch.testing.assert_close(out, between_pointwise(*args))
    assert is_kernel(code) == (kernels == "always")


def test_rotation_alone_is_measured_or_left_to_inductor(cpu_kernel: list[int]) -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y: Tensor = OPS.rope(x, cos, sin)
        return y @ y.transpose(-1, -2)

    args = torch.randn(2, 3, 5, 8), torch.randn(5, 8), torch.randn(5, 8)
    _, code = compiled_code(function, *args)
    assert not is_kernel(code)
    with infuse.override(kernels="always"):
        out, code = compiled_code(function, *args)
    assert is_kernel(code)
    torch.testing.assert_close(out, function(*args))


@pytest.mark.parametrize("together", [True, False])
def test_tables_side_by_side_are_not_taken_apart(cpu_kernel: list[int], together: bool) -> None:
    def function(x: Tensor, table: Tensor) -> Tensor:
        cos, sin = (table[..., 0], table[..., 1]) if together else (table[..., ::2, 0], table[..., ::2, 1])
        y: Tensor = OPS.rope(x, cos, sin, True, True)
        return y

    args = torch.randn(2, 3, 5, 8), torch.randn(5, 4 if together else 8, 2)
    with infuse.override(kernels="always"):
        out, code = compiled_code(function, *args)
    torch.testing.assert_close(out, function(*args))
    assert is_kernel(code)
    # Each table that had to be copied is a buffer of its own.
    assert code.partition("def call")[2].count("empty_strided_cpu(") == (1 if together else 3)


def test_the_gradient_of_a_rotation_is_the_kernel_too(cpu_kernel: list[int]) -> None:
    def loss(x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y: Tensor = OPS.rope((x @ matrix).view(2, 5, 3, 8).transpose(1, 2), cos, sin, True)
        return (y @ y.transpose(-1, -2)).sum()

    args = [torch.randn(2, 5, 24, requires_grad=True), torch.randn(24, 24), torch.randn(5, 8), torch.randn(5, 8)]
    (expected,) = torch.autograd.grad(loss(*args), args[:1])
    cpu_kernel.clear()
    torch._dynamo.reset()
    with infuse.override(kernels="always"):
        compiled = torch.compile(loss, backend="infuse")
        got, codes = run_and_get_code(lambda: torch.autograd.grad(compiled(*args), args[:1]))
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)
    assert len(cpu_kernel) == 2 and all(is_kernel(code) for code in codes[-2:])


# --- which form the rewrite emits ------------------------------------------------------------------------------------


def asked(kind: str, args: tuple[object, ...], training: bool = False, autotune: bool = False, **settings: Any) -> str:
    placement = place(kind, args, training, settings=Settings(**settings), max_autotune=autotune)
    return placement.declined or placement.overload


ROPE = (torch.randn(2, 3, 5, 8), torch.randn(5, 8), torch.randn(5, 8), *FLAGS)
QK_NORM_ROPE = (*ROPE[:3], torch.randn(8), *NORM, *FLAGS)
CACHES = (torch.zeros(2, 1, 9, 8), torch.zeros(2, 1, 9, 8))
POSITIONS = (torch.arange(5), torch.arange(5))
KV = (torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8))
TABLES = (*ROPE[1:3], *ROPE[1:3])
CACHE_WRITE = (ROPE[0], *KV, *TABLES, *CACHES, *POSITIONS, None, None, None, 0.0, False, *FLAGS)


def test_without_kernels_everything_is_a_formula() -> None:
    assert asked("rope", ROPE) == "inline"
    assert asked("qk_norm_rope", QK_NORM_ROPE) == "no qk_norm_rope kernel: no kernel for cpu"
    assert asked("rope_cache_write", CACHE_WRITE) == "no rope_cache_write kernel: no kernel for cpu"


@pytest.mark.usefixtures("cpu_kernel")
def test_caches_are_for_inference() -> None:
    assert asked("rope", ROPE, training=True, kernels="always") == "default"
    assert asked("qk_norm_rope", QK_NORM_ROPE, training=True, kernels="always") == "default"
    assert asked("rope_cache_write", CACHE_WRITE, training=True) == "no rope_cache_write kernel: no backward kernel"
    for kind, args in (("qk_norm_rope", QK_NORM_ROPE), ("rope_cache_write", CACHE_WRITE)):
        assert asked(kind, args, kernels="always") == "default"
        assert asked(kind, args, kernels="never") == f"no {kind} kernel: kernels are off"


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.usefixtures("cpu_kernel")
def test_rotation_alone_needs_a_measurement() -> None:
    assert asked("rope", ROPE) == "inline"
    assert asked("rope", (*ROPE[:3], *INTERLEAVED)) == "default"
    assert asked("rope", ROPE, autotune=True) == "default"
    assert asked("rope", ROPE, kernels="always") == "default"


@pytest.mark.usefixtures("cpu_kernel")
def test_what_the_kernel_does_not_take_is_left_to_its_parts() -> None:
    x, cos, sin, *rest = QK_NORM_ROPE
    assert "layer norm" in asked("qk_norm_rope", (x, cos, sin, rest[0], rest[0], 1e-6, True, 0.0, True, False, *FLAGS))
    assert "minimum" in asked("qk_norm_rope", (x, cos, sin, rest[0], None, 1e-6, False, 0.0, True, True, *FLAGS))
    assert "float64" in asked("qk_norm_rope", (x.double(), cos, sin, *rest))
    assert "stride 2" in asked("qk_norm_rope", (torch.randn(2, 3, 5, 16)[..., ::2], cos, sin, *rest))
    assert "each head" in asked("qk_norm_rope", (x, torch.randn(2, 3, 5, 8), sin, *rest))
    q, k, v, *more = CACHE_WRITE
    assert "each head" in asked("rope_cache_write", (q, k, v, torch.randn(2, 3, 5, 8), *more[1:]))
    assert "different dtypes" in asked("rope_cache_write", (q, k, v, more[0].double(), *more[1:]))
    positions = more[6].to("meta")  # type: ignore[attr-defined]
    assert "positions on meta" in asked("rope_cache_write", (q, k, v, *more[:6], positions, *more[7:]))


@pytest.mark.usefixtures("cpu_kernel")
def test_symbolic_sizes_add_no_guards() -> None:
    placed: list[str] = []

    def function(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y: Tensor = OPS.rope(q, cos, sin)
        return y

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        tensors = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        shapes = torch._guards.TracingContext.get().fake_mode.shape_env
        before = len(shapes.guards)
        placed.append(asked("rope", (*tensors, *FLAGS), kernels="always"))
        assert len(shapes.guards) == before
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True)(*ROPE[:3])
    assert placed == ["default"]


def test_heuristics_are_about_size_and_neighbours() -> None:
    def problem(rows: int, interleaved: bool = True) -> heuristics.Problem:
        return heuristics.Problem(rows, 128, 2, interleaved, False, H200)

    assert heuristics.runs_well(problem(2**13)) and not heuristics.runs_well(problem(40))
    assert not heuristics.runs_well(problem(2**13, interleaved=False))
    assert heuristics.pair_runs_well(problem(2**13)) and not heuristics.pair_runs_well(problem(2**13, False))
    assert heuristics.pair_runs_well(heuristics.Problem(40, 128, 2, False, True, H200))


@pytest.mark.parametrize("unknown", [{"capability": (8, 6)}, {"capability": (8, 0)}, {"itemsize": 4}])
def test_the_heuristic_claims_nothing_where_nobody_has_looked(unknown: dict[str, Any]) -> None:
    known = heuristics.Problem(2**16, 128, 2, True, True, H200)
    assert heuristics.runs_well(known) and heuristics.pair_runs_well(known)
    problem = dataclasses.replace(known, **unknown)
    assert not heuristics.runs_well(problem) and not heuristics.pair_runs_well(problem)


def test_devices_without_results_take_a_kernel_by_a_measurement_alone(
    cpu_kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "is_measured", lambda problem: False)
    monkeypatch.setattr(heuristics, "_MANY_ELEMENTS", 1)
    left = "no {} kernel: not measured for this GPU and dtype"
    assert asked("rope", (*ROPE[:3], *INTERLEAVED)) == "inline"
    assert asked("qk_norm_rope", QK_NORM_ROPE) == left.format("qk_norm_rope")
    assert asked("qk_norm_rope", QK_NORM_ROPE, training=True) == left.format("qk_norm_rope")
    assert asked("qk_norm_rope", QK_NORM_ROPE, autotune=True) == "default"
    assert asked("rope_cache_write", CACHE_WRITE, autotune=True) == left.format("rope_cache_write")
    assert asked("rope_cache_write", CACHE_WRITE, kernels="always") == "default"
    args = arguments()
    out, code = compiled_code(between_products, *args)
    torch.testing.assert_close(out, between_products(*args))
    assert not is_kernel(code) and cpu_kernel == []


@pytest.mark.usefixtures("cpu_kernel")
def test_few_rows_of_a_rotation_alone_stay_in_the_graph() -> None:
    """Inductor puts them into a kernel with what is around them."""
    assert asked("rope", (*ROPE[:3], *INTERLEAVED), autotune=True) == "inline"
    assert asked("qk_norm_rope", QK_NORM_ROPE) == "default"
    assert asked("rope_cache_write", CACHE_WRITE) == "default"
