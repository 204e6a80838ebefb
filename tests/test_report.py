"""Reports: what they count, and their forms for the terminal, for programs and for a pull request."""

from __future__ import annotations

import json

import pytest

from infuse.report import Report, SiteRecord, StrictError, raise_if_strict

NORM = SiteRecord("rms_norm", "rewritten", "mul", "layers.0.norm", "model.py:3", "hand-written", "decomposition")
GATE = SiteRecord("swiglu", "refused", "mul_1", "", "model.py:9", reason="a | b", remedy="use `|` less")
REPORT = Report((NORM, GATE), graphs=2, notes=("a remark",))


def test_json_comes_back_as_it_was() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT
    content = json.loads(REPORT.to_json())
    assert content["rewritten"] == {"rms_norm": 1} and content["refused"] == {"swiglu": 1}


def test_json_of_a_newer_version_is_read() -> None:
    content = json.loads(REPORT.to_json())
    content["sites"][0]["mood"] = "good"
    assert Report.from_json(json.dumps(content)) == REPORT


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sites": [{}], "graphs": 1, "notes": []}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="infuse: report: got"):
        Report.from_json(text)


def test_markdown_is_one_table_with_every_site() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert lines[0] == "| site | kind | became | written as / why it stayed |"
    assert lines[2] == "| layers.0.norm (model.py:3) | rms_norm | decomposition | hand-written |"
    assert lines[3] == r"| mul_1 (model.py:9) | swiglu | left as it is | a \| b; remedy: use `\|` less |"
    assert lines[-1] == REPORT.summary() and "a remark" in lines
    assert Report().to_markdown() == "rewritten: nothing; graphs: 0"


def test_strict_lists_every_refusal_and_every_missing_kernel() -> None:
    without = SiteRecord("rms_norm", "rewritten", "mul_2", "norm", "model.py:12", missing="nvcc was not found")
    with pytest.raises(StrictError) as raised:
        raise_if_strict([NORM, GATE, GATE, without])
    assert str(raised.value).splitlines() == [
        "infuse.strict: 2 sites were refused, expected none",
        "  swiglu at mul_1 (model.py:9): a | b; remedy: use `|` less",
        "  swiglu at mul_1 (model.py:9): a | b; remedy: use `|` less",
        "infuse.strict: 1 sites miss their kernel, expected none",
        "  rms_norm at norm (model.py:12): nvcc was not found",
    ]
    raise_if_strict([NORM])
