"""Graph-rewrite tests for a user's own test suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infuse.inspection import explain
from infuse.report import Report


def assert_rewrites(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    expect: Mapping[str, int],
    kwargs: Mapping[str, Any] | None = None,
    training: bool = False,
    dynamic: bool | None = None,
    options: dict[str, object] | None = None,
) -> Report:
    """Asserts that Infuse rewrites exactly these sites of a model; kinds that `expect` does not name must not occur.

        infuse.testing.assert_rewrites(model, (tokens,), expect={"attention": 32, "swiglu": 32})

    Nothing is computed (see `infuse.explain`). Returns the report.
    Raises AssertionError with the difference and the reason of every refusal.
    """
    report = explain(model, *args, training=training, dynamic=dynamic, options=options, **dict(kwargs or {}))
    got = report.rewritten
    wanted = {kind: count for kind, count in expect.items() if count}
    if got != wanted:
        difference = [
            f"  {kind}: got {got.get(kind, 0)}, expected {wanted.get(kind, 0)}"
            for kind in sorted({*got, *wanted})
            if got.get(kind, 0) != wanted.get(kind, 0)
        ]
        refusals = [
            f"  {site.kind} at {site.module or site.name}: {site.reason}" for site in report.sites if site.reason
        ]
        lines = ["infuse: rewrites differ:", *difference, *(["refused:", *refusals] if refusals else [])]
        raise AssertionError("\n".join(lines))
    return report
