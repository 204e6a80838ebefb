"""One model in one configuration: its true counts, what Infuse makes of it, and how exact the result is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from census.counting import KINDS, TrueSite, counts, find
from census.trace import record
from coverage_rows import MEANS, CoverageRow
from torch import Tensor, nn
from zoo.entry import Entry

from infuse import backend
from infuse.report import SiteRecord

# A run is as exact as eager if its error is at most this many times eager's, the two being independent draws of one
# size, or within the errors of a few operations, since eager may be exact by luck.
FACTOR = 2.0
GRANTED = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Of the largest gradient's norm: below it a gradient counts as zero. The backward of fused attention takes a row's sum
# from the rounded output, so a gradient of q that cancels to nearly nothing is as exact as that output, no more.
NEGLIGIBLE = 1e-2
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Configuration:
    training: bool = False
    dtype: torch.dtype = torch.float32
    dynamic: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(slots=True)
class Result:
    """A row, and what it was made from: for reading, not for keeping."""

    row: CoverageRow
    true_sites: list[TrueSite]
    records: list[SiteRecord]


class Capture:
    """A torch.compile backend that rewrites each graph by Infuse's own pass and runs the result eagerly.

    records: of every execution of a graph. in_graph: true sites of the graphs as they were captured.
    """

    def __init__(self) -> None:
        self.rewrite = backend.inductor_config(None, None)["pre_grad_custom_pass"]
        self.records: list[SiteRecord] = []
        self.in_graph: list[TrueSite] = []
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found: list[SiteRecord] = []
        stop = backend.on_rewrite(found.extend)
        try:
            rewritten = self._rewritten(gm)
        finally:
            stop()
        self.graphs += 1

        def run(*values: Any) -> Any:
            with torch.random.fork_rng(devices=()):
                self.in_graph += find(record(gm.forward, *_copies(values)))
            self.records += found
            return rewritten.forward(*values)

        return run

    def _rewritten(self, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """A rewritten copy, with the subgraphs of higher-order operators, which Inductor hands to the pass as well."""
        copied = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        for name in {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}:
            if isinstance(getattr(gm, name, None), torch.fx.GraphModule):
                setattr(copied, name, self._rewritten(getattr(gm, name)))
        self.rewrite(copied.graph)
        copied.graph.lint()
        copied.recompile()
        return copied


def _copies(values: Sequence[Any]) -> list[Any]:
    """Copies of what a graph may write to; parameters stay as they are, and what they are."""
    is_input = [isinstance(value, Tensor) and not isinstance(value, nn.Parameter) for value in values]
    return [value.detach().clone() if copied else value for value, copied in zip(values, is_input)]


def measure(
    entry: Entry,
    configuration: Configuration,
    run_id: str = "run",
    compiled: str = "",
    labels: Mapping[str, str] | None = None,
) -> Result:
    """Builds, counts, captures, compares. What a model raises ends up in the row.

    compiled: "" runs the rewritten graphs eagerly; "inductor" compiles with Infuse and with stock Inductor instead, and
    takes stock's error for the bound. labels: the row's gpu, torch and commit.
    """
    training, dtype, dynamic = configuration.training, configuration.dtype_name, configuration.dynamic
    row = CoverageRow(run_id, entry.name, training, dtype, dynamic, **(labels or {}))  # type: ignore[arg-type]
    result = Result(row, [], [])
    try:
        with _time_limit(TIMEOUT_S):
            _measure(entry, configuration, result, compiled)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''} ({where})"
        result.row = dataclasses.replace(result.row, error=text[:300])
    return result


def _measure(entry: Entry, configuration: Configuration, result: Result, compiled: str) -> None:
    module, args, kwargs = prepared(entry, configuration)
    counted = copy.deepcopy(module)
    result.true_sites = find(record(counted, *args, root=counted, **kwargs))
    capture = Capture()
    torch._dynamo.reset()
    got = _run(copy.deepcopy(module), args, kwargs, configuration, backend=capture)
    result.records = capture.records
    seen = counts(result.true_sites)
    possible = counts(result.true_sites, certain=False)
    true = seen if entry.counts is None else {kind: number for kind, number in entry.counts.items() if number}
    fused, refused = tally(capture.records, "rewritten"), tally(capture.records, "refused")
    captured = counts(capture.in_graph)
    in_graph, over = {}, {}
    for kind in KINDS:
        outside = max(0, seen.get(kind, 0) - captured.get(kind, 0))
        in_graph[kind] = max(true.get(kind, 0) - outside, min(true.get(kind, 0), fused[kind]))
        over[kind] = fused[kind] - (possible.get(kind, 0) if entry.counts is None else true.get(kind, 0))
    reasons = Counter(f"{site.kind}: {site.reason}" for site in capture.records if site.status == "refused")
    result.row = dataclasses.replace(
        result.row,
        true=true,
        in_graph={kind: number for kind, number in in_graph.items() if number},
        fused={kind: min(number, in_graph[kind]) for kind, number in fused.items() if in_graph[kind]},
        refused=dict(refused),
        over={kind: number for kind, number in over.items() if number > 0},
        reasons=dict(reasons),
        graphs=capture.graphs,
    )
    if compiled:
        torch._dynamo.reset()
        got = _run(copy.deepcopy(module), args, kwargs, configuration, backend="infuse")
        torch._dynamo.reset()
        baseline = _run(copy.deepcopy(module), args, kwargs, configuration, backend=compiled)
    else:
        baseline = _run(copy.deepcopy(module), args, kwargs, configuration)
    if not (entry.random and configuration.training):
        _compare(entry, configuration, result, got, baseline)


def prepared(entry: Entry, configuration: Configuration) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the zoo with its arguments in a configuration."""
    random.seed(0)
    torch.manual_seed(0)
    module = randomised(entry.build())
    args, kwargs = entry.inputs()
    module = module.to(configuration.dtype).train(configuration.training)
    if entry.prepare is not None:
        entry.prepare(module, configuration.dtype)
    return module, _cast(args, configuration.dtype), _cast(kwargs, configuration.dtype)


def randomised(module: nn.Module) -> nn.Module:
    """Norm weights near one and biases near zero, but neither: a weight that is left out must show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if name.endswith(("weight", "scale")) and bool((parameter == 1).all()) else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
            elif not parameter.isfinite().all() or not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return module


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def convert(value: Any) -> Any:
        return value.to(dtype, copy=True) if isinstance(value, Tensor) and value.is_floating_point() else value

    return torch.utils._pytree.tree_map(convert, tree)


def tally(records: Sequence[SiteRecord], status: str) -> Counter[str]:
    """Sites of a status in the kinds of the true counts."""
    result: Counter[str] = Counter()
    for site in records:
        if site.status == status:
            result.update(MEANS.get(site.kind, {}))
    return result


@dataclass(frozen=True, slots=True)
class Outcome:
    outputs: list[Tensor]
    gradients: list[Tensor | None]


def _run(module: nn.Module, args: Any, kwargs: Any, configuration: Configuration, backend: Any = None) -> Outcome:
    """Outputs, and in training the gradients of all parameters for a random weighted sum of the outputs."""
    torch.manual_seed(1)
    function: Callable[..., Any] = module
    if backend is not None:
        function = torch.compile(module, backend=backend, dynamic=configuration.dynamic)
    with torch.set_grad_enabled(configuration.training):
        outputs = list(float_tensors(function(*args, **kwargs)))
    if not configuration.training:
        return Outcome(outputs, [])
    generator = torch.Generator().manual_seed(2)
    terms = [
        (output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
        for output in outputs
        if output.requires_grad
    ]
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(torch.stack(terms).sum(), wanted, allow_unused=True)
    return Outcome([output.detach() for output in outputs], list(gradients))


def float_tensors(tree: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, in order, without caches."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
        elif tree.is_complex():
            yield torch.view_as_real(tree)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from float_tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from float_tensors(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for item in dataclasses.fields(tree):
            yield from float_tensors(getattr(tree, item.name))


def _compare(entry: Entry, configuration: Configuration, result: Result, got: Outcome, baseline: Outcome) -> None:
    exact = _exact(entry, configuration)
    output = _worst(got.outputs, baseline.outputs, exact.outputs)
    gradient = _worst(got.gradients, baseline.gradients, exact.gradients) if configuration.training else None
    granted = GRANTED[configuration.dtype]
    pairs = [pair for pair in (output, gradient) if pair is not None]
    accurate = all(mine <= max(FACTOR * theirs, granted) for mine, theirs in pairs)
    if entry.discrete and not accurate and configuration.dtype != torch.float32:
        accurate = all(mine <= 1 for mine, _ in pairs)
    result.row = dataclasses.replace(
        result.row,
        output_error=output[0],
        eager_output_error=output[1],
        grad_error=gradient[0] if gradient else None,
        eager_grad_error=gradient[1] if gradient else None,
        accurate=accurate,
    )


def _exact(entry: Entry, configuration: Configuration) -> Outcome:
    """The same weights and inputs, rounded to the configuration's dtype, computed in float64."""
    module, args, kwargs = prepared(entry, configuration)
    wide = dataclasses.replace(configuration, dtype=torch.float64)
    try:
        return _run(copy.deepcopy(module).double(), _cast(args, torch.float64), _cast(kwargs, torch.float64), wide)
    except RuntimeError:  # a model that can't do without float32
        return _run(copy.deepcopy(module).float(), _cast(args, torch.float32), _cast(kwargs, torch.float32), wide)


def _worst(
    got: Sequence[Tensor | None], baseline: Sequence[Tensor | None], exact: Sequence[Tensor | None]
) -> tuple[float, float]:
    """The largest error of `got`, and of `baseline`, relative to the norm of each exact tensor.

    A tensor whose norm is a negligible part of all is measured by that part.
    """
    assert len(got) == len(baseline) == len(exact), (len(got), len(baseline), len(exact))
    norms = [float(torch.linalg.vector_norm(_finite(value))) for value in exact if value is not None]
    floor = NEGLIGIBLE * max(norms, default=0.0)
    worst = [0.0, 0.0]
    for mine, theirs, reference in zip(got, baseline, exact):
        if reference is None:
            continue
        norm = max(float(torch.linalg.vector_norm(_finite(reference))), floor, 1e-30)
        for i, value in enumerate((mine, theirs)):
            difference = _finite(reference) if value is None else _finite(value) - _finite(reference)
            error = float(torch.linalg.vector_norm(difference)) / norm
            worst[i] = max(worst[i], error if error == error else float("inf"))
    return worst[0], worst[1]


def _finite(value: Tensor) -> Tensor:
    """In float64; infinities, which masks put into outputs, become large numbers of their sign."""
    wide = value.detach().double()
    return torch.where(wide.isinf(), wide.sign() * 1e4, wide)


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
