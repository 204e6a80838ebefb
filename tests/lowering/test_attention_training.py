"""Attention with gradients: both passes by kernels, by torch's operators or by the formula, chosen one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor

import infuse
from infuse.lowering import attention_training as lowering
from infuse.lowering import decisions, inductor, policy
from infuse.lowering.heuristics import attention as heuristics
from infuse.lowering.policy import place
from infuse.ops import attention_formulas
from infuse.settings import Settings
from tests.lowering.pretended_attention import backward_on_cpu, forward_on_cpu

OPS = torch.ops.infuse
SCALE = 8.0**-0.5


@pytest.fixture
def calls(implement_on_cpu: Callable[[str, Callable[..., Any]], None]) -> list[str]:
    """The kernels by their formulas; which ran."""
    found: list[str] = []

    def forward(*args: Any) -> None:
        found.append("forward" if args[-1] is not None else "forward without lse")
        forward_on_cpu(*args)

    def backward(*args: Any) -> None:
        found.append("deterministic backward" if args[14] else "backward")
        backward_on_cpu(*args)

    implement_on_cpu("attention_forward_out", forward)
    implement_on_cpu("attention_backward_out", backward)
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 4, 6, 8), (2, 2, 10, 8), (2, 2, 10, 8))
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return OPS.attention(q * 1, k * 1, v * 1, rest[0] if rest else None, SCALE, False, *rest[1:])  # type: ignore[no-any-return]


def train(function: Callable[..., Tensor], *args: Any, **options: Any) -> tuple[Tensor, ...]:
    """The result and the gradients of all arguments that have one."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="infuse", fullgraph=True, **options)
    torch.manual_seed(5)
    out = compiled(*args)
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    return (out, *torch.autograd.grad(out, wanted, torch.ones_like(out)))


def check(function: Callable[..., Tensor], *args: Any, kernels: str = "always", **options: Any) -> None:
    """As eager, whose operators compute by the formula."""
    with infuse.override(kernels=kernels):
        found = train(function, *args, **options)
    torch.manual_seed(5)
    out = function(*args)
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    for got, expected in zip(found, (out, *torch.autograd.grad(out, wanted, torch.ones_like(out)))):
        torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("masked_rows", "has_sinks"), [("zeros", False), ("zeros", True), ("nan", False)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_both_passes_run_in_kernels(calls: list[str], masked_rows: str, has_mask: bool, has_sinks: bool) -> None:
    mask = torch.rand(2, 1, 6, 10) < 0.7 if has_mask else None
    sinks = torch.randn(4, requires_grad=True) if has_sinks else None
    check(attend, *inputs(), mask, 1.5, sinks, masked_rows)
    assert calls == ["forward", "backward"]


def test_deterministic_algorithms_are_asked_for(calls: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        check(attend, *inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["forward", "deterministic backward"]


@torch._inductor.config.patch(fallback_random=True)  # eager's random numbers
def test_dropout_drops_the_same_in_both_passes(calls: list[str]) -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OPS.attention(q * 1, k, v, None, SCALE, False, 0.0, None, "zeros", 0.5)  # type: ignore[no-any-return]

    check(dropping, *inputs())
    assert calls == ["forward", "backward"]


def test_a_mask_with_a_gradient_is_the_formulas(calls: list[str]) -> None:
    bias = torch.randn(1, 4, 6, 10, requires_grad=True)
    check(attend, *inputs(), bias)
    assert calls == ["forward"]


def test_max_autotune_chooses_each_pass_by_itself(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[str, set[str]] = {}

    def measure(name: str, kernels: Any, formulas: Any, *rest: Any, **how: Any) -> dict[str, float]:
        timed[name] = {*kernels, *formulas}
        return {"kernel_0": 1.0, "kernel_1": 2.0 if "fwd" in name else 0.5, **dict.fromkeys(formulas, 1.5)}

    monkeypatch.setattr(inductor, "measure", measure)
    check(attend, *inputs(), kernels="auto", mode="max-autotune-no-cudagraphs")
    assert set(timed) == {"infuse_attention_fwd", "infuse_attention_bwd"}
    assert all({"kernel_-1", "kernel_0", "kernel_1"} <= labels for labels in timed.values())
    chosen = {decision.op: decision.chosen for decision in decisions.decisions() if "_wd" not in decision.op}
    assert chosen == {"attention_fwd": "kernel_0", "attention_bwd": "kernel_1"}
    assert calls == ["forward", "backward"]


def test_torchs_backward_follows_a_kernels_forward(
    calls: list[str], cudnn_calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering.backends, "_takers", lambda args: ["sdpa_cudnn"])
    monkeypatch.setattr(lowering.heuristics, "trains", lambda *described: True)
    monkeypatch.setattr(lowering.heuristics, "backward", lambda site: "sdpa_cudnn")
    check(attend, *inputs(), kernels="auto")
    assert calls == ["forward"] and len(cudnn_calls) == 1


def test_few_shared_heads_are_expanded(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before autograd, so that what stands in both graphs is torch's attention over K and V of each head."""
    monkeypatch.setattr(policy, "_kernels", lambda args, *checks: [*checks])
    monkeypatch.setattr(heuristics, "expands", lambda site, capability: site.k[1] == 2)
    monkeypatch.setattr(attention_formulas, "_native_groups", lambda q, mask: True)
    shared: list[bool] = []
    sdpa = F.scaled_dot_product_attention

    def attends(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        shared.append(k.shape[1] != q.shape[1] or bool(options.get("enable_gqa")))
        return sdpa(q, k, v, *rest, **options)

    def attend_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
        return torch.softmax(q @ k.transpose(2, 3) * SCALE, -1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attends)
    check(attend_grouped, *inputs(), kernels="auto")
    assert shared and not any(shared) and not calls


def test_without_a_kernel_the_formula_trains() -> None:
    decisions.clear()
    check(attend, *inputs(), torch.rand(2, 1, 6, 10) < 0.7, kernels="auto")
    assert [decision.chosen for decision in decisions.decisions()] == [lowering.FORMULA] * 2


def test_the_policy_wants_both_passes(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    bias = torch.zeros(6, 10, requires_grad=True)

    def form(*given: Any, max_autotune: bool = False, **settings: Any) -> str:
        args = (q, k, v, *given)
        return place("attention", args, True, settings=Settings(**settings), max_autotune=max_autotune).overload

    assert form(None, SCALE, False) == "inline"
    assert form(None, SCALE, False, max_autotune=True) == form(None, SCALE, False, kernels="always") == "default"
    assert form(None, SCALE, False, kernels="never") == form(bias, SCALE, False, kernels="always") == "inline"
    dropout = (None, SCALE, False, 0.0, None, "zeros", 0.1)
    assert form(*dropout, max_autotune=True) == "inline"
    assert form(*dropout, kernels="always") == "default"
    monkeypatch.setattr(lowering.heuristics, "expands", lambda *described: True)
    assert form(None, SCALE, False) == form(None, SCALE, False, max_autotune=True) == "expanded"
    assert form(None, SCALE, False, kernels="never") == "inline"
    assert form(None, SCALE, False, kernels="always") == "default"
    monkeypatch.setattr(lowering.heuristics, "trains", lambda *described: True)
    assert form(None, SCALE, False) == form(*dropout) == "default"
