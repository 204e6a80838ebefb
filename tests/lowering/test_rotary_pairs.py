"""Rotations of q and k: joined behind autograd where they share their angles, and then one call, or two formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import infuse
from infuse.backend import inductor_config
from infuse.lowering import decisions, profit
from infuse.lowering.heuristics import rope as heuristics
from infuse.lowering.post_grad_pass import PostGradPass
from infuse.ops import library
from infuse.ops.rope_pair import can_run, rope_pair_ref

OPS = torch.ops.infuse
NORM = (None, 1e-6, False, 0.0, True, False)  # bias, eps, centered, weight_offset, cast_before_weight, eps_as_minimum
FLAGS = (False, False, False, False)
CALL = "torch.ops.infuse.rope_pair.default("
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def pretended_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator computes its formula on the CPU, where the lowering then believes in a kernel that was measured."""
    monkeypatch.setattr(library, "missing", lambda device: "")
    monkeypatch.setattr(library, "configurations", lambda op: ("few", "many"))
    monkeypatch.setattr(heuristics, "is_measured", lambda problem: True)
    decisions.clear()
    yield
    torch._dynamo.reset()


def inputs() -> tuple[Tensor, ...]:
    """x [2, 5, 24], projections to 3 heads of 8, tables [5, 8], weight [8]."""
    torch.manual_seed(0)
    return (
        *(torch.randn(2, 5, 24), torch.randn(24, 24), torch.randn(24, 24)),
        *(torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)),
    )


def heads(x: Tensor, matrix: Tensor) -> Tensor:
    return (x @ matrix).unflatten(-1, (-1, 8))


def attention(q: Tensor, k: Tensor) -> Tensor:
    return q.flatten(2) @ k.flatten(2).transpose(-1, -2)


def normalised(x: Tensor, q_matrix: Tensor, k_matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """q is read, as a view, before k is made, and the tables are viewed twice."""
    q = OPS.qk_norm_rope(heads(x, q_matrix), cos[:, None], sin[:, None], weight, *NORM, *FLAGS).transpose(1, 2)
    k = OPS.qk_norm_rope(heads(x, k_matrix), cos[:, None], sin[:, None], weight, *NORM, *FLAGS)
    return attention(q.transpose(1, 2), k)


def rotated(x: Tensor, q_matrix: Tensor, k_matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    q, k = (OPS.rope(heads(x, matrix), cos[:, None], sin[:, None], True) for matrix in (q_matrix, k_matrix))
    return q.flatten(2) @ q_matrix + k.flatten(2) @ k_matrix


def compiled(function: Function, args: tuple[Tensor, ...], **options: Any) -> tuple[Any, str]:
    torch._dynamo.reset()
    with torch.no_grad():
        out, codes = run_and_get_code(torch.compile(function, backend="infuse", **options), *args)
    return out, codes[-1]


def test_the_norms_and_rotations_of_q_and_k_are_one_call() -> None:
    args = inputs()
    out, code = compiled(normalised, args)
    torch.testing.assert_close(out, normalised(*args), rtol=1e-4, atol=1e-4)
    assert code.count(CALL) == 1
    assert decisions.decisions()[-1].op == "rope_pair"
    assert decisions.decisions()[-1].problem == "30+30x8 torch.float32"


def test_the_gradients_of_both_are_one_call_too() -> None:
    args = inputs()
    x = args[0].requires_grad_()
    (expected,) = torch.autograd.grad(rotated(*args).pow(2).sum(), [x])
    with infuse.override(kernels="always"):
        function = torch.compile(rotated, backend="infuse")
        (got,), codes = run_and_get_code(lambda: torch.autograd.grad(function(*args).pow(2).sum(), [x]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [code.count(CALL) for code in codes[-2:]] == [1, 1]
    assert "True, False, False, False, True, -1)" in codes[-1]  # interleaved ..., is_backward


def test_the_gradients_of_norms_and_rotations_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Tensor, q_matrix: Tensor, k_matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        q, k = (
            OPS.qk_norm_rope(heads(x, matrix), cos[:, None], sin[:, None], weight, *NORM, *FLAGS)
            for matrix in (q_matrix, k_matrix)
        )
        return (q.flatten(2) @ q_matrix + k.flatten(2) @ k_matrix).pow(2).sum()

    monkeypatch.setattr(heuristics, "_MANY_ELEMENTS", 1)
    args = inputs()
    wanted = [arg.requires_grad_() for arg in (args[0], args[5])]
    expected = torch.autograd.grad(loss(*args), wanted)
    function = torch.compile(loss, backend="infuse")
    got, codes = run_and_get_code(lambda: torch.autograd.grad(function(*args), wanted))
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert codes[-2].count(CALL) == 1
    assert codes[-1].count("torch.ops.infuse.qk_norm_rope_pair_bwd.default(") == 1
    assert "torch.ops.infuse.qk_norm_rope_bwd." not in codes[-1]


@pytest.mark.parametrize("kept", [True, False])
def test_in_training_an_input_that_stock_computes_again_is_not_saved(kept: bool) -> None:
    def loss(x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        h = heads(x, matrix) if kept else heads(x, matrix).sigmoid()
        n = weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        turned = torch.cat((-n[..., 4:], n[..., :4]), -1)
        return ((n * cos[:, None] + turned * sin[:, None]).flatten(2) @ matrix).pow(2).sum()

    x, matrix, _, cos, sin, weight = inputs()
    cos, sin = (torch.cat((table[..., :4], table[..., :4]), -1) for table in (cos, sin))
    with infuse.override(kernels="always"):
        report = infuse.explain(loss, x.requires_grad_(), matrix, cos, sin, weight, training=True)
    assert report.larger == ({"qk_norm_rope": 1} if kept else {})
    assert report.rewritten == {"rms_norm": 1, "rope": 1}


@pytest.mark.parametrize("difference", ["tables", "flags", "order", "sizes"])
def test_rotations_that_differ_stay_apart(difference: str) -> None:
    def function(x: Tensor, q_matrix: Tensor, k_matrix: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        cos, sin = cos[:, None], sin[:, None]
        q = OPS.qk_norm_rope(heads(x, q_matrix), cos, sin, None if difference == "sizes" else weight, *NORM, *FLAGS)
        if difference == "order":
            x = x + q.flatten(2)
        k_sin = cos if difference == "tables" else sin
        flags = (True, *FLAGS[1:]) if difference == "flags" else FLAGS
        if difference == "sizes":
            wide = (x @ k_matrix).unflatten(-1, (2, 12))
            return q.flatten(2) @ OPS.qk_norm_rope(wide, cos, sin, None, *NORM, *FLAGS).flatten(2).transpose(-1, -2)
        return attention(q, OPS.qk_norm_rope(heads(x, k_matrix), cos, k_sin, weight, *NORM, *flags))

    args = inputs()
    out, code = compiled(function, args)
    torch.testing.assert_close(out, function(*args), rtol=1e-4, atol=1e-4)
    assert CALL not in code


def test_layers_that_share_their_angles_are_pairs_of_their_own() -> None:
    def function(x: Tensor, *rest: Tensor) -> Tensor:
        for _ in range(3):
            x = x + normalised(x, *rest) @ x
        return x

    args = inputs()
    out, code = compiled(function, args)
    torch.testing.assert_close(out, function(*args), rtol=1e-3, atol=1e-3)
    assert code.count(CALL) == 3


def test_neighbours_that_would_fuse_keep_both_formulas() -> None:
    def function(*args: Tensor) -> Tensor:
        x, q_matrix, k_matrix, cos, sin, weight = args
        q, k = (heads(x, matrix).exp() for matrix in (q_matrix, k_matrix))
        q, k = (OPS.qk_norm_rope(t, cos[:, None], sin[:, None], weight, *NORM, *FLAGS).sigmoid() for t in (q, k))
        return attention(q, k)

    args = inputs()
    out, code = compiled(function, args)
    torch.testing.assert_close(out, function(*args), rtol=1e-4, atol=1e-4)
    assert CALL not in code
    assert decisions.decisions()[-1].why == "fusing with the neighbours saves 8 passes"


@pytest.mark.parametrize("winner", ["kernel_1", "decomposition"])
def test_max_autotune_measures_the_pair(monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    timed: list[str] = []

    def choose(timings: dict[str, float], *rest: Any) -> tuple[str, dict[str, float]]:
        timed.extend(timings)
        return winner, {}

    monkeypatch.setattr(profit, "choose", choose)
    args = inputs()
    out, code = compiled(normalised, args, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, normalised(*args), rtol=1e-4, atol=1e-4)
    assert sorted(timed) == ["decomposition", "kernel_-1", "kernel_0", "kernel_1"]
    assert code.count(CALL) == (winner == "kernel_1")
    assert CALL not in code or "False, 1)" in code


def test_a_users_own_pass_runs_first_and_ours_once() -> None:
    seen: list[int] = []

    class Count(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(sum(node.target is OPS.qk_norm_rope.default for node in graph.nodes))

        def uuid(self) -> str:
            return "count"

    args = inputs()
    _, code = compiled(normalised, args, options={"post_grad_custom_pre_pass": Count()})
    assert seen == [2] and code.count(CALL) == 1
    config = inductor_config(None, inductor_config(None, {"post_grad_custom_pre_pass": Count()}))
    late = config["post_grad_custom_pre_pass"]
    assert isinstance(late, PostGradPass) and [type(found) for found in late.before] == [Count]
    assert "count" in late.uuid()
    assert PostGradPass("hash", (lambda graph: None,)).uuid() is None


def test_what_the_kernel_does_not_take() -> None:
    x, _, _, cos, sin, weight = inputs()
    q, numbers = x.unflatten(-1, (3, 8)).transpose(1, 2), (1e-6, 0.0, False, *FLAGS, False, -1)
    assert can_run(q, q, cos, sin, weight, weight, *numbers) == ""
    assert "rows of 8 and 6" in can_run(q, q[..., :6], cos[..., :4], sin[..., :4], None, None, None, *numbers[1:])
    assert "alone" in can_run(q, q, cos, sin, weight, None, *numbers)
    assert "different dtypes" in can_run(q, q, cos, sin, weight, weight.bfloat16(), *numbers)
    apart = q.repeat_interleave(2, dim=-1)[..., ::2]
    assert "stride 2" in can_run(q, apart, cos, sin, None, None, None, *numbers[1:])


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_operator_is_registered_as_torch_asks(eps: float | None) -> None:
    x, _, _, cos, sin, weight = inputs()
    q = x.unflatten(-1, (3, 8)).transpose(1, 2)
    given = weight if eps is not None else None
    args = (q, q[:, :1], cos, sin, given, given, eps, 0.0, False, *FLAGS, False, -1)
    torch.library.opcheck(OPS.rope_pair.default, args)
    for out, expected in zip(OPS.rope_pair(*args), rope_pair_ref(*args)):
        assert torch.equal(out, expected)
    assert OPS.rope_pair(*args)[0].stride() == q.stride()
