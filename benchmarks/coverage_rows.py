"""Coverage as data: one row for each model and configuration, append only, and what is made of the rows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from census.counting import KINDS

# What the sites of a report stand for, in the kinds of the true counts.
MEANS: Mapping[str, Mapping[str, int]] = {
    "attention": {"attention": 1},
    "rms_norm": {"rms_norm": 1},
    "add_rms_norm": {"rms_norm": 1},
    "layer_norm": {"layer_norm": 1},
    "add_layer_norm": {"layer_norm": 1},
    "gated_rms_norm": {"rms_norm": 1, "swiglu": 1},
    "swiglu": {"swiglu": 1},
    "rope": {"rope": 1},
    # Sites of the second stage, where there are kernels for them.
    "qk_norm_rope": {"rms_norm": 1, "rope": 1},
    "rope_cache_write": {"rope": 2},  # the norms that it may take in are not counted
    "norm_linear": {"rms_norm": 1},
    "packed_linear": {},
    "linear_cross_entropy": {},
    "linear_swiglu": {"swiglu": 1},
    "norm_linear_swiglu": {"rms_norm": 1, "swiglu": 1},
    "linear_add": {},
    "gated_mlp": {"swiglu": 1},
    "grouped_linear_swiglu": {"swiglu": 1},
}


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One model in one configuration. Counts are by kind; kinds with none are left out.

    true: sites that an eager run executes. in_graph: those of them that are in graphs which torch.compile captured.
    fused, refused: what Infuse made of them. over: rewrites beyond the true count. output_error, grad_error: of the
    rewritten graphs against float64, eager_*: of the unchanged model; None where it was not compared. accurate: whether
    the errors are of one size. reasons: of the refusals, with how many sites. error: what went wrong, "" if nothing.
    """

    run_id: str
    model: str
    training: bool
    dtype: str
    dynamic: bool
    true: dict[str, int] = field(default_factory=dict)
    in_graph: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    over: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    output_error: float | None = None
    eager_output_error: float | None = None
    grad_error: float | None = None
    eager_grad_error: float | None = None
    accurate: bool | None = None
    error: str = ""
    gpu: str = ""
    torch: str = ""
    commit: str = ""

    @property
    def configuration(self) -> str:
        """ "inference fp32 static" and the like."""
        dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(self.dtype, self.dtype)
        return " ".join(("training" if self.training else "inference", dtype, "dynamic" if self.dynamic else "static"))

    def missed(self) -> dict[str, int]:
        """Sites in captured graphs that were neither rewritten nor refused."""
        left = {
            kind: self.in_graph.get(kind, 0) - self.fused.get(kind, 0) - self.refused.get(kind, 0) for kind in KINDS
        }
        return {kind: number for kind, number in left.items() if number > 0}

    def to_json(self) -> str:
        """The row as one line, without what is empty; in_graph only where it isn't all of true."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value not in ({}, None, "")}
        values["in_graph"] = self.in_graph
        if self.in_graph == self.true:
            del values["in_graph"]
        errors = {key: float(f"{value:.2e}") for key, value in values.items() if isinstance(value, float)}
        return json.dumps(values | errors)

    @classmethod
    def from_json(cls, line: str) -> CoverageRow:
        """Raises ValueError for a field that is unknown or missing."""
        values: dict[str, Any] = json.loads(line)
        unknown = set(values) - {item.name for item in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"CoverageRow: unknown fields {sorted(unknown)}")
        values.setdefault("in_graph", dict(values.get("true", {})))
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"CoverageRow: {error}") from error


def append(path: Path, rows: Iterable[CoverageRow]) -> None:
    """Adds rows at the end of a file and makes it if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def load(path: Path) -> list[CoverageRow]:
    """All rows of a file. Raises ValueError, with the line's number, for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(CoverageRow.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return rows


def totals(rows: Iterable[CoverageRow]) -> dict[str, Counter[str]]:
    """Sums over rows by kind, under "true", "in_graph", "fused", "refused", "over" and "missed"."""
    names = ("true", "in_graph", "fused", "refused", "over")
    result: dict[str, Counter[str]] = {name: Counter() for name in (*names, "missed")}
    for row in rows:
        for name in names:
            result[name].update(getattr(row, name))
        result["missed"].update(row.missed())
    return result


def fraction(fused: int, sites: int) -> str:
    """ "97.1% (333/343)", "" without sites."""
    return f"{100 * fused / sites:.1f}% ({fused}/{sites})" if sites else ""


def table(rows: list[CoverageRow]) -> str:
    """The README's table, of the newest run of each configuration: one line a configuration, one column a kind."""
    head = "| configuration | models | " + " | ".join(KINDS) + " | all | refused | missed | beyond |"
    lines = [head, "|---|---:|" + "---:|" * (len(KINDS) + 4)]
    for configuration in dict.fromkeys(row.configuration for row in rows):
        chosen = [row for row in rows if row.configuration == configuration]
        chosen = [row for row in chosen if row.run_id == chosen[-1].run_id]
        total = totals(chosen)
        cells = [fraction(total["fused"][kind], total["in_graph"][kind]) for kind in KINDS]
        every = [sum(total[name].values()) for name in ("fused", "in_graph", "refused", "missed", "over")]
        lines.append(
            f"| {configuration} | {len(chosen)} | "
            + " | ".join([*cells, fraction(every[0], every[1]), *(str(number) for number in every[2:])])
            + " |"
        )
    return "\n".join(lines) + "\n"
