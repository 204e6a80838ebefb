"""Graph-rewrite tests for a user's own test suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infuse.inspection import explain
from infuse.lock import LockError, check_lock
from infuse.report import Report

__all__ = ["LockError", "assert_rewrites", "check_lock"]


def assert_rewrites(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    expect: Mapping[str, int],
    refused: Mapping[str, int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    training: bool = False,
    dynamic: bool | None = None,
    options: dict[str, object] | None = None,
) -> Report:
    """Asserts that Infuse rewrites exactly these sites of a model; kinds that `expect` does not name must not occur.

    What a device's kernels take together (a norm and the linears behind it) counts as what it is elsewhere.

        infuse.testing.assert_rewrites(model, (tokens,), expect={"attention": 32, "swiglu": 32})

    refused: the same for the sites that stay as they are; None allows any.
    Nothing is computed (see `infuse.explain`). Returns the report.
    Raises AssertionError with the differences and the report.
    """
    report = explain(model, *args, training=training, dynamic=dynamic, options=options, **dict(kwargs or {}))
    differences = _differences("rewritten", report.rewritten, expect)
    if refused is not None:
        differences += _differences("refused", report.refused, refused)
    if differences:
        raise AssertionError("\n".join(["infuse: rewrites differ:", *differences, "", str(report)]))
    return report


def _differences(status: str, got: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    return [
        f"  {kind} {status}: got {got.get(kind, 0)}, expected {expected.get(kind, 0)}"
        for kind in sorted({*got, *expected})
        if got.get(kind, 0) != expected.get(kind, 0)
    ]
