"""A dozen small models of the zoo: each site is fused or refused with a reason, none is invented, results are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import coverage_rows
import pytest
import tables
import torch
from census.counting import counts, find
from census.trace import record
from coverage_misses import report
from coverage_rows import CoverageRow
from coverage_run import Configuration, Result, measure, prepared
from torch import Tensor, nn
from zoo import entries
from zoo.entry import Entry

from infuse import backend
from infuse.report import SiteRecord

FILES = (
    *("attention_spellings", "attention_heads", "attention_layouts", "attention_of_torch", "blocks"),
    *("norm_spellings", "gate_spellings", "rope_spellings"),
    *("image_models", "image_generators", "language_models", "language_encoders"),
    *("published_language", "published_other_fields", "speech_and_science", "sequence_mixers"),
    *("unusual_norms", "unusual_gates", "unusual_rotations", "unusual_scores"),
)
CHOSEN = (
    "attention/scores-times-scale",
    "attention/mask-after-scale",
    "attention/softmax-in-float",
    "attention/call-with-bool-mask",
    "attention/latent",
    "attention/packed",
    "norm/hugging-face",
    "norm/residual-twice",
    "norm/layer",
    "gate/silu",
    "gate/chunked",
    "block/llama-like",
    "block/vision-block",
    "block/interrupted",
    "block/checkpointed",
)
CASES = [
    *((name, Configuration()) for name in CHOSEN),
    *((name, Configuration(training=True, dtype=torch.bfloat16)) for name in CHOSEN),
    *((name, Configuration(training=True, dynamic=True)) for name in ("attention/packed", "block/llama-like")),
]


def zoo() -> dict[str, Entry]:
    return {entry.name: entry for file in FILES for entry in entries(file)}


ZOO = zoo()


def checked(entry: Entry, configuration: Configuration) -> Result:
    """Measures, and asserts what has to hold of any model."""
    result = measure(entry, configuration)
    assert result.row.error == ""
    assert result.row.over == {}
    assert result.row.accurate is not False
    return result


@pytest.mark.parametrize(("name", "configuration"), CASES)
def test_every_site_is_fused(name: str, configuration: Configuration) -> None:
    row = checked(ZOO[name], configuration).row
    assert row.in_graph == row.true
    assert row.fused == row.true
    assert row.missed() == {}


@pytest.mark.parametrize("name", [name for name in ZOO if not ZOO[name].counts])
def test_nothing_is_fused_where_there_is_nothing(name: str) -> None:
    row = checked(ZOO[name], Configuration(training=True)).row
    assert row.true == {}
    assert row.fused == {}


def test_a_refusal_has_its_reason() -> None:
    row = checked(ZOO["attention/returns-weights"], Configuration()).row
    assert row.refused == {"attention": 1}
    assert row.missed() == {}
    assert [reason for reason in row.reasons if reason.startswith("attention: ")]


def test_names_are_unique() -> None:
    assert len(ZOO) == sum(1 for file in FILES for _ in entries(file))


def test_what_a_model_raises_is_a_row() -> None:
    def fails() -> nn.Module:
        raise ValueError("no such size")

    row = measure(Entry("broken", fails, lambda: ((), {})), Configuration()).row
    assert row.error.startswith("ValueError: no such size")


# The measurement itself: with a pass that is wrong in a known way, it must say so.


@pytest.fixture
def block() -> Entry:
    return ZOO["block/llama-like"]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SiteRecord]]:
    """Records that are added to those of every pass, and a graph whose first product is doubled if there are any."""
    extra: list[SiteRecord] = []
    original = backend.InfusePass.__call__

    def call(self: backend.InfusePass, graph: torch.fx.Graph) -> None:
        original(self, graph)
        for listener in tuple(backend._listeners):
            listener(extra)
        if extra:
            node = next(node for node in graph.nodes if node.target is torch._C._nn.linear)
            with graph.inserting_after(node):
                doubled = graph.call_function(torch.mul, (node, 2))
            node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)

    monkeypatch.setattr(backend.InfusePass, "__call__", call)
    yield extra


def test_a_rewrite_too_many_is_counted(block: Entry, patched: list[SiteRecord]) -> None:
    patched.append(SiteRecord("swiglu", "rewritten", "mul"))
    assert measure(block, Configuration()).row.over == {"swiglu": 1}


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_result_is_noticed(block: Entry, patched: list[SiteRecord], training: bool) -> None:
    assert measure(block, Configuration(training)).row.accurate is True
    patched.append(SiteRecord("swiglu", "refused", "mul"))
    assert measure(block, Configuration(training)).row.accurate is False


def test_what_nobody_rewrote_is_missed(block: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_PATTERNS", "attention")
    result = measure(block, Configuration())
    assert result.row.missed() == {"rms_norm": 2, "swiglu": 1}
    text = report("swiglu", [result])
    assert "no refusal: MISSED" in text
    assert "self.w1(y)" in text


def test_sites_outside_of_graphs_are_told_apart() -> None:
    class Uncompiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)

        @torch._dynamo.disable
        def outside(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm2(x)
            return y

        def forward(self, x: Tensor) -> Tensor:
            return self.outside(self.norm1(x)) + 1

    row = measure(Entry("uncompiled", Uncompiled, lambda: ((torch.randn(2, 8),), {})), Configuration()).row
    assert row.true == {"layer_norm": 2}
    assert row.in_graph == {"layer_norm": 1}
    assert row.fused == {"layer_norm": 1}


def test_weights_are_no_longer_trivial() -> None:
    module, _, _ = prepared(ZOO["norm/layer"], Configuration())
    for parameter in module.parameters():
        assert not (parameter == 0).all() and not (parameter == 1).all()


# Rows


ROW = CoverageRow(
    "run-1", "zoo/a", True, "bfloat16", False, {"rope": 4}, {"rope": 3}, {"rope": 1}, {"rope": 1}, graphs=2, gpu="cpu"
)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "coverage.jsonl"
    coverage_rows.append(path, [ROW])
    coverage_rows.append(path, [dataclasses.replace(ROW, model="zoo/b", in_graph=ROW.true)])
    assert "in_graph" not in path.read_text().splitlines()[1]
    assert coverage_rows.load(path)[1].in_graph == ROW.true
    assert [row.model for row in coverage_rows.load(path)] == ["zoo/a", "zoo/b"]
    assert coverage_rows.load(path)[0] == ROW
    outside = dataclasses.replace(ROW, in_graph={}, fused={})
    coverage_rows.append(path, [outside])
    assert coverage_rows.load(path)[-1] == outside
    path.write_text('{"run_id": "run-1", "speed": 1}\n')
    with pytest.raises(ValueError, match=r"coverage.jsonl:1: .*unknown fields \['speed'\]"):
        coverage_rows.load(path)


def test_a_row_knows_what_was_missed() -> None:
    assert ROW.missed() == {"rope": 1}
    assert ROW.configuration == "training bf16 static"


def test_readme_gets_one_line_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "coverage.jsonl"
    older = dataclasses.replace(ROW, run_id="run-0", fused={})
    coverage_rows.append(path, [older, ROW, dataclasses.replace(ROW, training=False)])
    text = tables.update("<!-- results:coverage -->\n<!-- /results -->\n", tmp_path)
    assert "| training bf16 static | 1 |  |  |  |  | 33.3% (1/3) | 33.3% (1/3) | 1 | 1 | 0 |" in text
    assert "| inference bf16 static | 1 |" in text


# The counter against people: what authors declared of their models is what the record of a run says.

# What the counter does not see: RMSNorms that it takes for divisions by a length, and arithmetic in disguise.
DISGUISED = (
    *("norm/euclidean-length", "norm/normalize-times-root", "language/flexible-block"),
    *("unusual/root-weight-and-root-of-width", "unusual/by-vector-norm", "unusual/einsum-of-squares"),
    *("unusual/glu-of-swapped-halves", "unusual/signs-and-rolled", "unusual/highway"),
    *("unusual/exclusive-exponentials", "unusual/inner-product-by-sum"),
)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in DISGUISED])
def test_declared_counts_are_counted(name: str) -> None:
    module, args, kwargs = prepared(ZOO[name], Configuration())
    assert counts(find(record(module, *args, **kwargs))) == ZOO[name].counts
