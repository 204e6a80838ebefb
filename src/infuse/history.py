"""The reports of what torch.compile made in this process, graph by graph, since the last reset.

A graph is known by Dynamo's compile id: "0/1" is the second compilation of the first frame. Dynamo may trace a frame
several times before it is content (an attempt fails, a size turns out to be dynamic); only the last attempt counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch._dynamo.eval_frame import cached_backends
from torch._dynamo.utils import counters
from torch._guards import CompileContext

from infuse.report import CHOICE_PREFIX, Report, SiteRecord

NOTHING = "nothing was compiled with Infuse since the last reset"


@dataclass(slots=True)
class _Graph:
    """calls: the records of each run of the rewrite: the subgraphs of higher-order operators first, then the graph."""

    frame: object
    attempt: int
    calls: list[Sequence[SiteRecord]] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)


class History:
    """The records of the graphs of one process, or of one tracing."""

    def __init__(self) -> None:
        self._graphs: dict[object, _Graph] = {}
        self._last: _Graph | None = None
        self._nameless = 0
        self._notes: dict[str, None] = {}  # in order, each once

    def begin(self) -> str:
        """Announces a run of the rewrite; returns its number within the graph that is being compiled."""
        self._collect_choices()
        key, frame, attempt = self._compilation()
        graph = self._graphs.get(key)
        if graph is None or graph.attempt != attempt:
            graph = self._graphs[key] = _Graph(frame, attempt)
        self._last = graph
        return str(len(graph.calls))

    def add(self, records: Sequence[SiteRecord]) -> None:
        """The records of the run that was announced."""
        assert self._last is not None, "begin() comes first"
        self._last.calls.append(tuple(records))

    def note(self, text: str) -> None:
        """A remark about everything that was compiled."""
        self._notes[text] = None

    def clear(self) -> None:
        self._collect_choices()
        self._notes.clear()
        self._graphs.clear()
        self._last = None

    def report(self, recompilations: bool = False) -> Report:
        """One report of all graphs; of a frame that was compiled several times the last, unless `recompilations`."""
        self._collect_choices()
        newest = {graph.frame: graph for graph in self._graphs.values()}
        graphs = [graph for graph in self._graphs.values() if recompilations or newest[graph.frame] is graph]
        left_out = len(self._graphs) - len(graphs)
        notes = [
            *self._notes,
            *([f"{left_out} earlier compilations of the same code are left out"] if left_out else []),
        ]
        sites = tuple(site for graph in graphs for site in _sites(graph))
        return Report(sites, len(graphs), tuple(notes if graphs or notes else [NOTHING]))

    def _compilation(self) -> tuple[object, object, int]:
        """(key, frame, attempt) of the compilation under way."""
        context = CompileContext.try_get()
        if context is None or context.compile_id is None:
            # Compiled without Dynamo, such as by AOTInductor: each run stands for a graph of its own.
            self._nameless += 1
            return ("nameless", self._nameless), ("nameless", self._nameless), 0
        identity = context.compile_id
        return identity, (identity.frame_id, identity.compiled_autograd_id), context.attempt

    def _collect_choices(self) -> None:
        """Takes over what the lowering chose since the last time.

        It comes through torch's counters, because Inductor's cache keeps with a graph what its compilation counted and
        counts it again on a hit: a choice then reaches the report of a later process too.
        """
        for key in [key for key in counters["inductor"] if str(key).startswith(CHOICE_PREFIX)]:
            del counters["inductor"][key]
            site, _, words = str(key).removeprefix(CHOICE_PREFIX).partition(" ")
            if self._last is not None:
                self._last.choices[site] = words


def _sites(graph: _Graph) -> Iterator[SiteRecord]:
    for records in graph.calls:
        for record in records:
            words = graph.choices.get(record.id, "") if record.status == "rewritten" else ""
            yield replace(record, kernel=words) if words else record


class _ResetHook:
    """Stands among the backends that torch._dynamo.reset() resets."""

    def reset(self) -> None:
        _process.clear()


_process = History()
_hook = _ResetHook()


def of_this_process() -> History:
    """The history that torch.compile fills, emptied by torch._dynamo.reset()."""
    cached_backends.setdefault(id(_hook), _hook)  # type: ignore[arg-type]
    return _process


def last_report(recompilations: bool = False) -> Report:
    """What Infuse did in everything that torch.compile compiled since the last reset, warm caches included.

    It is complete once the compiled functions have run; a backward does not change it. Reset by
    torch._dynamo.reset() and `infuse.reset_report()`.

    recompilations: also count the earlier compilations of code that was compiled again, for other shapes for example.
    """
    return _process.report(recompilations)


def reset_report() -> None:
    """Forgets what was compiled so far; code that is compiled already does not come back into the report."""
    _process.clear()
