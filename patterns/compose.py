"""The second stage: rules that make one larger site out of sites of the first stage and what lies between them.

A rule proposes, the lowering disposes: each proposal is shown to it, and where it declines, because no kernel for the
larger operator would pay, the parts stay sites of their own and nothing is lost. Rules run in order and see what those
before them have made; a value is an output of one site at most.

torch's PatternMatcherPass would match the operators after they are emitted. Here the sites themselves are read, before
anything is emitted: they hold what was proven (arguments, dtypes, roundings), a rule may take in any number of readers,
and a declined proposal needs no way back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.metadata import MissingMetadata
from infuse.patterns.safety import Effects
from infuse.patterns.sites import Site
from infuse.report import Placement
from infuse.settings import Settings


@dataclass(frozen=True, slots=True)
class Declined:
    """A proposal that the rule itself takes back. reason: for the report."""

    kind: str
    reason: str


Proposal = Site | Declined


@dataclass(frozen=True, slots=True)
class Rule:
    """kind: of the sites that it makes. parts: kinds of sites that it needs to see, its own parts and their like.
    training: whether it is for graphs that autograd will trace a backward for, alone.

    propose: given the graph and the sites as they are, yields sites of `kind`, each with the sites that it replaces as
    its `parts`. It looks at each site once and follows a bounded number of nodes, so that a stage is linear in sites.
    """

    kind: str
    parts: tuple[str, ...]
    propose: Callable[[CanonicalGraph, Sequence[Site]], Iterator[Proposal]]
    training: bool = False


def needed(rules: Iterable[Rule], kinds: Iterable[str]) -> set[str]:
    """The kinds, and those that rules for them need."""
    wanted = set(kinds)
    for rule in reversed([*rules]):
        if rule.kind in wanted:
            wanted.update(rule.parts)
    return wanted


def compose(
    view: CanonicalGraph,
    effects: Effects,
    sites: Sequence[Site],
    rules: Iterable[Rule],
    settings: Settings,
    place: Callable[[Site], Placement | None],
    training: bool = False,
) -> tuple[list[Site], list[str]]:
    """The sites after all rules, and what was declined, as remarks for the report.

    place: what the lowering says to a site; None if it cannot be asked.
    """
    current = {id(site): site for site in sites}
    made: dict[Node, Site] = {output: site for site in sites for output in site.outputs}
    inside: dict[Node, Site] = {}  # what composites do, which is nobody else's to do again
    declined: dict[str, dict[str, None]] = {}  # kinds, by the reason
    for rule in rules:
        if rule.kind not in settings.patterns or (rule.training and not training):
            continue
        for proposal in _proposals(rule, view, tuple(current.values())):
            if isinstance(proposal, Declined):
                declined.setdefault(proposal.reason, {})[proposal.kind] = None
                continue
            is_there = all(id(part) in current for part in proposal.parts)
            if not is_there or not _is_possible(proposal, made, inside, effects, settings):
                continue
            placement = place(proposal)
            if placement is None:
                continue
            if placement.declined:
                declined.setdefault(placement.declined, {})[proposal.kind] = None
                continue
            for part in proposal.parts:
                del current[id(part)]
            current[id(proposal)] = proposal
            hidden = [node for node in proposal.interior if node in made]  # what its parts made for one another
            made.update(dict.fromkeys((*proposal.outputs, *hidden), proposal))
            inside.update(dict.fromkeys(proposal.interior, proposal))
    return [*current.values()], [_remark(kinds, reason) for reason, kinds in declined.items()]


def _remark(kinds: Iterable[str], reason: str) -> str:
    names = [*kinds]
    return f"{', '.join(names)}: left to {'their' if len(names) > 1 else 'its'} parts ({reason})"


def _proposals(rule: Rule, view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Proposal]:
    """What a rule proposes; nothing more once it meets a node of which nothing is known."""
    with contextlib.suppress(MissingMetadata):
        yield from rule.propose(view, sites)


def _is_possible(
    proposal: Site, made: dict[Node, Site], inside: dict[Node, Site], effects: Effects, settings: Settings
) -> bool:
    """Whether a proposal takes only what is its own, keeps the rounding that was asked for, and may stand there."""
    makers = [made[node] for node in (*proposal.outputs, *proposal.interior) if node in made]
    makers += [inside[output] for output in proposal.outputs if output in inside]
    if not all(any(maker is part for part in proposal.parts) for maker in makers):
        return False
    if proposal.rounding and settings.numerics == "exact":
        return False
    return effects.check(proposal) is None
