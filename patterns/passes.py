"""The rewrite: which families run, in which order, and what is recorded.

    read the graph canonically -> match anchors -> compose -> check legality -> ask the lowering -> emit -> erase what
    is dead

Inductor runs pre-grad passes on the subgraphs of higher-order operators (checkpointing) too, each as a graph of its
own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch.fx import Graph, Node

from infuse.ops import add_layer_norm as _op_add_layer_norm  # noqa: F401  importing an operator's module registers it
from infuse.ops import add_rms_norm as _op_add_rms_norm  # noqa: F401
from infuse.ops import attention as _op_attention  # noqa: F401
from infuse.ops import gated_mlp as _op_gated_mlp  # noqa: F401
from infuse.ops import gated_rms_norm as _op_gated_rms_norm  # noqa: F401
from infuse.ops import grouped_linear_swiglu as _op_grouped_linear_swiglu  # noqa: F401
from infuse.ops import layer_norm as _op_layer_norm  # noqa: F401
from infuse.ops import linear_add as _op_linear_add  # noqa: F401
from infuse.ops import linear_cross_entropy as _op_linear_cross_entropy  # noqa: F401
from infuse.ops import linear_swiglu as _op_linear_swiglu  # noqa: F401
from infuse.ops import norm_linear as _op_norm_linear  # noqa: F401
from infuse.ops import norm_linear_swiglu as _op_norm_linear_swiglu  # noqa: F401
from infuse.ops import packed_linear as _op_packed_linear  # noqa: F401
from infuse.ops import qk_norm_rope as _op_qk_norm_rope  # noqa: F401
from infuse.ops import rms_norm as _op_rms_norm  # noqa: F401
from infuse.ops import rope as _op_rope  # noqa: F401
from infuse.ops import rope_cache_write as _op_rope_cache_write  # noqa: F401
from infuse.ops import swiglu as _op_swiglu  # noqa: F401
from infuse.patterns import (
    add_norm,
    attention,
    attention_scores,
    cache_counters,
    embeddings,
    encoder_layer,
    exponentials,
    gated_mlp,
    gated_norm,
    grouped_linear_swiglu,
    in_place,
    kept_inputs,
    layer_norm,
    linear_add,
    linear_cross_entropy,
    linear_swiglu,
    metadata,
    multi_head_attention,
    norm_linear,
    other_rotations,
    packed_linear,
    packed_weights,
    qk_norm_rope,
    rms_norm,
    rope,
    rope_cache_write,
    swiglu,
)
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule, compose, needed
from infuse.patterns.emit import Emitter
from infuse.patterns.norm_root import may_be_root
from infuse.patterns.safety import Effects
from infuse.patterns.sites import Finding, Refusal, Site
from infuse.patterns.verify import Verdict, verify
from infuse.report import Placement, SiteRecord, raise_if_strict
from infuse.settings import LARGER, Settings

Place = Callable[[str, tuple[object, ...], bool], Placement]
"""(kind, example values of the operator's arguments, training) -> what runs there."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of site and how to recognise it: `match` is asked about each node whose word is one of `anchors`.

    concerns: tells apart the anchors that are common words, by their arguments as they are written.
    """

    kind: str
    anchors: tuple[str, ...]
    match: Callable[[CanonicalGraph, Node], Finding | None]
    concerns: Callable[[CanonicalGraph, Node], bool] = lambda view, node: True


FAMILIES: tuple[Family, ...] = (
    Family(attention.KIND, ("sdpa",), attention.match_call),
    Family(attention.KIND, ("softmax", "exp"), attention_scores.match, attention_scores.may_be_softmax),
    Family(attention.KIND, exponentials.ANCHORS, exponentials.match, exponentials.is_summed),
    Family(attention.KIND, ("multi_head_attention",), multi_head_attention.match),
    # Layers that could not be taken apart: an attention and two norms each.
    *(Family(kind, ("encoder_layer",), encoder_layer.refusal_of(kind)) for kind in encoder_layer.KINDS),
    Family(rms_norm.KIND, rms_norm.ANCHORS, rms_norm.match, may_be_root),
    Family(layer_norm.KIND, layer_norm.ANCHORS, layer_norm.match, may_be_root),
    Family(swiglu.KIND, swiglu.ANCHORS, swiglu.match),
    Family(rope.KIND, rope.ANCHORS, rope.match, rope.may_be_rotation),
    Family(linear_cross_entropy.KIND, linear_cross_entropy.ANCHORS, linear_cross_entropy.match),
    Family(rope.KIND, other_rotations.ANCHORS, other_rotations.match, other_rotations.may_be_rotation),
)


_OWN_KINDS = frozenset(family.kind for family in FAMILIES)


def add_family(family: Family) -> None:
    """Asks a family from outside the package too."""
    global FAMILIES
    FAMILIES = (*FAMILIES, family)


# In the order in which they run: a later rule sees what the earlier ones made.
RULES: tuple[Rule, ...] = (
    *gated_norm.RULES,
    gated_mlp.RULE,
    linear_add.RULE,  # where no kernel does that the sum is the norm's
    *add_norm.RULES,
    qk_norm_rope.RULE,
    rope_cache_write.RULE,
    *linear_swiglu.RULES,
    grouped_linear_swiglu.RULE,
    norm_linear.RULE,
    packed_linear.RULE,
)


def rewrite(
    graph: Graph,
    settings: Settings,
    place: Place,
    training: bool,
    inputs: Sequence[object] = (),
    run: str = "",
    note: Callable[[str], None] | None = None,
) -> list[SiteRecord]:
    """Replaces the sites of a pre-grad graph in place, and says what became of each.

    inputs: the graph's example inputs; needed only if its nodes have no example values. run: what sets the ids of this
    graph's sites apart from those of others that are compiled with it. note: takes remarks about the graph as a whole.
    Raises StrictError if `settings.strict` and a site was refused, or a kernel is missing.
    """
    if attention.KIND in settings.patterns and settings.numerics == "fused":
        encoder_layer.take_apart(graph)
    _hoist_constants(graph)
    in_place.functionalise(graph)
    view = CanonicalGraph(graph, inputs)
    findings = [*find(view, settings.patterns)]
    if not findings and not any(node.op == "get_attr" for node in view.nodes):  # constants may be packed
        return []
    effects = Effects(view, torch.is_grad_enabled() or training)
    findings = [_judge(finding, effects, settings) for finding in findings]
    verifier = _verifier(view, effects, training) if settings.verify == "compile" else None
    writer = Writer(view, settings.patterns, place, training, run, verifier)
    sites = _first_of_each([finding for finding in findings if isinstance(finding, Site)])
    sites, remarks = compose(view, effects, sites, RULES, settings, writer.ask, training)
    if note is not None:
        for remark in remarks:
            note(remark)
    taken = {node for site in sites if site.parts for node in site.interior}
    # What one family refuses may be part of a composite site: it is not left as it is then.
    refusals = [finding for finding in findings if isinstance(finding, Refusal) and finding.node not in taken]
    findings = [*sites, *refusals]
    wanted = [finding for finding in findings if finding.kind in settings.patterns]
    for finding in sorted(wanted, key=lambda finding: view.index[_root(finding)]):
        writer.write(finding)
    writer.finish()
    for remark in _around_sites(graph, settings, place, training) if writer.records else ():
        if note is not None:
            note(remark)
    if settings.strict:
        raise_if_strict(writer.records)
    return writer.records


def _around_sites(graph: Graph, settings: Settings, place: Place, training: bool) -> Iterator[str]:
    """Changes what stands around the sites of a model and is no site itself; yields a remark about each change."""
    if settings.kernels != "never" and (saved := cache_counters.gather(graph)):
        yield f"bookkeeping of KV caches is done for all layers at once: {saved} operations fewer"
    if found := embeddings.replace(graph, place, training):
        yield f"gradients of {found} embedding(s) are summed without a table of float32"


def _hoist_constants(graph: Graph) -> None:
    """Brings the constants of a frozen graph in front of what is computed, where every operator can read them."""
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in [*graph.nodes]:
        if node.op == "get_attr" and first is not None and node is not first:
            first.prepend(node)


def _first_of_each(sites: Sequence[Site]) -> list[Site]:
    """A value becomes one operator's: of two families that claim it a user's own, else the one asked first."""
    taken: set[Node] = set()
    kept = []
    for site in sorted(sites, key=lambda site: site.kind in _OWN_KINDS):
        if taken.isdisjoint(site.outputs):
            kept.append(site)
        taken.update(site.outputs)
    return kept


def find(view: CanonicalGraph, kinds: Sequence[str]) -> Iterator[Finding]:
    """What the families answer about the graph, in one pass over its nodes."""
    wanted = needed(RULES, kinds)
    families = [family for family in FAMILIES if family.kind in wanted]
    for node in view.nodes:
        name = view.word(node) or view.in_place.get(node, "")
        interested = [family for family in families if name in family.anchors and family.concerns(view, node)]
        if interested:
            yield from _ask(interested, view, node)


def _ask(families: Sequence[Family], view: CanonicalGraph, node: Node) -> Iterator[Finding]:
    for family in families:
        try:
            if node not in view.in_place:
                view.value(node)
            finding = family.match(view, node)
        except metadata.MissingMetadata as missing:
            yield Refusal(
                family.kind,
                node,
                f"nothing is known about shapes and dtypes here: {missing}",
                "leave freezing off (torch 2.11 loses the metadata), or compile with backend='infuse'",
            )
            return  # The other families know as little.
        if finding is not None:
            yield finding


def _judge(finding: Finding, effects: Effects, settings: Settings) -> Finding:
    """The finding, or a refusal if its place or the numerics asked for forbid it."""
    if isinstance(finding, Refusal):
        return finding
    if finding.rounding and settings.numerics == "exact":
        return Refusal(
            finding.kind,
            finding.outputs[0],
            f'numerics="exact" keeps what the operator does not: {finding.rounding}',
            'set numerics="fused" to allow more precision than the source has',
            finding.spelling,
        )
    return effects.check(finding) or finding


Verifier = Callable[[Site, str, Mapping[Node, Node]], Verdict]
"""(site, overload, what earlier rewrites put in the place of nodes) -> whether the operator is as exact."""


def _verifier(view: CanonicalGraph, effects: Effects, training: bool) -> Verifier:
    def verifier(site: Site, overload: str, replaced: Mapping[Node, Node]) -> Verdict:
        operator = getattr(getattr(torch.ops.infuse, site.kind), overload)
        regions = effects.autocast(site.before)
        return verify(view, gated_mlp.alone(site), operator, replaced=replaced, autocast=regions, training=training)

    return verifier


def _failed(site: Site, verdict: Verdict) -> Refusal:
    return Refusal(
        site.kind,
        site.outputs[0],
        f"shadow verification failed: {verdict.failure}",
        "please report the model: a proof or an operator of Infuse is wrong here",
        site.spelling,
    )


class Writer:
    """Puts sites into the graph, in the form that the lowering asks for, and records what became of each.

    kinds: those that are wanted. Without fake tensors in the graph every site is refused. verifier: tries each site
    before it is written.
    """

    def __init__(
        self,
        view: CanonicalGraph,
        kinds: Sequence[str],
        place: Place,
        training: bool,
        run: str,
        verifier: Verifier | None = None,
    ) -> None:
        mode = metadata.fake_mode(view.nodes)
        self.emitter = Emitter(view, mode) if mode is not None else None
        self.kinds = kinds
        self.place = place
        self.training = training
        self.run = run
        self.verifier = verifier
        self.records: list[SiteRecord] = []
        self.packed: list[packed_weights.Packed] = []
        self.summed: dict[Node, Site | None] = {}  # results of linear_add, and the norm that has taken each as its sum

    def ask(self, site: Site) -> Placement | None:
        """What the lowering says to a site; None if it cannot be asked."""
        examples = None if self.emitter is None else self.emitter.examples(site)
        return None if examples is None or isinstance(examples, Refusal) else self._ask(site, examples)

    def _ask(self, site: Site, examples: tuple[object, ...]) -> Placement:
        placement = self.place(site.kind, examples, self.training)
        if not self.training or placement.overload != "default" or site.kind not in kept_inputs.KINDS:
            return placement
        if self.emitter is None or kept_inputs.is_kept(self.emitter.view, site, self.emitter.replaced):
            return placement
        reason = "its input would be saved for a kernel alone"
        if site.kind in kept_inputs.LEFT_TO_PARTS:
            return Placement("", "", declined=reason)
        return Placement("inline", f"decomposition ({reason})")

    def write(self, finding: Finding) -> None:
        """A composite site that cannot be emitted leaves its place to its parts."""
        identity = f"{self.run}.{len(self.records)}"
        written = finding if isinstance(finding, Refusal) or self.emitter is None else self._emit(finding, identity)
        parts = [part for part in finding.parts if part.kind in self.kinds] if isinstance(finding, Site) else []
        if isinstance(written, Refusal) and parts:
            for part in parts:
                self.write(part)
        elif isinstance(written, Placement):
            parts_of = self.stands_for(finding) if isinstance(finding, Site) else ()
            self.records.append(_record(finding, written, identity, parts_of))
        else:
            self.records.append(_record(written, None))

    def stands_for(self, site: Site) -> tuple[SiteRecord, ...]:
        """What a site is where no kernel takes more than its family's operator; () for one that is that already."""
        if site.kind == linear_add.KIND:
            self.summed[site.outputs[0]] = None
        parts = [part for part in _parts(site) if part is site or part.kind in self.kinds]
        records = tuple(_record(part, Placement("", "")) for part in parts)
        records = tuple(self._with_sum(part, record) for part, record in zip(parts, records))
        return () if len(parts) == 1 and records[0].kind == site.kind else records

    def _with_sum(self, site: Site, record: SiteRecord) -> SiteRecord:
        """The first norm of what a linear and a residual add make would have taken in the add."""
        joint = add_norm.KINDS.get(site.kind, "")
        total = self.emitter.view.strip(site.args[0]) if self.emitter is not None and joint in self.kinds else None
        if not isinstance(total, Node) or self.summed.get(total, site) is not None:
            return record
        self.summed[total] = site
        return replace(record, kind=joint, spelling=f"residual add, {record.spelling}")

    def _emit(self, site: Site, identity: str) -> Placement | Refusal:
        assert self.emitter is not None
        examples = self.emitter.examples(site)
        if isinstance(examples, Refusal):
            return examples
        placement = self._ask(site, examples)
        if self.verifier is not None:
            verdict = self.verifier(site, placement.overload, self.emitter.replaced)
            if verdict.failure:
                return _failed(site, verdict)
            placement = replace(placement, verified=verdict.words)
        if site.kind == packed_linear.KIND and placement.overload != "inline":
            return self._emit_packed(site, placement, examples, identity) or placement
        return self.emitter.emit(site, placement, examples, identity) or placement

    def _emit_packed(
        self, site: Site, placement: Placement, examples: tuple[object, ...], identity: str
    ) -> Refusal | None:
        """Packs the weights, which stay what they were if the operator cannot stand there."""
        assert self.emitter is not None
        site, packed = packed_linear.with_packed_weights(self.emitter.view, site, self.emitter.mode)
        if packed is None:
            return self.emitter.emit(site, placement, examples, identity)
        found = self.emitter.examples(site)
        refusal = found if isinstance(found, Refusal) else self.emitter.emit(site, placement, found, identity)
        if refusal is not None:
            packed.undo()
        else:
            self.packed.append(packed)
        return refusal

    def finish(self) -> None:
        """Erases what became dead."""
        if self.emitter is not None:
            self.emitter.clean()
            for packed in self.packed:
                packed.clean()
            self.emitter.view.graph.lint()


def _parts(site: Site) -> Iterator[Site]:
    """The sites that are one on every device, of which a larger one consists."""
    if site.kind not in LARGER:
        yield site
        return
    for part in site.parts:
        yield from _parts(part)


def _root(finding: Finding) -> Node:
    return finding.before if isinstance(finding, Site) else finding.node


def _record(
    finding: Finding, placement: Placement | None, identity: str = "", parts: tuple[SiteRecord, ...] = ()
) -> SiteRecord:
    """placement: what runs there; None for what stays as it is."""
    node = finding.outputs[0] if isinstance(finding, Site) else finding.node
    reason, remedy = (finding.reason, finding.remedy) if isinstance(finding, Refusal) else ("", "")
    if placement is None and not reason:
        reason, remedy = "the graph has no fake tensors to check the rewrite with", "compile with torch.compile"
    return SiteRecord(
        kind=finding.kind,
        status="refused" if placement is None else "rewritten",
        name=node.name,
        module=module_path(node),
        source=source_line(node),
        spelling=finding.spelling,
        kernel=placement.kernel if placement else "",
        reason=reason,
        remedy=remedy,
        verified=placement.verified if placement else "",
        missing=placement.missing if placement else "",
        id=identity,
        parts=parts,
    )


def module_path(node: Node) -> str:
    """The innermost module a node was traced in, as its name in the model: "layers.0.attn"."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['\w+'\]|^L__\w+__|^self(?=\.|$)", "", path)
    path = re.sub(r"\._modules(?=[.\[])", "", path)
    return re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path).lstrip(".")


def source_line(node: Node) -> str:
    """ "file.py:123" of the innermost frame outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return f"{_shorten(own[-1][0])}:{own[-1][1]}" if own else ""


def _shorten(path: str) -> str:
    """Relative to the working directory or to site-packages."""
    if "site-packages" + os.sep in path:
        return path.rpartition("site-packages" + os.sep)[2]
    here = str(Path.cwd()) + os.sep
    return path.removeprefix(here)


def _folder(module: ModuleType) -> str:
    return str(Path(module.__file__ or "").parent) + os.sep


_TORCH = _folder(torch)
