"""The second stage: proposals that the lowering takes or declines, and what becomes of their parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.patterns import passes
from infuse.patterns.compose import Rule, needed
from infuse.patterns.emit import Emitter
from infuse.patterns.sites import Refusal, Site
from infuse.report import Placement
from infuse.settings import Settings
from tests.patterns.capture import assert_same_results, capture, default_overload


def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (8,), eps=1e-6), total


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 8), torch.randn(3, 8)


def declining(kind: str) -> Callable[[str, tuple[object, ...], bool], Placement]:
    def place(asked: str, examples: tuple[object, ...], training: bool) -> Placement:
        if asked == kind:
            return Placement("", "", declined="no kernel for it")
        return default_overload(asked, examples, training)

    return place


def test_declined_site_leaves_its_place_to_its_parts() -> None:
    captured = capture(block, *inputs(), place=declining("add_rms_norm"))
    assert captured.counts == {"rms_norm": 1}
    assert [record.kind for record in captured.records] == ["rms_norm"]
    assert captured.notes == ["add_rms_norm: left to its parts (no kernel for it)"]
    assert_same_results(captured)


def test_accepted_site_replaces_its_parts() -> None:
    captured = capture(block, *inputs())
    assert captured.counts == {"add_rms_norm": 1}
    assert captured.notes == []


def test_parts_take_over_where_the_site_cannot_be_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    emit = Emitter.emit

    def failing(self: Emitter, site: Site, *others: object) -> Refusal | None:
        if site.kind == "add_rms_norm":
            return Refusal(site.kind, site.outputs[0], "a gap", "report it")
        return emit(self, site, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Emitter, "emit", failing)
    captured = capture(block, *inputs())
    assert captured.counts == {"rms_norm": 1}
    assert captured.refusals == []
    unwanted = capture(block, *inputs(), settings=Settings(patterns=("add_rms_norm",)))
    assert (unwanted.counts, unwanted.refusals) == ({}, ["a gap"])


def test_value_is_an_output_of_one_site() -> None:
    def two_norms(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (8,), eps=1e-6), F.rms_norm(total, (8,), eps=1e-5)

    captured = capture(two_norms, *inputs())
    assert captured.counts == {"add_rms_norm": 1, "rms_norm": 1}
    assert_same_results(captured)


def test_rule_sees_what_earlier_rules_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    watching = Rule("swiglu", (), lambda view, sites: seen.append([site.kind for site in sites]) or iter(()))  # type: ignore[func-returns-value]
    monkeypatch.setattr(passes, "RULES", (watching, *passes.RULES, watching))
    capture(block, *inputs())
    assert seen == [["rms_norm"], ["add_rms_norm"]]


def test_rules_ask_for_the_sites_that_they_need() -> None:
    assert needed(passes.RULES, ["add_rms_norm"]) == {"add_rms_norm", "rms_norm"}
    assert needed(passes.RULES, ["swiglu"]) == {"swiglu"}
