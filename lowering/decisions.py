"""What the lowering chose, for the log, the report and the tests."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch._dynamo.utils import counters

from infuse.report import CHOICE_PREFIX

log = logging.getLogger("infuse")


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice. timings_ms: candidates alone; costs_ms: with what neighbours lose; empty when nothing was timed.

    site: the id of the site in the report, "" when it is not known.
    """

    op: str
    problem: str
    chosen: str
    why: str
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    costs_ms: Mapping[str, float] = field(default_factory=dict)
    site: str = ""


# Bounded: a process that compiles for days must not grow by it.
_decisions: deque[Decision] = deque(maxlen=4096)


def record(decision: Decision) -> None:
    _decisions.append(decision)
    if decision.site:
        # Inductor's cache keeps a graph's counts and repeats them on a hit, so that the report of a later process, in
        # which nothing is lowered, has the choice too.
        counters["inductor"][f"{CHOICE_PREFIX}{decision.site} {_in_words(decision)}"] += 1
    log.info("%s %s: %s (%s)", decision.op, decision.problem, decision.chosen, decision.why)


def _in_words(decision: Decision) -> str:
    """ "kernel 3 (measured ...)"; configuration -1 is the launcher's own choice."""
    label, _, configuration = decision.chosen.partition("kernel_")
    chosen = decision.chosen if label else "kernel" if configuration == "-1" else f"kernel {configuration}"
    return f"{chosen if configuration else decision.chosen} ({decision.why})"


def decisions() -> tuple[Decision, ...]:
    """The choices of this process, oldest first. A graph that came from a warm cache made none."""
    return tuple(_decisions)


def clear() -> None:
    _decisions.clear()
