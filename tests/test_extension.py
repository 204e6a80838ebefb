"""A user's own operator, patterns and kernel, and what is refused at registration."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infuse
from infuse import caches, extension, settings
from infuse.lowering import decisions
from infuse.patterns import passes
from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture

ROOT = Path(__file__).resolve().parents[1]
KIND = "softsign_gate_in_tests"
calls: list[tuple[int, ...]] = []


def softsign_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.softsign(gate) * up


def by_hand(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + gate.abs()) * up


def kernel(gate: Tensor, up: Tensor, *, out: Tensor) -> None:
    calls.append(tuple(gate.shape))
    torch.mul(F.softsign(gate), up, out=out)


def can_run(gate: Tensor, up: Tensor) -> bool | str:
    return True if gate.shape[-1] % 8 == 0 else "its rows are no multiple of 8"


def runs_well(gate: Tensor, up: Tensor) -> bool:
    return gate.shape[0] >= 64


def scaled_norm(x: Tensor, weight: Tensor) -> Tensor:
    """No built-in family takes a mean of absolute values."""
    return x / (x.abs().mean(-1, keepdim=True) + 1e-6) * weight


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Registers, and takes back what other tests would see; an operator that is defined stays so."""
    before = passes.FAMILIES, list(settings._added), set(caches._sources), caches.build_hash()
    infuse.register_pattern(KIND, formula=softsign_gate)
    infuse.register_pattern(KIND, example=by_hand)
    infuse.register_kernel(KIND, kernel, device="cpu", can_run=can_run, runs_well=runs_well)
    infuse.register_pattern("scaled_norm_in_tests", formula=scaled_norm, shapes={"weight": (8,)})
    yield
    after = caches.build_hash()
    passes.FAMILIES, settings._added[:] = before[:2]
    caches._sources.clear()
    caches._sources.update(before[2])
    caches.tag_caches(after)


def tensors(*shape: int, dtype: torch.dtype = torch.float32, training: bool = False) -> tuple[Tensor, Tensor]:
    gate, up = (torch.randn(shape, dtype=dtype) for _ in range(2))
    return gate.requires_grad_(training), up.requires_grad_(training)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.Softsign()

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.mul(up, self.activation(gate))


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [softsign_gate, by_hand, Module()])
def test_every_spelling_becomes_the_operator(
    function: Callable[..., Any], dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    captured = capture(function, *tensors(2, 3, 8, dtype=dtype, training=training), training=training, dynamic=dynamic)
    assert captured.counts == {KIND: 1}
    assert_same_results(captured, training)


@pytest.mark.parametrize("training", [False, True])
def test_a_pattern_with_a_reduction_holds_for_any_rank(training: bool) -> None:
    x, weight = torch.randn(2, 3, 16, requires_grad=training), torch.randn(16, requires_grad=training)
    captured = capture(scaled_norm, x, weight, training=training, settings=Settings(verify="compile"))
    assert captured.counts == {"scaled_norm_in_tests": 1}
    assert captured.records[0].verified.startswith("verified")
    assert_same_results(captured, training)


def wide(gate: Tensor, up: Tensor) -> Tensor:
    return F.softsign(gate.double()) * up


def other_function(gate: Tensor, up: Tensor) -> Tensor:
    return torch.atan(gate) * up


def broadcasting(gate: Tensor, up: Tensor) -> Tensor:
    return F.softsign(gate) * up[0]


def with_a_number(gate: Tensor, up: Tensor) -> Tensor:
    return F.softsign(gate) * 2.0


def other_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + up.abs()) * up


def other_dimension(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.abs().mean(0, keepdim=True) + 1e-6) * weight[0]


def other_number(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + 1e-5) * weight[0]


@pytest.mark.parametrize(
    "function",
    [wide, other_function, broadcasting, with_a_number, other_gate, other_dimension, other_number],
)
def test_a_near_miss_is_left_alone(function: Callable[..., Any]) -> None:
    assert capture(function, *tensors(8, 8)).counts == {}


def over_rows(x: Tensor) -> Tensor:
    return x / (x.abs().mean(1, keepdim=True) + 1e-6)


def over_the_last(x: Tensor) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + 1e-6)


def test_a_formula_that_counts_dimensions_from_the_first_holds_for_its_own_rank_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "FAMILIES", ())
    infuse.register_pattern("over_rows_in_tests", formula=over_rows, example=over_the_last)
    assert capture(over_the_last, torch.randn(4, 8)).counts == {"over_rows_in_tests": 1}
    for function in (over_rows, over_the_last):
        assert capture(function, torch.randn(2, 4, 8)).counts == {}


def test_a_write_in_between_is_refused_as_everywhere() -> None:
    def writes(gate: Tensor, up: Tensor) -> Tensor:
        activation = F.softsign(gate)
        gate.add_(1)
        return activation * up

    captured = capture(writes, *tensors(4, 8))
    assert captured.counts == {} and "writes in place" in captured.refusals[0]


def test_a_users_pattern_goes_before_a_builtin_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "FAMILIES", passes.FAMILIES)
    assert capture(own_silu_gate, *tensors(4, 8)).counts == {"swiglu": 1}
    infuse.register_pattern("own_silu_gate_in_tests", formula=own_silu_gate)
    assert capture(own_silu_gate, *tensors(4, 8)).counts == {"own_silu_gate_in_tests": 1}


def test_the_family_can_be_switched_off() -> None:
    assert KIND in Settings().patterns
    assert capture(softsign_gate, *tensors(4, 8), settings=Settings(patterns=("swiglu",))).records == []


def run(kernels: str, *shape: int) -> tuple[list[tuple[int, ...]], str]:
    torch._dynamo.reset()
    calls.clear()
    args = tensors(*shape)
    with torch.no_grad():
        compiled = torch.compile(Module(), backend="infuse", options={"infuse.kernels": kernels})
        torch.testing.assert_close(compiled(*args), softsign_gate(*args))
    return list(calls), infuse.last_report().sites[0].kernel


def test_the_kernel_runs_where_it_may_and_is_wanted() -> None:
    assert run("always", 4, 8) == ([(4, 8)], "kernel (kernels are always taken)")
    assert run("auto", 64, 8) == ([(64, 8)], "kernel (its runs_well says so)")
    assert run("auto", 4, 8) == ([], "decomposition (Inductor fuses it with its neighbours)")
    assert run("always", 4, 9) == ([], "decomposition (its rows are no multiple of 8)")
    assert run("never", 64, 8) == ([], "decomposition (kernels are off)")


def test_the_lowering_declines_what_the_policy_did_not_see() -> None:
    """The operator written by hand reaches the lowering with any arguments."""
    operator = getattr(torch.ops.infuse, KIND)
    args = tensors(4, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(operator, backend="infuse")(*args), softsign_gate(*args))
    assert decisions.decisions()[-1].why == "its rows are no multiple of 8"


def test_training_differentiates_the_formula() -> None:
    gate, up = tensors(4, 8, training=True)
    operator = getattr(torch.ops.infuse, KIND)
    expected = torch.autograd.grad(softsign_gate(gate, up).square().sum(), (gate, up))
    for mine, theirs in zip(torch.autograd.grad(operator(gate, up).square().sum(), (gate, up)), expected):
        torch.testing.assert_close(mine, theirs)


def test_registering_changes_the_key_of_the_caches_once() -> None:
    before = caches.build_hash()
    infuse.register_pattern(KIND, formula=softsign_gate)
    assert caches.build_hash() == before
    assert caches._package_hash() != before and torch.compiler.config.cache_key_tag.count("infuse-") == 1
    assert before in torch.compiler.config.cache_key_tag


def own_silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def wrong(gate: Tensor, up: Tensor) -> Tensor:
    return F.softsign(up) * gate


def reshaping(gate: Tensor, up: Tensor) -> Tensor:
    return F.softsign(gate.reshape(-1, 8)) * up


def random(gate: Tensor, up: Tensor) -> Tensor:
    return F.gumbel_softmax(gate) * up


def no_annotations(gate, up):  # type: ignore[no-untyped-def]
    return gate * up


def text(gate: Tensor, mode: str) -> Tensor:
    return gate


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"example": wrong}, "computes something else"),
        ({"example": reshaping}, "reshape in the example.*matcher"),
        ({"example": lambda gate, other: gate * other}, r"parameters \['other'\]"),
        ({"kind": "new", "example": by_hand}, "expected one for a new operator"),
        ({"kind": "new", "formula": no_annotations}, "annotation -> Tensor"),
        ({"kind": "new", "formula": text}, "mode: got the annotation"),
        ({"kind": "new", "formula": random}, "something else|expected one of"),
        ({"kind": "swiglu", "formula": softsign_gate}, "not taken"),
        ({"formula": by_hand}, "another"),
        ({"match": lambda view, node: None}, "no anchors"),
        ({}, "none of formula, example and match"),
        ({"example": by_hand, "match": lambda view, node: None}, "example and match"),
    ],
)
def test_a_wrong_registration_is_refused_and_leaves_nothing(keywords: dict[str, Any], message: str) -> None:
    before = passes.FAMILIES, caches.build_hash(), settings.patterns()
    with pytest.raises(ValueError, match=message):
        infuse.register_pattern(**{"kind": KIND, **keywords})
    assert (passes.FAMILIES, caches.build_hash(), settings.patterns()) == before


def test_a_wrong_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'rms_norm', expected a kind that register_pattern gave a formula"):
        infuse.register_kernel("rms_norm", kernel)
    with pytest.raises(ValueError, match="got another one under the same name"):
        infuse.register_kernel(KIND, kernel, device="cpu")


def test_a_matcher_may_say_what_no_example_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def match(view: extension.CanonicalGraph, node: torch.fx.Node) -> Any:
        """tanh(x) * tanh(x) is no such site; softsign is spelled with a halved argument here."""
        operands = view.operands(node, "mul")
        if operands is None or operands[0] is not operands[1] or view.call(operands[0], "tanh") is None:
            return None
        return extension.Refusal(KIND, node, "a square of tanh", "none")

    monkeypatch.setattr(passes, "FAMILIES", passes.FAMILIES)
    infuse.register_pattern(KIND, match=match, anchors=("mul",))
    captured = capture(lambda x: torch.tanh(x) * torch.tanh(x), torch.randn(4, 8))
    assert captured.refusals == []

    def square(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return y * y

    assert capture(square, torch.randn(4, 8)).refusals == ["a square of tanh"]


def test_the_example_runs() -> None:
    environment = {**os.environ, "COLUMNS": "200", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "softsign_gate.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "softsign_gate 1" in done.stdout and "kernels are always taken" in done.stdout and "verified" in done.stdout
