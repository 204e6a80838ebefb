"""Shadow verification: runs a site's source and the operator that would take its place, and compares both to float64.

Proofs can have gaps and operators bugs. Under `verify="compile"` each site is tried, before it is rewritten, on
ordinary and on awkward values of its own sizes, strides and dtypes, in training with the gradients too. The operator
passes if it is about as near to the float64 result as the source is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.shadow_inputs import Case, cases, floats, values
from infuse.patterns.shadow_source import CannotRun, Source, differentiable, sizes_and_strides, source_of
from infuse.patterns.sites import Make, Site

# The two errors are independent draws of one distribution, the ratio of their norms rarely over 2; of their maxima, 4.
_FACTOR_OF_NORMS, _FACTOR_OF_MAXIMA = 2.0, 4.0
# Where the source itself is this far off, saturated by large values, its error says nothing about the operator's.
_HOPELESS = 0.05
_CPU_BUDGET_BYTES = 2**32
_MAX_VERDICTS = 4096
_verdicts: dict[str, Verdict] = {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """words: for the report, when nothing speaks against the rewrite. failure: what does."""

    words: str
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A site's source and operator, ready to run. autocast: arguments of the regions that the site lies in."""

    source: Source
    operator: Any
    kind: str
    masks: tuple[Node, ...]
    autocast: tuple[tuple[Any, ...], ...]
    training: bool


def verify(
    view: CanonicalGraph,
    site: Site,
    operator: Any,
    *,
    replaced: Mapping[Node, Node],
    autocast: Sequence[Node],
    training: bool,
) -> Verdict:
    """Tries the operator that would take a site's place. Sites that are the same but for their place are tried once.

    replaced: what earlier rewrites put in the place of nodes. autocast: the nodes that entered the regions around it.
    """
    if site.writes:
        return Verdict("not verified: it writes in place")
    regions = tuple(tuple(node.args) for node in autocast)
    verdict = Verdict("not verified")
    with _undisturbed():
        for widened in (False, True):
            try:
                source = source_of(view, site, replaced, widened)
                trial = Trial(source, operator, site.kind, _masks(operator, source), regions, training)
                key = f"{operator} {training} {regions}\n{source.describe()}"
                if key not in _verdicts:
                    if len(_verdicts) >= _MAX_VERDICTS:
                        _verdicts.clear()
                    _verdicts[key] = _try(trial)
                verdict = _verdicts[key]
            except (CannotRun, metadata.MissingMetadata) as error:
                return verdict if verdict.failure else Verdict(f"not verified: {error}")
            if not verdict.failure:
                return verdict
    if unknown := [leaf.name for leaf in source.unknown if not _is_float(metadata.value(leaf))]:
        return Verdict(f"not verified: the source reads {', '.join(unknown)}, whose values are not known here")
    return verdict


def forget() -> None:
    """Forgets what was tried before."""
    _verdicts.clear()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Real tensors, whatever mode is on, and everybody's random numbers as they would have been without this."""
    with _disable_current_modes(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _masks(operator: Any, source: Source) -> tuple[Node, ...]:
    names = [argument.name for argument in operator._schema.arguments]
    data = (_data(arg) for name, arg in zip(names, source.args) if "mask" in name)
    return tuple(node for node in data if node is not None)


def _data(arg: object) -> Node | None:
    """The node whose numbers an argument has; others in it may give sizes only."""
    while isinstance(arg, Make):
        arg = arg.args[0]
    return arg if isinstance(arg, Node) else None


def _try(trial: Trial) -> Verdict:
    needed, allowed = _bytes_needed(trial), _budget_bytes(trial)
    if needed > allowed:
        raise CannotRun(f"that would take about {needed / 2**30:.1f} GiB, {allowed / 2**30:.1f} GiB are allowed")
    worst = (0.0, 0.0)
    for case in cases(trial.kind):
        errors, failure = _run_case(trial, case)
        if failure:
            return Verdict("", f"on {case.name} values, {failure}")
        if case.name == "random":
            worst = errors
    return Verdict(f"verified: error {worst[0]:.1e}, the source's {worst[1]:.1e}")


def _run_case(trial: Trial, case: Case) -> tuple[tuple[float, float], str]:
    """((worst error of the operator, of the source there), failure)"""
    given = values(trial.source.leaves, trial.masks, case)
    wanted = differentiable(trial.source.leaves) if trial.training and case.gradients else ()
    try:
        with _regions(trial.autocast):
            expected = _results(trial.source.run, given, wanted)
        with _no_autocast():
            exact = _results(lambda leaves: trial.source.run(leaves, exact=True), floats(given), wanted)
    except Exception as error:  # it may be anything: the values are made up
        raise CannotRun(f"the source alone does not run on {case.name} values: {_first_line(error)}") from error
    try:
        with _regions(trial.autocast):
            got = _results(lambda leaves: trial.source.run_operator(trial.operator, leaves), given, wanted)
    except Exception as error:
        return (0.0, 0.0), f"the operator raised {_first_line(error)}"
    worst = (0.0, 0.0)
    for index, (mine, source, reference) in enumerate(zip(got, expected, exact)):
        is_gradient = index >= len(trial.source.outputs)
        what = "a gradient" if is_gradient else f"output {index}"
        # A fused backward recomputes the softmax, with an error that grows with the scores.
        roundings = 4 if is_gradient and trial.kind == "attention" else 1
        errors, failure = _compare(mine, source, reference, case, roundings)
        if failure:
            return errors, f"{what}: {failure}"
        worst = max(worst, errors)
    return worst, ""


def _results(run: Any, given: Mapping[Node, Any], wanted: Sequence[Node]) -> list[Tensor]:
    """Outputs, and the gradients of a weighted sum of them."""
    leaves = {leaf: _fresh(value, leaf in wanted) for leaf, value in given.items()}
    with torch.set_grad_enabled(bool(wanted)):
        outputs = list(run(leaves))
    loss: Any = 0
    for index, output in enumerate(outputs):
        if output.requires_grad:
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(index))
            loss = loss + (output.double() * weights.to(output.device).double()).sum()
    if not wanted or not isinstance(loss, Tensor):
        return outputs
    inputs = [leaves[leaf] for leaf in wanted]
    with _no_autocast():
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [*outputs, *(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, inputs))]


def _fresh(value: Any, wants_grad: bool) -> Any:
    return value.detach().requires_grad_() if wants_grad else value


def _compare(got: Tensor, source: Tensor, exact: Tensor, case: Case, roundings: int) -> tuple[tuple[float, float], str]:
    """((operator's error, source's error), why that is too much)"""
    if got.shape != source.shape or got.dtype != source.dtype:
        return (0.0, 0.0), f"got {got.dtype} {tuple(got.shape)}, expected {source.dtype} {tuple(source.shape)}"
    if not source.is_floating_point():
        return (0.0, 0.0), "" if torch.equal(got, source) else "it differs"
    finite = source.isfinite() & exact.isfinite()
    if not bool(got.isfinite()[finite].all()):
        return (0.0, 0.0), "it is not finite where the source is"
    if case.not_a_number and bool((got.isfinite() & source.isnan() & exact.isnan()).any()):
        return (0.0, 0.0), "it hides a NaN that the source shows"
    mine, theirs = (_errors(value[finite], exact[finite]) for value in (got, source))
    granted = roundings * _granted(source.dtype)
    if theirs[0] < _HOPELESS:
        for error, reference, factor in zip(mine, theirs, (_FACTOR_OF_NORMS, _FACTOR_OF_MAXIMA)):
            if not error <= max(factor * reference, factor * granted):
                return (mine[0], theirs[0]), f"its error is {error:.1e}, the source's {reference:.1e}"
    return (mine[0], theirs[0]), ""


def _errors(values: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative errors in the 2-norm and in the maximum norm; absolute ones where the reference is zero."""
    if not exact.numel():
        return 0.0, 0.0
    exact = exact.detach()
    difference = values.detach().double() - exact
    errors = []
    for order in (2, math.inf):
        size, scale = (float(torch.linalg.vector_norm(value, order)) for value in (difference, exact))
        errors.append(size / scale if scale > 0 else size)
    return errors[0], errors[1]


def _granted(dtype: torch.dtype) -> float:
    """What is no sign of a mistake: one rounding; in float32, where the order of summation rules, a few sums'."""
    return torch.finfo(dtype).eps / 2 * (64 if dtype in (torch.float32, torch.float64) else 2)


@contextlib.contextmanager
def _regions(autocast: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache_enabled in autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled))
        yield


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _bytes_needed(trial: Trial) -> int:
    """About what the source's run in float64 and two in its own dtype keep; with gradients, twice that."""
    numbers = sum(map(_numel, (*trial.source.leaves, *trial.source.nodes)))
    numbers += sum(_scores_inside(node) for node in trial.source.nodes)
    return numbers * 16 * (2 if trial.training else 1)


def _scores_inside(node: Node) -> int:
    """How many numbers a call of torch's SDPA makes on its way, if it has no fused kernel."""
    name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
    if name != "scaled_dot_product_attention" or len(node.all_input_nodes) < 2:
        return 0
    (q, _), (k, _) = (sizes_and_strides(metadata.value(item)) for item in node.all_input_nodes[:2])
    return 3 * math.prod(q[:-1]) * k[-2]


def _budget_bytes(trial: Trial) -> int:
    """On a GPU half of what is free: the model's own weights are there already."""
    values = (metadata.value(leaf) for leaf in trial.source.leaves)
    device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CPU_BUDGET_BYTES


def _numel(node: Node) -> int:
    value = metadata.value(node)
    items = value if isinstance(value, (tuple, list)) else (value,)
    return sum(math.prod(sizes_and_strides(item)[0]) for item in items if isinstance(item, Tensor))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
