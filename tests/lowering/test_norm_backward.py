"""Training: the norms' backward as one operator, the forward as its formula, and what is saved between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import infuse
from infuse.lowering import decisions, profit
from infuse.lowering.heuristics import norm_backward as heuristics
from infuse.lowering.policy import place
from infuse.ops import library
from infuse.ops.gated_rms_norm import gated_rms_norm_bwd_ref
from infuse.ops.layer_norm import layer_norm_bwd_ref
from infuse.ops.rms_norm import rms_norm_bwd_ref
from infuse.settings import Settings

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Call:
    """Of a kernel. terms: of dy. in_place: dx takes the place of a term."""

    dsum: bool = False
    terms: int = 1
    in_place: bool = False
    config: int = -1
    gated: bool = False


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """The kernels, implemented on the CPU; the list of their calls."""
    calls: list[Call] = []

    def run(dy, dsum, x, weight, bias, mean, rstd, weight_offset, config, dy_1=None, dy_2=None, minimum=0.0):  # type: ignore[no-untyped-def]
        dys = [term for term in (dy, dy_1, dy_2) if term is not None]
        calls.append(Call(dsum is not None, len(dys), config=config))
        assert rstd.is_contiguous() and (mean is None or mean.is_contiguous())  # what the kernels insist on
        dy = sum(dys[1:], dys[0])
        if mean is None:
            dx, dweight = rms_norm_bwd_ref(dy, x, weight, rstd, weight_offset, False, minimum or None)
            dbias = x.new_empty(0)
        else:
            dx, dweight, dbias = layer_norm_bwd_ref(dy, x, weight, bias, mean, rstd, weight_offset, False)
        return (dx if dsum is None else dx + dsum), dweight, dbias

    def run_into(out, *arguments, **names):  # type: ignore[no-untyped-def]
        dx, dweight, dbias = run(*arguments, **names)
        calls[-1] = replace(calls[-1], in_place=True)
        out.copy_(dx)
        return dweight, dbias

    def run_gated(dy, x, gate, weight, rstd, gate_first, gate_is_silu, config, dy_1=None, dy_2=None):  # type: ignore[no-untyped-def]
        dys = [term for term in (dy, dy_1, dy_2) if term is not None]
        calls.append(Call(terms=len(dys), config=config, gated=True))
        assert rstd.is_contiguous()
        flags = (not gate_first, "silu" if gate_is_silu else "sigmoid", 1, False, False)
        return gated_rms_norm_bwd_ref(sum(dys[1:], dys[0]), x, gate, weight, rstd, *flags)

    implementation = torch.library.Library("infuse", "IMPL")
    implementation.impl("norm_backward", run, "CPU")
    implementation.impl("norm_backward_into", run_into, "CPU")
    implementation.impl("gated_norm_backward", run_gated, "CPU")
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "configurations", lambda op: ("wide", "narrow"))
    decisions.clear()
    yield calls
    implementation._destroy()


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def residual_layers(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Three norms. Stock computes the second one's input again, from an activation, so it keeps its formula."""
    y = llama_norm(x, weight)
    x = x + F.silu(y @ first)
    y = llama_norm(x, weight)
    x = x + F.silu(y @ second) @ first
    return llama_norm(x, weight)


def layer_norms(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], weight, weight, EPS)
    x = x + F.gelu(y @ first) @ second
    return F.layer_norm(x, x.shape[-1:], weight, None, EPS)


def two_results(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A sum that goes on beside its norm."""
    x = x + x @ first
    return x + llama_norm(x, weight) @ second


def two_projections(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The gradient of the norm's result is a sum of two products, that of its input a sum with the residual's."""
    y = llama_norm(x, weight)
    return x @ second + F.silu(y @ first) * (y @ second)


def three_projections(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    y = llama_norm(x, weight)
    return x + (y @ first) * (y @ second) * (y @ second.t())


def three_projections_of_tokens(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Without a batch: Inductor adds to a product in the product's call, unless what reads the sum is pointwise."""
    return three_projections(x.flatten(0, 1), weight, first, second)


def sequences_in_front(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows that do not lie in the order of their numbers."""
    heads = (x @ first).unflatten(-1, (2, 16)).transpose(0, 1)
    scale, shift = weight[:16].contiguous(), weight[16:].contiguous()
    return F.layer_norm(heads, heads.shape[-1:], scale, shift, EPS).flatten(2) @ second


def gated(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    wide = x.float()
    h = wide * F.silu((x @ second).float())
    return (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype) @ first


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(4, 24, 32), torch.rand(32) + 0.5, torch.randn(32, 32) / 6, torch.randn(32, 32) / 6]
    return [tensor.requires_grad_() for tensor in tensors]


def train(function: Callable[..., Tensor], args: list[Tensor], **options: Any) -> tuple[list[Tensor], int]:
    """The gradients, and the bytes that are saved for the backward beside the arguments."""
    torch._dynamo.reset()
    own = {tensor.untyped_storage().data_ptr() for tensor in args}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    wanted = [tensor for tensor in args if tensor.requires_grad]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = torch.compile(function, **options)(*args)
    return list(torch.autograd.grad(out.square().sum(), wanted)), sum(saved.values())


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function, calls",
    [
        (residual_layers, [Call(), Call(in_place=True)]),
        (layer_norms, [Call(), Call(dsum=True, in_place=True)]),
        (two_results, [Call(dsum=True, in_place=True)]),
        (two_projections, [Call(dsum=True, terms=2, in_place=True)]),
        (three_projections, [Call(dsum=True, terms=3, in_place=True)]),
        (three_projections_of_tokens, [Call(dsum=True, terms=3, in_place=True)]),
        (sequences_in_front, [Call(in_place=True)]),
        (gated, [Call(gated=True)]),
    ],
)
def test_kernels_take_the_backward_and_nothing_more_is_saved(
    kernel_calls: list[Call], function: Callable[..., Tensor], calls: list[Call], dynamic: bool
) -> None:
    theirs, stock_bytes = train(function, inputs(), dynamic=dynamic)
    assert kernel_calls == []
    with infuse.override(kernels="always"):
        mine, bytes_saved = train(function, inputs(), backend="infuse", dynamic=dynamic)
    assert_same(mine, theirs)
    assert bytes_saved <= stock_bytes
    assert sorted(kernel_calls, key=str) == sorted(calls, key=str)


@pytest.mark.parametrize("cast_back", [True, False])
def test_a_gradient_in_fp32_is_taken_where_it_was_cast_from_the_dtype_of_x(
    kernel_calls: list[Call], cast_back: bool
) -> None:
    def function(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y = llama_norm(x, weight)  # in fp32, as its weight
        return y.to(x.dtype) @ first if cast_back else y @ first.float()

    args = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs()]
    args[1] = args[1].detach().float().requires_grad_()
    used = lambda: [*args[:3], args[3].detach()]  # noqa: E731
    theirs, _ = train(function, used())
    with infuse.override(kernels="always"):
        mine, _ = train(function, used(), backend="infuse")
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert kernel_calls == ([Call(in_place=True)] if cast_back else [])


def test_rounding_between_additions_is_kept_where_it_must_be(kernel_calls: list[Call]) -> None:
    with infuse.override(kernels="always", numerics="exact"):
        train(three_projections, inputs(), backend="infuse")
    assert kernel_calls == [Call()]


def test_the_forward_is_its_formula(kernel_calls: list[Call]) -> None:
    args = inputs()
    with infuse.override(kernels="always"):
        _, codes = run_and_get_code(lambda: train(residual_layers, args, backend="infuse"))
    forward, backward = codes
    assert "torch.ops.infuse" not in forward
    assert backward.count("torch.ops.infuse.norm_backward") == 2


@pytest.mark.parametrize("winner", ["kernel_1", "decomposition"])
def test_max_autotune_measures_and_takes_the_winner(
    kernel_calls: list[Call], monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    timed: list[set[str]] = []

    def choose(timings: dict[str, float], *rest: Any) -> tuple[str, dict[str, float]]:
        timed.append(set(timings))
        return winner, {}

    monkeypatch.setattr(profit, "choose", choose)
    theirs, _ = train(residual_layers, inputs())
    options = {"max_autotune_pointwise": True}
    mine, _ = train(residual_layers, inputs(), backend="infuse", options=options)
    assert_same(mine, theirs)
    assert timed and all(labels == {"decomposition", "kernel_-1", "kernel_0", "kernel_1"} for labels in timed)
    assert {decision.chosen for decision in decisions.decisions()} == {winner}
    if winner == "kernel_1":
        assert kernel_calls[-1].config == 1


def test_gradients_that_nobody_needs_are_left_to_the_formula(kernel_calls: list[Call]) -> None:
    args = inputs()
    args[1].requires_grad_(False)
    theirs, _ = train(residual_layers, args)
    with infuse.override(kernels="always"):
        mine, _ = train(residual_layers, args, backend="infuse")
    assert_same(mine, theirs)
    assert kernel_calls == []
    assert {decision.why for decision in decisions.decisions()} == {"not every gradient is needed"}


def test_without_kernels_the_code_is_that_of_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, stock_bytes = train(residual_layers, inputs())
    mine, bytes_saved = train(residual_layers, inputs(), backend="infuse")
    assert_same(mine, theirs)
    assert bytes_saved == stock_bytes


def placed(kind: str, *args: object, max_autotune: bool = False, **settings: Any) -> tuple[str, str]:
    found = place(kind, args, True, settings=Settings(**settings), max_autotune=max_autotune)
    return found.overload, found.kernel


def test_the_policy_keeps_a_trained_norm_whole_where_its_backward_may_run(
    kernel_calls: list[Call],
) -> None:
    x, weight = torch.randn(4, 32, dtype=torch.bfloat16), torch.rand(32, dtype=torch.bfloat16)
    plain = (x, weight, EPS, 0.0, False, False)
    assert placed("rms_norm", *plain, kernels="always") == ("default", "decomposition; backward by kernel")
    assert placed("rms_norm", *plain, max_autotune=True)[0] == "default"
    assert placed("rms_norm", *plain) == ("inline", "decomposition (Inductor's backward is as fast)")
    assert placed("rms_norm", *plain, kernels="never")[0] == "inline"
    assert placed("add_layer_norm", x, x.t().contiguous().t(), weight, None, EPS, 0.0, True, kernels="always")[0] == (
        "default"
    )
    refused = {
        "no backward kernel for x in torch.float64": ("layer_norm", x.double(), None, None, EPS, 0.0, False),
        "no backward kernel for 4 groups": ("gated_rms_norm", x, x, weight, EPS, True, "silu", 4),
        "no backward kernel for a last dimension of dy with stride 4": (
            *("layer_norm", x.t().contiguous().t(), weight, weight, EPS, 0.0, False),
        ),
    }
    for reason, arguments in refused.items():
        assert placed(*arguments, kernels="always") == ("inline", f"decomposition ({reason})")  # type: ignore[arg-type]


def test_without_a_library_the_policy_says_why() -> None:
    x = torch.randn(4, 32)
    assert placed("rms_norm", x, None, EPS, 0.0, False, False) == ("inline", "decomposition (no kernel for cpu)")


def test_the_heuristic_knows_only_what_was_measured() -> None:
    problem = heuristics.Problem(16384, 4096, 2, tensors=3, centered=False)
    assert heuristics.runs_well(problem, (9, 0))
    assert not heuristics.runs_well(problem, (8, 6))
    for rows, row_size, itemsize in ((16384, 1 << 18, 2), (16384, 4096, 4), (64, 4096, 2)):
        assert not heuristics.runs_well(heuristics.Problem(rows, row_size, itemsize, 3, False), (9, 0))
    assert heuristics.expected_times(problem, (8, 6)) == {"decomposition": 3, "kernel_-1": 3}
    assert heuristics.configurations(2) == (-1, 0, 1)
