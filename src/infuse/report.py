"""What was done and why not: plain records, filled by the pass, printed as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from infuse.settings import LARGER

# Where the node of an operator holds the id of its site: node.meta["custom"][SITE_KEY].
SITE_KEY = "infuse_site"
# Torch's counters carry the lowering's choices to the report under names "<prefix><site id> <choice in words>".
CHOICE_PREFIX = "infuse choice "
COLUMNS = ("site", "kind", "became", "written as / why it stayed")


class StrictError(RuntimeError):
    """Raised under `strict` when a site that looks fusable was refused, or the kernel of a rewritten one is missing."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What the lowering decides for one site before AOTAutograd sees it.

    overload: "default" keeps the operator up to the lowering, where kernels compete; "inline" gives AOTAutograd the
        plain formula; "parts" a formula of smaller operators, which are kept; other names are one operator's own.
    kernel: what will run, in words. missing: why a kernel that exists for the operator cannot be had, "" otherwise.
    verified: what the shadow verification of the site said.
    declined: why a site that stands for several is to be left to its parts, "" otherwise.
    """

    overload: str
    kernel: str
    missing: str = ""
    declined: str = ""
    verified: str = ""


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
    verified: str = ""  # what the shadow verification measured
    missing: str = ""  # why a kernel that exists for it cannot be had
    id: str = ""  # its position in its graph: "<run of the pass>.<number>"
    # What it is without kernels, for one that is larger where they pay: other sites of a residual add, a norm, a gate.
    parts: tuple[SiteRecord, ...] = ()

    @property
    def base(self) -> tuple[SiteRecord, ...]:
        """The sites that it is on every device: its parts, or itself."""
        return self.parts if self.parts or self.kind in LARGER else (self,)

    @property
    def place(self) -> str:
        """Where it is, for a reader: module path or node name, and source line."""
        source = f"({self.source})" if self.source else ""
        return " ".join(part for part in (self.module or self.name, source) if part)

    @property
    def outcome(self) -> tuple[str, str]:
        """(what it became, how it was written or why it stayed)"""
        if self.status == "rewritten":
            return self.kernel, "; ".join(part for part in (self.spelling, self.verified) if part)
        return "left as it is", f"{self.reason}; remedy: {self.remedy}" if self.remedy else self.reason


@dataclass(frozen=True, slots=True)
class Report:
    """The sites of a model over all its graphs.

    A larger operator (norm and linears, say) counts as what it stands for, so that the counts of a model are those of
    every device; `larger` says how many there are.

    graphs: how many graphs torch.compile made of the model (one more than its graph breaks).
    """

    sites: tuple[SiteRecord, ...] = ()
    graphs: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def rewritten(self) -> dict[str, int]:
        """Number of rewritten sites by kind."""
        return dict(Counter(part.kind for site in self.sites if site.status == "rewritten" for part in site.base))

    @property
    def larger(self) -> dict[str, int]:
        """Number of operators that stand for several sites, by kind."""
        return dict(Counter(site.kind for site in self.sites if site.status == "rewritten" and site.kind in LARGER))

    @property
    def refused(self) -> dict[str, int]:
        """Number of refused sites by kind."""
        return dict(Counter(site.kind for site in self.sites if site.status == "refused"))

    def to_json(self) -> str:
        """The report as JSON: {"graphs", "notes", "rewritten", "refused", "sites"}; `from_json` reads it."""
        content = {
            "graphs": self.graphs,
            "notes": list(self.notes),
            "rewritten": self.rewritten,
            "refused": self.refused,
            "sites": [asdict(site) for site in self.sites],
        }
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote; fields that another version added are left out.

        Raises ValueError for text that is no report.
        """
        try:
            content = json.loads(text)
            sites = tuple(_site_from(site) for site in content["sites"])
            return cls(sites, int(content["graphs"]), tuple(map(str, content["notes"])))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"infuse: report: got {text[:40]!r}..., expected JSON of Report.to_json ({error})"
            ) from error

    def to_markdown(self) -> str:
        """The report as a Markdown table, for an issue or a pull request."""
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(_markdown_row(site) for site in self.sites)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return "\n\n".join([*([table] if self.sites else []), *self.notes, self.summary()])

    def summary(self) -> str:
        """One line: counts by kind."""
        done, larger, left = (
            ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
            for counts in (self.rewritten, self.larger, self.refused)
        )
        together = f"; taken together in {larger}" if larger else ""
        refused = f"; refused: {left}" if left else ""
        return f"rewritten: {done or 'nothing'}{together}{refused}; graphs: {self.graphs}"

    def __str__(self) -> str:
        rows = [_row(site) for site in self.sites]
        header = COLUMNS
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
        for title in COLUMNS:
            table.add_column(title, overflow="fold")
        for site in self.sites:
            table.add_row(*map(escape, _row(site)), style="" if site.status == "rewritten" else "yellow")
        console = Console()
        console.print(table)
        for note in self.notes:
            console.print(note, style="yellow", markup=False)
        console.print(self.summary(), markup=False, highlight=False)


def raise_if_strict(sites: Iterable[SiteRecord]) -> None:
    """Raises StrictError that lists every refused site, and every one whose kernel is missing; if there are any."""
    refused, missing = [], []
    for site in sites:
        if site.status == "refused":
            refused.append(f"  {site.kind} at {site.place}: {site.outcome[1]}")
        elif site.missing:
            missing.append(f"  {site.kind} at {site.place}: {site.missing}")
    lines = [
        *([f"infuse.strict: {len(refused)} sites were refused, expected none", *refused] if refused else []),
        *([f"infuse.strict: {len(missing)} sites miss their kernel, expected none", *missing] if missing else []),
    ]
    if lines:
        raise StrictError("\n".join(lines))


def _row(site: SiteRecord) -> tuple[str, str, str, str]:
    return (site.place, site.kind, *site.outcome)


def _markdown_row(site: SiteRecord) -> tuple[str, ...]:
    return tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in _row(site))


def _site_from(content: Mapping[str, Any]) -> SiteRecord:
    known = {item.name for item in fields(SiteRecord)}
    parts = tuple(_site_from(part) for part in content.get("parts", ()))
    texts = {name: str(value) for name, value in content.items() if name in known - {"parts"}}
    return SiteRecord(**texts, parts=parts)
