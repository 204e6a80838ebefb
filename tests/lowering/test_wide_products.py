"""Products that a graph widens to float32 and returns: made in float32, and left alone in every other case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from infuse.lowering import decisions, inductor
from infuse.lowering.heuristics import linears as heuristics
from infuse.lowering.wide_products import KIND, widen_products
from infuse.ops import library
from infuse.settings import Settings
from tests.lowering.compiled import compiled_code

MM, WIDE = torch.ops.aten.mm.default, torch.ops.aten.mm.dtype
ROWS, DIM = 1024, 64
VOCAB = heuristics.FEWEST_WIDE_RESULTS // ROWS


@pytest.fixture(autouse=True)
def measured_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "missing", lambda device: "" if device.type == "cuda" else "no kernel")
    monkeypatch.setattr(library, "capability", lambda device: (9, 0) if device.type == "cuda" else (0, 0))
    decisions.clear()
    yield


def rewritten(
    function: Callable[..., Any], vocab: int = VOCAB, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> GraphModule:
    """The graph behind autograd of function(x [1, ROWS, DIM], weight [vocab, DIM]), after the rewrite."""
    with FakeTensorMode():
        x = torch.empty(1, ROWS, DIM, device=device, dtype=dtype)
        weight = torch.empty(vocab, DIM, device=device, dtype=dtype)
        traced: GraphModule = make_fx(function, decomposition_table=select_decomp_table())(x, weight)
    traced.graph.eliminate_dead_code()
    widen_products(traced.graph)
    traced.graph.lint()
    return traced


def counts(traced: GraphModule) -> tuple[int, int]:
    """Narrow products, wide ones."""
    targets = [node.target for node in traced.graph.nodes]
    return targets.count(MM), targets.count(WIDE)


def test_returned_logits_are_made_in_float32() -> None:
    traced = rewritten(lambda x, weight: F.linear(x, weight).float())
    assert counts(traced) == (0, 1)
    (result,) = traced.graph.output_node().args
    assert isinstance(result, torch.fx.Node)
    assert result.meta["val"].shape == (1, ROWS, VOCAB) and result.meta["val"].dtype == torch.float32
    assert not traced.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
    (decision,) = decisions.decisions()
    assert (decision.op, decision.problem) == (KIND, f"{ROWS}x{VOCAB} torch.bfloat16")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: torch.logsumexp(F.linear(x, weight).float(), -1),  # fused with the widening
        lambda x, weight: (lambda y: (y.float(), y))(F.linear(x, weight)),  # the narrow one is a result, too
        lambda x, weight: F.linear(x, weight).narrow(2, 0, DIM).float(),  # of some columns only
        lambda x, weight: F.linear(x, weight).double(),
        lambda x, weight: (F.linear(x, weight) * 2).float(),
        lambda x, weight: F.linear(x, weight, weight.select(1, 0)).float(),
        lambda x, weight: F.linear(x, weight),
        lambda x, weight: x.float(),
    ],
    ids=["loss", "narrow result", "some columns", "double", "scaled", "bias", "narrow", "input"],
)
def test_other_products_stay(function: Callable[..., Any]) -> None:
    assert counts(rewritten(function))[1] == 0


def norm_linear(x: Tensor, *weights: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    found: list[Tensor] = torch.ops.infuse.norm_linear(x, residual, weights, [None] * len(weights), None, 1e-6, 1.0)
    return found


def in_float32(traced: GraphModule) -> bool:
    (node,) = traced.graph.find_nodes(op="call_function", target=torch.ops.infuse.norm_linear.default)
    return node.args[6:] == (1.0, False, False, True)


@pytest.mark.parametrize("settings", [Settings(), Settings(numerics="exact"), Settings(kernels="never")])
def test_a_linear_behind_a_norm_makes_them_as_they_were_rounded(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "settings_in_effect", lambda: settings)
    traced = rewritten(lambda x, weight: norm_linear(x, weight, residual=x)[0].flatten(0, 1).float(), vocab=24)
    assert in_float32(traced)
    (result,) = traced.graph.output_node().args
    assert isinstance(result, torch.fx.Node)
    assert result.meta["val"].shape == (ROWS, 24) and result.meta["val"].dtype == torch.float32
    assert not traced.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: norm_linear(x, weight)[0].float().logsumexp(-1),  # fused with the widening
        lambda x, weight: (lambda y: (y.float(), y))(norm_linear(x, weight)[0]),  # the narrow one is a result, too
        lambda x, weight: (lambda y: (y.float(), y.flatten().float()))(norm_linear(x, weight)[0]),  # two tensors
        lambda x, weight: norm_linear(x, weight)[0].select(1, 3).float(),  # of some rows only
        lambda x, weight: norm_linear(x, weight, weight)[0].float(),  # one linear of two
        lambda x, weight: norm_linear(x, weight, residual=x)[1].float(),  # the sum
        lambda x, weight: norm_linear(x, weight)[0].double(),
    ],
    ids=["loss", "narrow result", "two results", "some rows", "two linears", "sum", "double"],
)
def test_other_linears_behind_a_norm_stay(function: Callable[..., Any]) -> None:
    assert not in_float32(rewritten(function, vocab=24))


@pytest.mark.parametrize("change", [{"vocab": VOCAB // 2}, {"dtype": torch.float32}, {"device": "cpu"}])
def test_unmeasured_problems_stay(change: dict[str, Any]) -> None:
    assert counts(rewritten(lambda x, weight: F.linear(x, weight).float(), **change))[1] == 0


@pytest.mark.parametrize("settings", [Settings(numerics="exact"), Settings(kernels="never")])
def test_settings_keep_the_rounding(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "settings_in_effect", lambda: settings)
    assert counts(rewritten(lambda x, weight: F.linear(x, weight).float())) == (1, 0)


@pytest.mark.gpu
def test_the_wide_product_is_closer_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "FEWEST_WIDE_RESULTS", 1)
    torch.manual_seed(0)
    x = torch.randn(2, 37, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(264, 128, device="cuda", dtype=torch.bfloat16)

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight).float()

    found, code = compiled_code(logits, x, weight)
    right = F.linear(x.double(), weight.double())
    assert "mm_dtype" in code and found.dtype == torch.float32
    # 128 products of bfloat16 are exact in float32, and are added up with at most 127 roundings.
    assert (found - right).abs().max() <= 128 * 2.0**-24 * F.linear(x.double().abs(), weight.double().abs()).max()
    assert (found - right).abs().max() < 0.1 * (logits(x, weight) - right).abs().max()
