"""Lock files: what Infuse does in a model, kept in the repository, so that a test fails when it changes.

One file holds several models, each under a name of its own: JSON with one line a site, so that `git diff` shows which
site changed. Source lines, kernels and what kernels take together are left out: they differ between edits and between
machines.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from infuse.inspection import explain
from infuse.report import Report, SiteRecord

FORMAT = 1
UPDATE_VARIABLE = "INFUSE_UPDATE_LOCK"
HOW_TO_UPDATE = (
    f"if this is what you want, write it into the lock file: run with {UPDATE_VARIABLE}=1, "
    "`pytest --infuse-update-lock`, or `python -m infuse lock --update`"
)
Models = dict[str, list[str]]  # name -> lines


class LockError(AssertionError):
    """What Infuse does in a model is not what the lock file says."""


def check_lock(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    name: str = "",
    path: str | os.PathLike[str] = "infuse.lock",
    update: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    training: bool = False,
    dynamic: bool | None = None,
    options: dict[str, object] | None = None,
) -> Report:
    """Asserts that Infuse does in a model what the lock file says; nothing is computed (see `infuse.explain`).

    name: the model's entry in the file; by default the name of its class or function, and whether it is trained.
    update: write the entry instead; so does the environment variable INFUSE_UPDATE_LOCK=1.
    Returns the report. Raises LockError (an AssertionError) with a diff, or if the file has no such entry; ValueError
    for a file that is no lock file.
    """
    report = explain(model, *args, training=training, dynamic=dynamic, options=options, **dict(kwargs or {}))
    name = name or _name(model) + (" (training)" if training else "")
    compare(report, name, Path(path), update or os.environ.get(UPDATE_VARIABLE, "") not in ("", "0"))
    return report


def compare(report: Report, name: str, path: Path, update: bool) -> None:
    """Compares a report with an entry of a lock file, or writes it there. Raises as `check_lock`."""
    lines = entry(report)
    if update:
        with FileLock(f"{path}.writing"):
            models = _read(path)
            if models.get(name) != lines:
                path.write_text(_text({**models, name: lines}), encoding="utf-8")
        Path(f"{path}.writing").unlink(missing_ok=True)
        return
    models = _read(path)
    if name not in models:
        known = f"it has {', '.join(sorted(models))}" if models else "it has none, or does not exist"
        raise LockError(f"infuse: {path} has no entry {name!r}, {known}; {HOW_TO_UPDATE}")
    if models[name] != lines:
        diff = difflib.unified_diff(models[name], lines, str(path), "this run", lineterm="", n=1)
        raise LockError("\n".join([f"infuse: {path}, {name}: what is rewritten has changed:", *diff, HOW_TO_UPDATE]))


def entry(report: Report) -> list[str]:
    """What a lock file keeps of a report: a line each for the number of graphs and for every site."""
    return [f"graphs: {report.graphs}", *(_line(part) for site in report.sites for part in site.base)]


def _line(site: SiteRecord) -> str:
    place = site.module or site.name
    words = [
        site.kind,
        site.status,
        *([site.spelling] if site.spelling else []),
        *([site.reason] if site.reason else []),
    ]
    return f"{place}: {'; '.join(words)}"


def _name(model: Callable[..., Any]) -> str:
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "__qualname__", "") or type(model).__qualname__


def _text(models: Models) -> str:
    content = {"infuse.lock": FORMAT, "models": dict(sorted(models.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path) -> Models:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        got = content["infuse.lock"]
        models = {str(name): [str(line) for line in lines] for name, lines in content["models"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"infuse: {path}: got a file that is no lock file ({error!r})") from error
    if got != FORMAT:
        raise ValueError(f"infuse: {path}: got a lock file of format {got}, expected {FORMAT}: update it")
    return models
