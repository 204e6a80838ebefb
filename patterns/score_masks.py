"""Masks of attention scores: what is added to them, what overwrites them, and the one mask they make together.

A mask overwrites scores by -inf or by a finite number so low that no weight is left, unless a row is masked whole: that
gives NaN with -inf, and with a number the mean of all values. The operator has an argument for it, `masked_rows`; where
it is proven that no row is masked whole, nothing needs to be done about it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from infuse.patterns.axes import Dims, aligned
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.masks import written_since
from infuse.patterns.scales import constant, rounded
from infuse.patterns.sites import Make, arguments_of

# A number that overwrites masked scores: the largest that counts as masking, and the largest in whose neighbourhood a
# score vanishes by rounding, so that overwriting is the same as adding.
MASKING = -1e4
ABSORBING = -1e30
# A row of numbers no lower than this keeps its sum in the log-sum-exp, which backwards are computed from: float32's are
# 0.001 apart there.
LOW = -1e4
_MAX_DEPTH = 12
# Sums of products of numbers, and functions with a bounded result.
_BOUNDED = ("linear", "matmul", "bmm", "einsum", "sigmoid", "tanh", "softmax", "cos", "sin")
_SAME_VALUES = ("alias", "cast", "expand", "reshape", "permute", "slice", "repeat", "index", "repeat_interleave")


@dataclass(frozen=True, slots=True)
class Added:
    """A float tensor that is added to the scores; its dims."""

    value: object
    dims: Dims


@dataclass(frozen=True, slots=True)
class Filled:
    """Scores overwritten by a number where `condition` is `where`."""

    condition: Node
    dims: Dims
    where: bool
    value: float


Term = Added | Filled
Place = Callable[[object, Dims], object | None]


@dataclass(frozen=True, slots=True)
class Mask:
    """The operator's mask and masked_rows."""

    argument: object
    masked_rows: str


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why masks cannot be one."""

    reason: str
    remedy: str


def added_to(view: CanonicalGraph, mask: object, scores: Dims, scale: object = 1.0) -> tuple[Term, ...] | Unfit:
    """The mask that torch's own attention takes, or that is added to scores and then multiplied by `scale`."""
    tensor = view.tensor(mask)
    if tensor is None or not isinstance(mask, Node) or not (tensor.dtype == torch.bool or tensor.is_floating_point()):
        return Unfit("the mask is no bool or float tensor", "pass a bool mask, or a float one that is added")
    dims = aligned(tensor.shape, scores)
    if dims is None:
        sizes = tuple(math.prod((axis.size for axis in axes), start=1) for axes in scores)
        return Unfit(
            f"the mask's shape {tuple(tensor.shape)} is not provably broadcastable to {sizes}",
            "give the mask the shape [B or 1, H or 1, S or 1, T]",
        )
    if tensor.dtype == torch.bool:
        return (Filled(mask, dims, False, -math.inf),)
    return (Added(mask if scale == 1.0 else Make(torch.mul, (mask, scale)), dims),)


def build(
    view: CanonicalGraph, terms: Sequence[Term], place: Place, dtype: torch.dtype, zero_rows: bool, trains: bool
) -> Mask | Unfit:
    """One mask out of all, the last applied first in `terms`.

    place: brings a tensor into the operator's dimensions. dtype: q's. zero_rows: whether the source gives zeros for a
    row that is masked whole. trains: whether q or k need a gradient.
    """
    if not terms:
        return Mask(None, "zeros" if zero_rows else "none")
    added = [term for term in terms if isinstance(term, Added)]
    filled = [term for term in terms if isinstance(term, Filled)]
    mask_dtype = _dtype(view, added, dtype)
    if mask_dtype == torch.float64 != dtype:
        return Unfit(f"the mask is float64 beside q in {dtype}", "cast the mask to float32")
    placed = {id(term): _placed(view, term, place) for term in terms}
    if None in placed.values():
        return Unfit("a mask's dimensions are not those of the scores", "give the mask the shape [B, H, S, T]")
    if not added:
        return _overwritten(filled, placed, zero_rows) or _mixed(view, terms, placed, mask_dtype, zero_rows, trains)
    if not filled:
        total = functools.reduce(_add, [placed[id(term)] for term in added])
        return Mask(_cast(total, view, added, mask_dtype), "zeros" if zero_rows else _rows_of(view, added, trains))
    return _mixed(view, terms, placed, mask_dtype, zero_rows, trains)


def emptying(view: CanonicalGraph, terms: Sequence[Term]) -> Filled | None:
    """The term that is applied last, if zeros for what it overwrites are the same as -inf there and empty rows of 0.

    That is so if its number lies below all scores that it leaves, but for -inf.
    """
    if not terms or not isinstance(terms[0], Filled):
        return None
    last, rest = terms[0], terms[1:]
    moderate = all(isinstance(term, Added) and never_below(view, term.value, LOW) for term in rest)
    absorbs = -math.inf < last.value <= ABSORBING
    lower = all(isinstance(term, Added) or term.value == -math.inf for term in rest)
    return last if moderate or (absorbs and lower) else None


def emptied(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The same terms, the last applied with -inf where others could leave a weight beside its number."""
    last = terms[0]
    return (replace(last, value=-math.inf), *terms[1:]) if isinstance(last, Filled) and len(terms) > 1 else terms


def _rows_of(view: CanonicalGraph, added: Sequence[Added], trains: bool) -> str:
    """What becomes of a row that added masks mask whole: `masked_rows` of a softmax that is written out."""
    if all(never_below(view, term.value, LOW if trains else -math.inf) for term in added):
        return "none"
    return "softmax" if trains else "nan"


def _dtype(view: CanonicalGraph, added: Sequence[Added], dtype: torch.dtype) -> torch.dtype:
    """What the sum of masks is: in q's dtype or wider."""
    dtypes = [view.dtype(node) for term in added for node in arguments_of(term.value)]
    total = functools.reduce(torch.promote_types, [item for item in dtypes if item is not None], torch.bool)
    if total in (torch.bool, dtype):
        return dtype
    return torch.float64 if total == torch.float64 else torch.float32


def _placed(view: CanonicalGraph, term: Term, place: Place) -> object | None:
    if isinstance(term, Added):
        return place(term.value, term.dims)
    attends, node = not term.where, term.condition
    while (inner := negated(view, node)) is not None and not written_since(view, inner, node):
        attends, node = not attends, inner
    condition = place(node, term.dims)
    return condition if condition is None or attends else Make(torch.logical_not, (condition,))


def negated(view: CanonicalGraph, node: Node) -> Node | None:
    """The bool mask that a node is the negation of."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].strip("_")
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    is_not = name in ("invert", "logical_not", "bitwise_not")
    is_zero = name == "eq" and len(node.args) == 2 and node.args[1] in (0, False) and not node.kwargs
    source = node.args[0]
    return source if (is_not or is_zero) and view.dtype(source) == torch.bool else None


def _overwritten(filled: Sequence[Filled], placed: dict[int, object], zero_rows: bool) -> Mask | None:
    """A bool mask, where all numbers mean the same."""
    values = {term.value for term in filled}
    if len(values) > 1:
        return None
    total = functools.reduce(
        lambda left, right: Make(torch.logical_and, (left, right)), [placed[id(term)] for term in filled]
    )
    return Mask(total, "zeros" if zero_rows else "nan" if values == {-math.inf} else "mean")


def _mixed(
    view: CanonicalGraph,
    terms: Sequence[Term],
    placed: dict[int, object],
    dtype: torch.dtype,
    zero_rows: bool,
    trains: bool,
) -> Mask | Unfit:
    """A float mask, from the term applied first to the one applied last.

    A finite number becomes the lowest one, beside which a score vanishes: a row that is masked whole comes out as
    written. Only its gradient does not, since the source's overwritten scores have none. Where that could matter, and
    the number has the last word, it becomes -inf and `masked_rows` "mean".
    """
    numbers = {term.value for term in terms if isinstance(term, Filled)}
    finite = numbers - {-math.inf}
    bounded = all(never_below(view, term.value, -math.inf) for term in terms if isinstance(term, Added))
    added_later = isinstance(terms[0], Added) or _alternate(terms)
    only_finite = bool(finite) and len(finite) == len(numbers)
    is_mean = only_finite and bounded and not added_later and (trains or dtype == torch.float16)
    if finite and not is_mean and (dtype == torch.float16 or (added_later and max(finite) > ABSORBING)):
        return Unfit(
            "the scores are overwritten by a finite number and masked in another way too",
            "overwrite them by -inf, or use a single mask",
        )
    lowest = -math.inf if is_mean else max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    total = Make(torch.ops.aten.to.dtype, (_chain(terms, placed, lowest), dtype))
    if zero_rows or is_mean:
        return Mask(total, "zeros" if zero_rows else "mean")
    return Mask(total, "none" if only_finite and bounded and not added_later else "nan")


def _alternate(terms: Sequence[Term]) -> bool:
    """Whether something is added between two overwritings, or after one."""
    kinds = [isinstance(term, Added) for term in terms]
    return kinds != sorted(kinds)


def _chain(terms: Sequence[Term], placed: dict[int, object], lowest: float) -> object:
    total: object = None
    for term in reversed(terms):
        item = placed[id(term)]
        if isinstance(term, Added):
            total = item if total is None else Make(torch.add, (total, item))
        else:
            value = -math.inf if term.value == -math.inf else lowest
            total = Make(torch.where, (item, 0.0 if total is None else total, value))
    return total


def _add(left: object, right: object) -> object:
    return Make(torch.add, (right, left))


def _cast(total: object, view: CanonicalGraph, added: Sequence[Added], dtype: torch.dtype) -> object:
    own = {view.dtype(node) for term in added for node in arguments_of(term.value) if view.tensor(node) is not None}
    return total if own == {dtype} else Make(torch.ops.aten.to.dtype, (total, dtype))


def never_below(view: CanonicalGraph, value: object, floor: float) -> bool:
    """Whether a float mask is proven to hold nothing below `floor`, and no -inf: learned, or selected from numbers.

    What is learned counts as moderate, whatever the floor.
    """
    if isinstance(value, Make) and value.target is torch.clamp:
        return isinstance(value.args[1], float) and value.args[1] >= floor
    if isinstance(value, Make):
        factor = value.args[1] if value.target is torch.mul else None
        return isinstance(factor, float) and factor > 0 and never_below(view, value.args[0], floor / factor)
    return _never_below(view, value, floor, 0)


def _never_below(view: CanonicalGraph, value: object, floor: float, depth: int) -> bool:
    number = constant(view, value)
    if number is not None:
        return math.isfinite(number) and number >= floor
    tensor = view.tensor(value)
    if tensor is None or not isinstance(value, Node) or depth > _MAX_DEPTH:
        return False
    call = view.call(value)
    if call is None:
        # A parameter, or rows of one: a number that is learned is finite.
        is_lookup = str(getattr(value.target, "__name__", "")) == "embedding"
        return is_lookup or (value.op in ("placeholder", "get_attr") and tensor.requires_grad)
    if call.name in _BOUNDED:
        return True
    if call.name in ("where", "masked_fill", "add"):
        branches = [call[key] for key in ("input", "other", "value") if key in call.args]
        return all(_branch_never_below(view, branch, tensor.dtype, floor, depth) for branch in branches)
    narrows = call.name == "cast" and not view.widens(value)
    return call.name in _SAME_VALUES and not narrows and _never_below(view, call["input"], floor, depth + 1)


def _branch_never_below(view: CanonicalGraph, value: object, dtype: torch.dtype, floor: float, depth: int) -> bool:
    number = constant(view, value)
    if number is None:
        return _never_below(view, value, floor, depth + 1)
    number = rounded(number, dtype)
    return math.isfinite(number) and number >= floor
