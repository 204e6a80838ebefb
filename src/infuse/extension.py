"""A user's own operators, patterns and kernels, under the rules of Infuse's: legality, verification, report, caches.

`examples/softsign_gate.py` adds a gated activation from end to end.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infuse import caches, settings
from infuse.lowering import user_kernels
from infuse.ops import user_operator
from infuse.patterns import by_example, passes
from infuse.patterns.by_example import Function
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Finding, Make, Refusal, Site

__all__ = ["CanonicalGraph", "Make", "Refusal", "Site", "register_kernel", "register_pattern"]

Matcher = Callable[[CanonicalGraph, torch.fx.Node], "Finding | None"]
_DEFAULT_SHAPE = (4, 8)
_registered: dict[str, str] = {}  # what was registered under a name -> its identity


def register_pattern(
    kind: str,
    *,
    formula: Function | None = None,
    example: Function | None = None,
    match: Matcher | None = None,
    anchors: Sequence[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    version: str = "",
) -> None:
    """Teaches Infuse to recognise something: a new operator, or another spelling of one that it has.

    kind: the operator's name, and that of the family in `patterns=`, reports and tests.
    formula: the operator in plain torch, with annotated parameters (Tensor, Tensor | None, float, int, bool) and one
        Tensor as the result; None for another spelling of an operator that exists.
    example: the source to look for, as a function of the operator's tensors; by default the formula. It is traced, and
        compared with the formula in numbers. shapes: of its tensors, where their sizes should relate otherwise than
        all being (4, 8); sizes that are equal here are required to be equal.
    match: for what no example can say, a matcher: told the canonical view of a graph and a node whose operation is one
        of `anchors`, it returns a Site, a Refusal or None. It has to prove what it claims; `verify="compile"` tests it.
    version: change it when something that these functions rely on changes outside their source.

    Register before infuse.options() and torch.compile. Doing the same again has no effect.
    Raises ValueError for a pattern that is none or computes something else, or a kind that is taken.
    """
    if (example is not None) and (match is not None):
        raise ValueError(f"infuse.register_pattern: {kind}: got example and match, expected one of them")
    source = match or example or formula
    if source is None:
        raise ValueError(f"infuse.register_pattern: {kind}: got none of formula, example and match, expected one")
    if formula is None and not hasattr(torch.ops.infuse, kind):
        raise ValueError(f"infuse.register_pattern: {kind}: got no formula, expected one for a new operator")
    label = f"pattern {kind} {source.__qualname__}"
    identity = _identity(kind, formula, example, match, tuple(anchors), sorted((shapes or {}).items()), version)
    if _is_known(label, identity):
        return
    if formula is not None and user_kernels.has_operator(kind):
        raise ValueError(f"infuse.register_pattern: {kind}: got another formula, expected None for another spelling")
    if match is not None:
        if not anchors:
            raise ValueError(f"infuse.register_pattern: {kind}: got no anchors, expected the words to ask match about")
        family = passes.Family(kind, tuple(anchors), match)
    else:
        family = _family_of(kind, formula, example or formula, shapes)
    if formula is not None:
        user_operator.define(kind, formula)
        user_kernels.add_operator(kind, formula)
        settings.add_pattern(kind)
    passes.add_family(family)
    _remember(label, identity)


def register_kernel(
    kind: str,
    function: Callable[..., object],
    *,
    device: str = "cuda",
    can_run: user_kernels.Predicate | None = None,
    runs_well: user_kernels.Predicate | None = None,
    version: str = "",
) -> None:
    """Adds a kernel for the forward of an operator that register_pattern made.

    function: takes the operator's arguments by name and `out`, a contiguous tensor that it writes the result into.
    can_run: takes the arguments, tensors without data, and returns True, or False or the reason why not.
    runs_well: likewise, whether to take the kernel where nothing is measured. Under max-autotune on a GPU it is timed
        against the formula, with what its neighbours can no longer fuse; with kernels="always" it runs where it can.
    version: change it when something that the function relies on changes outside its source.
    Raises ValueError for an operator that has no formula here, or when another kernel has the place.
    """
    if not user_kernels.has_operator(kind):
        raise ValueError(f"infuse.register_kernel: got {kind!r}, expected a kind that register_pattern gave a formula")
    label = f"kernel {kind} {device}"
    identity = _identity(kind, function, can_run, runs_well, version)
    if _is_known(label, identity):
        return
    user_kernels.add_kernel(kind, function, device, can_run, runs_well, identity)
    _remember(label, identity)


def _is_known(label: str, identity: str) -> bool:
    known = _registered.get(label, identity)
    if known != identity:
        raise ValueError(f"infuse: {label}: got another one under the same name, expected it to be registered once")
    return label in _registered


def _remember(label: str, identity: str) -> None:
    _registered[label] = identity
    caches.add_source(f"{label} {identity}")


def _identity(*parts: object) -> str:
    """A hash of the text of functions and the values of the rest."""
    text = "\0".join(_text(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(part: object) -> str:
    if not callable(part):
        return repr(part)
    closure = [cell.cell_contents for cell in getattr(part, "__closure__", None) or ()]
    try:
        source = inspect.getsource(part)
    except (OSError, TypeError):
        code = getattr(part, "__code__", None)
        source = repr((code.co_code, code.co_names, code.co_consts)) if code is not None else repr(part)
    return source + "".join(_text(value) for value in closure)


def _family_of(
    kind: str, formula: Function | None, example: Function | None, shapes: Mapping[str, tuple[int, ...]] | None
) -> passes.Family:
    assert example is not None
    compute = formula or getattr(torch.ops.infuse, kind).inline
    parameters = _parameters(kind, formula)
    names = list(inspect.signature(example).parameters)
    sizes = {name: (shapes or {}).get(name, _DEFAULT_SHAPE) for name in names}
    pattern = by_example.trace(kind, example, parameters, sizes)
    if not _is_same(compute, example, parameters, sizes):
        raise ValueError(f"infuse.register_pattern: {kind}: the example computes something else than the formula")
    higher = (by_example.with_leading(sizes, leading) for leading in ((3,), (2, 3)))
    any_rank = pattern.any_rank and all(_is_same(compute, example, parameters, shapes) for shapes in higher)
    rounding = _rounding(compute, example, parameters, sizes)
    pattern = replace(pattern, any_rank=any_rank, rounding=rounding)
    return passes.Family(kind, (pattern.anchor,), pattern.match, pattern.concerns)


def _parameters(kind: str, formula: Function | None) -> dict[str, object]:
    """The operator's parameters with their defaults, None for none."""
    if formula is None:
        return {item.name: item.default_value for item in getattr(torch.ops.infuse, kind).inline._schema.arguments}
    user_operator.schema_of(formula)
    parameters = inspect.signature(formula).parameters.values()
    return {item.name: None if item.default is inspect.Parameter.empty else item.default for item in parameters}


def _run(
    compute: Callable[..., Tensor],
    example: Function,
    parameters: Mapping[str, object],
    sizes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The formula's result and the example's."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    return compute(*{**parameters, **tensors}.values()), example(**tensors)


def _is_same(
    compute: Callable[..., Tensor],
    example: Function,
    parameters: Mapping[str, object],
    sizes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Whether formula and example compute the same in float64."""
    try:
        got, expected = _run(compute, example, parameters, sizes, torch.float64)
    except (RuntimeError, ValueError, IndexError):
        return False
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def _rounding(
    compute: Callable[..., Tensor],
    example: Function,
    parameters: Mapping[str, object],
    sizes: Mapping[str, tuple[int, ...]],
) -> str:
    """Where the formula rounds and the example does not, "" if nowhere."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    same = all(torch.equal(*_run(compute, example, parameters, sizes, dtype)) for dtype in dtypes)
    return "" if same else "the formula rounds elsewhere than the source"
