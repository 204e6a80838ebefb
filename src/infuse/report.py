"""What was done and why not: plain records, filled by the pass, printed as a table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field


class StrictError(RuntimeError):
    """Raised under `strict` when a site that looks fusable was refused."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What the lowering decides for one site before AOTAutograd sees it.

    overload: "default" keeps the operator up to the lowering, where kernels compete; "inline" gives AOTAutograd the
        plain formula; "parts" a formula of smaller operators, which are kept.
    kernel: what will run, in words.
    """

    overload: str
    kernel: str


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One fusable place of a model."""

    kind: str
    status: str  # "rewritten" | "refused"
    name: str  # name of the graph node that was replaced
    module: str = ""  # module path, "layers.0.attn"
    source: str = ""  # "model.py:123"
    spelling: str = ""  # how the author wrote it
    kernel: str = ""  # what runs there
    reason: str = ""  # why it was refused
    remedy: str = ""  # what would make it fusable


@dataclass(frozen=True, slots=True)
class Report:
    """The sites of a model over all its graphs.

    graphs: how many graphs torch.compile made of the model (one more than its graph breaks).
    """

    sites: tuple[SiteRecord, ...] = ()
    graphs: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def rewritten(self) -> dict[str, int]:
        """Number of rewritten sites by kind."""
        return dict(Counter(site.kind for site in self.sites if site.status == "rewritten"))

    @property
    def refused(self) -> dict[str, int]:
        """Number of refused sites by kind."""
        return dict(Counter(site.kind for site in self.sites if site.status == "refused"))

    def to_json(self) -> str:
        """The report as JSON: {"graphs", "notes", "rewritten", "refused", "sites"}."""
        content = {
            "graphs": self.graphs,
            "notes": list(self.notes),
            "rewritten": self.rewritten,
            "refused": self.refused,
            "sites": [asdict(site) for site in self.sites],
        }
        return json.dumps(content, indent=2)

    def summary(self) -> str:
        """One line: counts by kind."""
        done = ", ".join(f"{kind} {count}" for kind, count in sorted(self.rewritten.items())) or "nothing"
        left = ", ".join(f"{kind} {count}" for kind, count in sorted(self.refused.items()))
        return f"rewritten: {done}" + (f"; refused: {left}" if left else "") + f"; graphs: {self.graphs}"

    def __str__(self) -> str:
        rows = [_row(site) for site in self.sites]
        header = ("site", "kind", "became", "written as / why it stayed")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in [header, *rows]
        ]
        return "\n".join([*lines, *self.notes, self.summary()])

    def print(self) -> None:
        """Prints the report as a table (with `rich` if it is installed)."""
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            print(self)
            return
        table = Table(show_lines=False, header_style="bold")
        for title in ("site", "kind", "became", "written as / why it stayed"):
            table.add_column(title, overflow="fold")
        for site in self.sites:
            table.add_row(*map(escape, _row(site)), style="" if site.status == "rewritten" else "yellow")
        console = Console()
        console.print(table)
        for note in self.notes:
            console.print(note, style="yellow", markup=False)
        console.print(self.summary(), markup=False, highlight=False)


def _row(site: SiteRecord) -> tuple[str, str, str, str]:
    place = " ".join(part for part in (site.module or site.name, f"({site.source})" if site.source else "") if part)
    if site.status == "rewritten":
        return place, site.kind, site.kernel, site.spelling
    return place, site.kind, "left as it is", f"{site.reason}; remedy: {site.remedy}" if site.remedy else site.reason
