"""What is left over, for those who write matchers: each missed site with its source, one file a kind."""

from __future__ import annotations

import linecache
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from census.counting import KINDS, TrueSite
from coverage_rows import MEANS
from coverage_run import Result

CONTEXT = 8  # lines before and after


def write_misses(results: Sequence[Result], folder: Path) -> None:
    """Writes <kind>.md: one entry a place in the source, with the models that have it and the reasons of refusals."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (folder / f"{kind}.md").write_text(report(kind, results), encoding="utf-8")


def report(kind: str, results: Sequence[Result]) -> str:
    """Markdown, the most frequent place first."""
    places: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    beyond, outside = [], []
    for result in results:
        row = result.row
        label = f"{row.model} [{row.configuration}]"
        if row.over.get(kind):
            sites = [s for s in result.records if s.status == "rewritten" and kind in MEANS.get(s.kind, {})]
            beyond.append(f"- {label}: {row.over[kind]} too many: {'; '.join(f'{s.kind} {s.source}' for s in sites)}")
        if row.true.get(kind, 0) > row.in_graph.get(kind, 0):
            outside.append(f"- {label}: {row.true[kind] - row.in_graph.get(kind, 0)}")
        if row.fused.get(kind, 0) >= row.in_graph.get(kind, 0):
            continue
        left = leftovers(kind, result)
        for place in left or [f"{row.model} (no place known)"]:
            places[place][f"{label} {row.fused.get(kind, 0)}/{row.in_graph[kind]}"] += 1
            for site in result.records:
                if site.status == "refused" and kind in MEANS.get(site.kind, {}):
                    reasons[place][f"{site.reason} ({site.source})"] += 1
    lines = [f"# {kind}: sites that are not fused", "", "Reasons are all refusals of that kind in the model.", ""]
    for place, models in sorted(places.items(), key=lambda item: -len(item[1])):
        lines += [f"## {place}", ""]
        lines += [f"- {model}" for model in list(models)[:8]] + (["- ..."] if len(models) > 8 else [])
        lines += [f"- refused: {reason}" for reason, _ in reasons[place].most_common(6)] or ["- no refusal: MISSED"]
        lines += ["", *excerpt(place), ""]
    for title, entries in (("Beyond the true count", beyond), ("Outside captured graphs", outside)):
        if entries:
            lines += [f"## {title}", "", *entries, ""]
    return "\n".join(lines) + "\n"


def leftovers(kind: str, result: Result) -> list[str]:
    """Sources of true sites in modules where fewer sites were rewritten than executed."""
    fused = Counter(
        site.module for site in result.records if site.status == "rewritten" and kind in MEANS.get(site.kind, {})
    )
    by_module: dict[str, list[TrueSite]] = defaultdict(list)
    for site in result.true_sites:
        if site.kind == kind and site.certain:
            by_module[site.module].append(site)
    return list(dict.fromkeys(s.source for name, sites in by_module.items() if fused[name] < len(sites) for s in sites))


def excerpt(place: str) -> Iterable[str]:
    """The lines around "file.py:12" as a code block."""
    path, _, number = place.rpartition(":")
    if not number.isdigit():
        return []
    middle = int(number)
    lines = [linecache.getline(path, i) for i in range(max(1, middle - CONTEXT), middle + CONTEXT + 1)]
    return ["```python", *(text.rstrip() for text in lines), "```"]
