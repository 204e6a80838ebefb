"""The true counts of a run, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from census import attention, gates, norms, rope
from census.trace import Op, record

KINDS = ("attention", "rms_norm", "layer_norm", "swiglu", "rope")


@dataclass(frozen=True, slots=True)
class TrueSite:
    """A site that an eager run executed. certain: False where it may also be taken for something else."""

    kind: str
    module: str
    source: str
    certain: bool = True


def find(ops: list[Op]) -> list[TrueSite]:
    """All sites in a record, in no particular order."""
    return [TrueSite(kind, op.module, op.source, certain) for kind, op, certain in _sites(ops)]


def _sites(ops: list[Op]) -> Iterator[tuple[str, Op, bool]]:
    for op in attention.calls(ops):
        for kind, count in attention.FUSED.get(op.name, {"attention": 1}).items():
            for _ in range(count):
                yield kind, op, True
    for kind, op in norms.sites(ops):
        yield kind, op, True
    for op in rope.sites(ops):
        yield "rope", op, True
    yield from _graded("attention", attention.open_coded, ops)
    yield from _graded("swiglu", gates.sites, ops)
    for op in norms.l2_norms(ops):
        yield "rms_norm", op, False


def _graded(kind: str, sites: Callable[..., Iterator[Op]], ops: list[Op]) -> Iterator[tuple[str, Op, bool]]:
    certain = set(sites(ops, strict=True))
    for op in sites(ops, strict=False):
        yield kind, op, op in certain


def counts(sites: list[TrueSite], certain: bool = True) -> dict[str, int]:
    """Sites by kind. certain: leaves out those that may be something else."""
    return dict(Counter(site.kind for site in sites if site.certain or not certain))


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """The true counts of one call."""
    return counts(find(record(function, *args, **kwargs)))
