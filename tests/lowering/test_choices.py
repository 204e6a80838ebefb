"""What the operators become in generated code: formulas inlined, kernels only where they are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import infuse
from infuse import backend
from infuse.lowering import decisions, graph_neighbours, inductor, profit
from infuse.lowering import rms_norm as lowering
from infuse.lowering.heuristics import norm as heuristics
from infuse.lowering.policy import place
from infuse.settings import Settings
from tests.lowering.compiled import compiled_code
from tests.small_models import Block

OPS = torch.ops.infuse


def kernels_in(code: str) -> int:
    """Number of calls of generated C++ kernels."""
    body = code.partition("def call")[2]
    return sum(line.strip().startswith("cpp_fused") for line in body.splitlines())


def fused_by_both_neighbours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(OPS.rms_norm(x * 2 + residual, weight, 1e-6)) + 1


def alone(x: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    return OPS.rms_norm(x, weight, 1e-6) @ matrix


@pytest.mark.parametrize("dynamic", [False, True])
def test_without_a_kernel_the_formula_fuses_with_both_neighbours(dynamic: bool) -> None:
    args = torch.randn(32, 64), torch.randn(32, 64), torch.randn(64)
    out, code = compiled_code(fused_by_both_neighbours, *args, dynamic=dynamic)
    torch.testing.assert_close(out, fused_by_both_neighbours(*args))
    assert kernels_in(code) == 1 and "torch.ops.infuse." not in code


def test_every_operator_is_inlined_and_right() -> None:
    def several(x: Tensor, residual: Tensor, weight: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        y, total = OPS.add_rms_norm(x, residual, weight, 1e-6, 0.0, True)
        return OPS.swiglu(y, total), total, OPS.attention(q, k, k, None, 0.3, True)

    args = [
        torch.randn(3, 5, 16),
        torch.randn(3, 5, 16),
        torch.randn(16),
        torch.randn(2, 4, 6, 8),
        torch.randn(2, 2, 6, 8),
    ]
    out, code = compiled_code(several, *args)
    torch.testing.assert_close(out, several(*args))
    assert "torch.ops.infuse." not in code


def test_the_training_forms_are_inlined_and_right() -> None:
    def loss(x: Tensor, residual: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        y, total = OPS.add_rms_norm(x, residual, weight, 1e-6)
        return (OPS.swiglu(y, total) * OPS.rms_norm(x, weight, 1e-6)).sum() + OPS.attention(q, q, q, None, 0.3).sum()

    args = [torch.randn(shape, requires_grad=True) for shape in ((3, 16), (3, 16), (16,), (1, 2, 4, 8))]
    expected = torch.autograd.grad(loss(*args), args)
    got, codes = run_and_get_code(lambda: torch.autograd.grad(torch.compile(loss, backend="infuse")(*args), args))
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not any("torch.ops.infuse." in code for code in codes)


def test_compiled_code_is_that_of_stock_without_a_kernel() -> None:
    """As many generated kernels in a whole block with Infuse as without."""
    block, x = Block(), torch.randn(2, 6, 32)
    _, mine = compiled_code(block, x)
    torch._dynamo.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(block), x)
    assert kernels_in(mine) <= kernels_in(codes[-1])


def test_kernels_always_takes_the_kernel(cpu_kernel: list[int]) -> None:
    args = torch.randn(32, 64), torch.randn(32, 64), torch.randn(64)
    with infuse.override(kernels="always"):
        out, code = compiled_code(fused_by_both_neighbours, *args)
    torch.testing.assert_close(out, fused_by_both_neighbours(*args))
    assert cpu_kernel == [-1] and f"{lowering.NORM.choice.name}(" in code
    assert decisions.decisions()[-1].chosen == "kernel_-1"


def test_kernels_never_and_the_heuristic_take_the_formula(cpu_kernel: list[int]) -> None:
    args = torch.randn(32, 64), torch.randn(64), torch.randn(64, 8)
    for options in ({"options": {"infuse.kernels": "never"}}, {}):
        torch._dynamo.reset()
        out, _ = compiled_code(alone, *args, **options)
        torch.testing.assert_close(out, alone(*args))
    assert cpu_kernel == []


@pytest.mark.parametrize("winner", ["kernel_1", "decomposition"])
def test_max_autotune_measures_every_candidate_and_takes_the_winner(
    cpu_kernel: list[int], choose_always: Callable[[str], list[set[str]]], winner: str
) -> None:
    timed = choose_always(winner)
    args = torch.randn(32, 64), torch.randn(64), torch.randn(64, 8)
    out, code = compiled_code(alone, *args, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, alone(*args))
    assert timed == [{"decomposition", "kernel_-1", "kernel_0", "kernel_1"}]
    assert (f"{lowering.NORM.choice.name}(" in code) == (winner == "kernel_1")
    assert "infuse_stand_in" not in code


def test_measuring_leaves_nothing_in_the_graph(cpu_kernel: list[int]) -> None:
    """The trap: realising the inputs for the measurement writes them to memory even if the formula wins."""
    args = torch.randn(32, 64), torch.randn(32, 64), torch.randn(64)
    out, code = compiled_code(fused_by_both_neighbours, *args, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, fused_by_both_neighbours(*args))
    decision = decisions.decisions()[-1]
    assert decision.chosen == "decomposition" and len(decision.timings_ms) == 4
    assert "4 passes" in decision.why
    assert kernels_in(code) == 1


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (lambda x, w, m: OPS.rms_norm(x, w, 1e-6) @ m, 0),
        (lambda x, w, m: OPS.rms_norm(x * 2, w, 1e-6) @ m, 2),
        (lambda x, w, m: (lambda h: (OPS.rms_norm(h, w, 1e-6) @ m, h))(x * 2), 1),
        (lambda x, w, m: torch.relu(OPS.rms_norm(x, w, 1e-6)), 2),
        (lambda x, w, m: torch.relu(OPS.rms_norm(x, w, 1e-6).view(-1)), 2),
        (lambda x, w, m: (lambda y: (torch.relu(y), y @ m))(OPS.rms_norm(x, w, 1e-6)), 1),
        (lambda x, w, m: OPS.rms_norm(x @ m @ m.t(), w, 1e-6), 0),
        (lambda x, w, m: OPS.add_rms_norm(x, x + 1, w, 1e-6)[0] @ m, 3),
        (lambda x, w, m: (lambda y, s: (y @ m, s))(*OPS.add_rms_norm(x, x, w, 1e-6)), 0),
        (lambda x, w, m: (lambda y, s: (y @ m, s, s * 2))(*OPS.add_layer_norm(x, x + 1, w, w, 1e-6)), 3),
        (lambda x, w, m: OPS.gated_rms_norm(x * 2, x + 1, w, 1e-6, True) @ m, 4),
    ],
)
def test_neighbours_are_counted(
    cpu_kernel: list[int], monkeypatch: pytest.MonkeyPatch, function: Any, passes: int
) -> None:
    seen: list[int] = []
    original = graph_neighbours.neighbours

    def spy(*args: Any) -> graph_neighbours.Neighbours:
        found = original(*args)
        seen.append(found.passes)
        return found

    monkeypatch.setattr(graph_neighbours, "neighbours", spy)
    monkeypatch.setattr(inductor, "measure", lambda *args, **how: {})
    args = torch.randn(32, 64), torch.randn(64), torch.randn(64, 8)
    out, _ = compiled_code(function, *args, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, function(*args), rtol=1e-4, atol=1e-4)
    assert seen == [passes]


def hugging_face_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    h = (x * 2 + residual).float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.relu(weight * n.to(x.dtype)) + 1


def residual_chain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    def norm(h: Tensor) -> Tensor:
        f = h.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()).to(h.dtype)

    total = residual + x
    total = total + torch.nn.functional.silu(norm(total))
    return norm(total), total


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("function", [hugging_face_norm, residual_chain])
def test_a_formula_that_wins_reads_and_writes_what_stock_does(
    cpu_kernel: list[int], monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], mode: str
) -> None:
    """The same kernels, allocations, loads and stores.

    Between them stock of torch 2.11 may round once less: a pass of its own takes away a cast to bf16 and back, which an
    operator that is opened after that pass still has.
    """
    monkeypatch.setattr(profit, "choose", lambda *rest: ("decomposition", {}))
    args = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((64, 128), (64, 128), (128,))]

    def code_of(**options: Any) -> str:
        torch._dynamo.reset()
        with torch.no_grad():
            code = run_and_get_code(torch.compile(function, mode=mode, **options), *args)[1][-1]
        code = re.sub(r"cpp_fused\w*|# .*", "", code)
        accesses = re.findall(r"empty_strided\w*\(.*|for\(.*|loadu\([^)]*|\w+_ptr\d+\[[^]]*\]|store\([^)]*", code)
        return "\n".join(re.sub(r"tmp\d+", "tmp", access) for access in accesses)

    stock = code_of()
    assert "store(" in stock and "loadu(" in stock
    assert code_of(backend="infuse") == stock


def test_two_instances_of_an_operator_choose_each_for_itself(cpu_kernel: list[int]) -> None:
    def two(x: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
        return OPS.rms_norm(OPS.rms_norm(x, weight, 1e-6) @ matrix, None, 1e-6)

    args = torch.randn(32, 64), torch.randn(64), torch.randn(64, 8)
    with infuse.override(kernels="always"):
        out, code = compiled_code(two, *args)
    torch.testing.assert_close(out, two(*args))
    assert cpu_kernel == [-1, -1] and code.count(f"{lowering.NORM.choice.name}(") == 2


def test_a_symbolic_shape_takes_the_kernel_too(cpu_kernel: list[int]) -> None:
    compiled = torch.compile(alone, backend="infuse", dynamic=True, options={"infuse.kernels": "always"})
    weight, matrix = torch.randn(64), torch.randn(64, 8)
    with torch.no_grad():
        for rows in (4, 7):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x, weight, matrix), alone(x, weight, matrix))
    assert cpu_kernel == [-1, -1]


def place_on_cpu(kind: str, *args: object, training: bool = False, **settings: Any) -> Any:
    return place(kind, args, training, settings=Settings(**settings), max_autotune=True)


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm"])
def test_a_kernel_that_cannot_be_had_on_its_own_device_is_missing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("infuse.ops.library.missing", lambda device: "nvcc was not found")
    with FakeTensorMode():
        x = torch.empty(4, 16, device="cuda")
        args = (*[x] * (1 if kind == "rms_norm" else 2), None, 1e-6, 0.0, False)
        assert place(kind, args, False, settings=Settings(), max_autotune=False).missing == "nvcc was not found"
        never = Settings(kernels="never")
        assert place(kind, args, False, settings=never, max_autotune=False).missing == ""
    args = tuple(torch.empty(4, 16) if isinstance(arg, torch.Tensor) else arg for arg in args)
    assert place(kind, args, False, settings=Settings(), max_autotune=False).missing == ""


def test_the_policy_keeps_an_operator_whole_only_where_something_else_may_run(cpu_kernel: list[int]) -> None:
    x, w = torch.empty(8, 64), torch.empty(64)
    assert place_on_cpu("rms_norm", x, w, 1e-6, 0.0, False, False).overload == "default"
    assert place_on_cpu("add_rms_norm", x, x, w, 1e-6, 0.0, False, False).overload == "default"
    assert "backward" in place_on_cpu("rms_norm", x, w, 1e-6, 0.0, False, False, training=True).kernel
    assert "off" in place_on_cpu("rms_norm", x, w, 1e-6, 0.0, False, False, kernels="never").kernel
    assert "float64" in place_on_cpu("rms_norm", x.double(), w, 1e-6, 0.0, False, False).kernel
    assert place_on_cpu("rms_norm", x, w, 1e-6, 0.0, False, True).overload == "default"
    assert place_on_cpu("swiglu", x, x).overload == "inline"
    q = torch.empty(1, 2, 4, 8)
    assert place_on_cpu("attention", q, q, q, None, 0.3, False).overload == "inline"


def test_without_a_library_the_policy_says_why() -> None:
    placement = place_on_cpu("rms_norm", torch.empty(8, 64), None, 1e-6, 0.0, False, False)
    assert placement.overload == "inline" and placement.kernel == "decomposition (no kernel for cpu)"


def test_the_heuristic_offers_the_launcher_and_its_table() -> None:
    problem = heuristics.Problem("rms_norm", 16, 64, 2, (9, 0))
    assert heuristics.configurations(problem, 3) == (-1, 0, 1, 2)
    assert heuristics.factor(problem) == 1


@pytest.mark.parametrize(
    ("chosen", "words"),
    [("kernel_3", "kernel 3 (why)"), ("kernel_-1", "kernel (why)"), ("decomposition", "decomposition (why)")],
)
def test_a_decision_of_a_site_is_counted_in_words(chosen: str, words: str) -> None:
    decisions.record(decisions.Decision("rms_norm", "1x1", chosen, "why", site="0.7"))
    assert torch._dynamo.utils.counters["inductor"].pop(f"infuse choice 0.7 {words}") == 1


def test_decisions_are_bounded() -> None:
    decisions.clear()
    for _ in range(5000):
        decisions.record(decisions.Decision("rms_norm", "1x1", "decomposition", "test"))
    assert len(decisions.decisions()) == 4096
    decisions.clear()


def test_settings_travel_with_the_pass() -> None:
    config = backend.inductor_config(None, {"infuse.kernels": "always"})
    with torch._inductor.config.patch(config):
        assert inductor.settings_in_effect().kernels == "always"
    assert inductor.settings_in_effect().kernels == "auto"
