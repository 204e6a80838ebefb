"""infuse.explain and infuse.testing: what they show, and that nothing is run for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import infuse
from infuse.inspection import rewritten_graphs
from tests.small_models import SITES, Block, HandWrittenNorm


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_site_is_listed_with_its_place(training: bool, dynamic: bool) -> None:
    report = infuse.explain(nn.Sequential(Block(), Block()), torch.randn(2, 6, 32), training=training, dynamic=dynamic)
    assert report.rewritten == {"rms_norm": 1, "add_rms_norm": 3, "attention": 2, "swiglu": 2}
    assert report.graphs == 1 and report.refused == {}
    assert any(site.module == "1" and site.kind == "attention" for site in report.sites)
    assert any(site.module == "0.norm1" and "small_models.py:" in site.source for site in report.sites)
    assert all(site.kernel and site.spelling for site in report.sites)


def test_nothing_is_computed_and_nothing_is_touched() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = HandWrittenNorm(16)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return self.norm(x)

    model, x = Counter(), torch.randn(2, 16)
    assert infuse.explain(model, x, training=False).rewritten == {"rms_norm": 1}
    assert model.training and float(model.steps) == 0 and model.norm.weight.grad is None


def test_a_model_too_large_to_run_can_be_explained() -> None:
    with torch.device("meta"):
        block = Block(8192)
    assert infuse.explain(block, torch.empty(64, 65536, 8192, device="meta")).rewritten == SITES


def test_explaining_leaves_the_recompilations_of_the_model_alone() -> None:
    block, x = Block(), torch.randn(1, 4, 32)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert infuse.explain(block, x).graphs == 1
    compiled: list[Any] = []

    def capture(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    torch.compile(block, backend=capture)(x)
    assert len(compiled) == 1


def test_graph_breaks_are_counted_and_both_sides_rewritten() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = HandWrittenNorm(16), HandWrittenNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    report = infuse.explain(Broken(), torch.randn(2, 16))
    assert report.graphs == 2 and report.rewritten == {"rms_norm": 2}


def half_statistics(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_refusal_has_a_reason_and_a_remedy_in_every_form() -> None:
    report = infuse.explain(half_statistics, torch.randn(2, 16, dtype=torch.bfloat16))
    assert report.refused == {"rms_norm": 1} and report.rewritten == {}
    (site,) = report.sites
    assert site.reason and site.remedy and site.source.startswith("tests/test_inspection.py:")
    assert site.reason in str(report) and site.remedy in str(report)
    assert json.loads(report.to_json())["sites"][0]["reason"] == site.reason


def test_the_report_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    infuse.explain(Block(), torch.randn(1, 4, 32)).print()
    out = capsys.readouterr().out
    assert "norm1" in out and "add_rms_norm" in out and "rewritten:" in out


def test_a_compiled_model_is_explained_as_the_model_it_is() -> None:
    compiled = torch.compile(Block(), backend="infuse")
    assert infuse.explain(compiled, torch.randn(1, 4, 32)).rewritten == SITES


def test_the_rewritten_graph_can_be_looked_at() -> None:
    (graph,) = rewritten_graphs(HandWrittenNorm(16), torch.randn(2, 16))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any(target.startswith("infuse.rms_norm") for target in targets)
    assert not any("rsqrt" in target for target in targets)


def test_assert_rewrites_passes_and_fails() -> None:
    x = torch.randn(1, 4, 32)
    assert infuse.testing.assert_rewrites(Block(), (x,), expect=SITES, refused={}).rewritten == SITES
    with pytest.raises(AssertionError, match=r"(?s)attention rewritten: got 1, expected 2.*swiglu rewritten: got 1, "):
        infuse.testing.assert_rewrites(Block(), (x,), expect={"rms_norm": 1, "add_rms_norm": 1, "attention": 2})
    with pytest.raises(AssertionError, match=r"(?s)rms_norm rewritten: got 0, expected 1.*statistics.*remedy: "):
        infuse.testing.assert_rewrites(half_statistics, (x.bfloat16(),), expect={"rms_norm": 1})


def test_assert_rewrites_counts_refusals_when_asked_to() -> None:
    x = torch.randn(1, 4, 32, dtype=torch.bfloat16)
    infuse.testing.assert_rewrites(half_statistics, (x,), expect={})
    infuse.testing.assert_rewrites(half_statistics, (x,), expect={}, refused={"rms_norm": 1}, training=True)
    with pytest.raises(AssertionError, match="rms_norm refused: got 1, expected 0"):
        infuse.testing.assert_rewrites(half_statistics, (x,), expect={}, refused={})


def test_wrong_options_are_refused_before_anything_is_traced() -> None:
    with pytest.raises(ValueError, match="mode: got 'fastest'"):
        infuse.explain(Block(), torch.randn(1, 4, 32), mode="fastest")
