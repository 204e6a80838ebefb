"""The loss of a language model's head: a linear, and the cross entropy of its result over the vocabulary.

Anchored on the loss: F.cross_entropy, or F.nll_loss of a log_softmax. From there to the linear lead casts to float32,
reshapes that keep the vocabulary, slices of positions (the shift of a causal model) and the transposition that puts the
classes second; all of them act on rows, so they act on the linear's input as well. Logits that anything else reads must
exist, and stay.

A linear with fewer than MIN_VOCAB outputs is a classifier rather than a language model's head: its logits are small.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.linears import read_linear
from infuse.patterns.sites import Finding, Make, Refusal, Site
from infuse.patterns.sizes import same_shape

KIND = "linear_cross_entropy"
ANCHORS = ("cross_entropy", "nll_loss")
MIN_VOCAB = 4096
# As the overloads of ATen number them.
_REDUCTIONS = ("none", "mean", "sum")
_SCALES = ("mul", "div", "tanh", "add", "where", "masked_fill")
_HALF = (torch.float16, torch.bfloat16)


class _Unlike(Exception):
    """The place looks like the operator and is not; the arguments are reason and remedy."""


@dataclass(slots=True)
class _Path:
    """The way from the loss up to the linear. trail: its nodes. slices: of positions, the last one first."""

    linear: Node
    trail: list[Node] = field(default_factory=list)
    slices: list[Node] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    to_float: bool = False
    softcap: float = 0.0


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The linear and the loss around an anchor; None for a loss that no large linear feeds."""
    call = view.call(anchor, *ANCHORS)
    if call is None:
        return None
    before: list[Node] = []
    logits = call["input"]
    if call.name == "nll_loss":
        softmax = view.call(view.strip(logits, trail=before), "log_softmax")
        if softmax is None or softmax["dim"] != (_class_dim(view, logits),):
            return None
        before.append(view.strip(logits))
        logits = softmax["input"]
    linear = _origin(view, logits)
    if linear is None or not _is_head(view, linear):
        return None
    spelling = call.name if call.name == "cross_entropy" else "log_softmax, nll_loss"
    try:
        return _site(view, anchor, linear, logits, before, spelling)
    except _Unlike as unlike:
        reason, remedy = unlike.args
        return Refusal(KIND, anchor, reason, remedy, spelling)


def _class_dim(view: CanonicalGraph, logits: object) -> int:
    """Where F.cross_entropy looks for the classes."""
    return 1 if len(view.shape(logits)) > 1 else 0


def _origin(view: CanonicalGraph, logits: object) -> Node | None:
    """The linear that the logits come from, past whatever changes single elements or their order."""
    node, steps = logits, ("alias", "cast", "reshape", "permute", "slice", "index", "detach", *_SCALES)
    while (call := view.call(node, *steps)) is not None:
        node = call["input"] if isinstance(call["input"], Node) else call["other"]
    return node if isinstance(node, Node) and view.call(node, "linear") is not None else None


def _is_head(view: CanonicalGraph, linear: Node) -> bool:
    vocab = view.shape(linear)[-1]
    return isinstance(vocab, int) and vocab >= MIN_VOCAB


def _site(view: CanonicalGraph, anchor: Node, linear: Node, logits: Node, before: list[Node], spelling: str) -> Site:
    path = _path(view, linear, logits)
    options = _options(view, anchor)
    _require_own(view, [*before, *path.trail, linear], anchor)
    found = read_linear(view, linear)
    if found is None:
        raise _Unlike(*_why_no_linear(view, linear))
    _require_one_head(view, linear, found.weight)
    target = _target(view, anchor, logits)
    x: object = found.input
    for part in reversed(path.slices):
        x = Make(operator.getitem, (x, part.args[1]))
    # Autocast takes the loss in float32 of logits in half precision.
    dtype, wide = view.dtype(linear), path.to_float or view.dtype(logits) != view.dtype(anchor)
    widened = wide or view.dtype(before[0] if before else logits) == torch.float32
    words = ["linear" if found.bias is None else "linear with bias", *reversed(path.words), spelling]
    rounding = "" if widened or dtype not in _HALF else "probabilities are rounded before the loss is taken of them"
    if path.softcap and view.dtype(linear) in _HALF:
        rounding = "the soft cap's steps are rounded"
    interior = tuple(dict.fromkeys((*found.trail, linear, *reversed(path.trail), *before, anchor)))
    args = (x, found.weight, found.bias, target, *options, bool(widened and dtype in _HALF), path.softcap)
    return Site(KIND, (anchor,), anchor, args, interior, ", ".join(words), rounding)


def _path(view: CanonicalGraph, linear: Node, logits: Node) -> _Path:
    """Raises _Unlike for a step that is no step of rows."""
    path, node = _Path(linear), logits
    vocab, class_dim = view.shape(linear)[-1], _class_dim(view, logits)
    if len(view.shape(logits)) == 1:
        raise _Unlike("the loss is taken of one row alone", "keep a dimension of rows")
    while node is not linear:
        call = view.call(node)
        assert call is not None, node
        if (cap := _softcap(view, node)) is not None and not path.softcap:
            path.softcap, capped = cap
            path.trail += capped
            path.words.append("soft cap")
            node = view.call(capped[-1])["input"]  # type: ignore[index]
            continue
        source = call["input"]
        if call.name == "permute" and node is _first_but_aliases(view, logits):
            rank = len(view.shape(node))
            if call["dims"] != (0, rank - 1, *range(1, rank - 1)):
                raise _Unlike("the logits are permuted", "transpose the classes to dimension 1 and nothing else")
            class_dim = rank - 1
            path.words.append("transposed")
        elif call.name == "cast":
            if view.dtype(node) != torch.float32 or view.dtype(source) not in _HALF:
                raise _Unlike(f"the logits are cast to {view.dtype(node)}", "cast them to float32 or not at all")
            path.to_float = True
            path.words.append("float")
        elif call.name == "slice":
            _require_positions(view, node)
            path.slices.append(node)
            path.words.append("slice")
        elif call.name == "reshape":
            if not same_shape(view.shape(source)[-1:], view.shape(node)[-1:]):
                raise _Unlike("the logits are reshaped across the vocabulary", "keep the vocabulary's dimension whole")
            if path.slices and len(view.shape(source)) != len(view.shape(node)):
                raise _Unlike("the logits are sliced after they are flattened", "slice first, and flatten then")
        elif call.name != "alias":
            raise _Unlike(*_other_step(call.name))
        path.trail.append(node)
        node = source
    shape = view.shape(logits)
    last = class_dim == len(shape) - 1  # where the linear has them, or the transposition takes them from
    if not last or not same_shape(shape[1:2], (vocab,)):
        raise _Unlike("the vocabulary is not the dimension of classes", "flatten the logits to [rows, vocabulary]")
    return path


def _softcap(view: CanonicalGraph, node: Node) -> tuple[float, list[Node]] | None:
    """(c, nodes) of c tanh(z / c), the last of which reads z."""
    product = view.operands(node, "mul")
    cap, inner = (None, None) if product is None else product if _is_number(product[0]) else product[::-1]
    trail = [node]
    squashed = view.call(view.strip(inner, trail=trail), "tanh")
    if squashed is None or not _is_number(cap) or not cap:
        return None
    trail.append(view.strip(inner))
    scaled = view.strip(squashed["input"], trail=trail)
    quotient, factors = view.operands(scaled, "div"), view.operands(scaled, "mul")
    by_cap = quotient is not None and _is_number(quotient[1]) and quotient[1] == cap
    by_inverse = factors is not None and _is_number(factors[1]) and factors[1] == 1.0 / cap
    return (float(cap), [*trail, scaled]) if by_cap or by_inverse else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first_but_aliases(view: CanonicalGraph, logits: Node) -> object:
    node: object = logits
    while (call := view.call(node, "alias", "cast")) is not None:
        node = call["input"]
    return node


def _other_step(name: str) -> tuple[str, str]:
    if name in ("tanh", "mul", "div", "add", "where", "masked_fill"):
        reason = f"the logits are changed ({name}) between the linear and the loss, as by a temperature"
        return reason, "take the loss of the linear's own result, or of a soft cap written cap * tanh(logits / cap)"
    if name == "detach":
        return "the logits are detached", "take the loss under no_grad instead"
    return (
        f"the logits are changed by {name}",
        "take the loss of all positions; mark those to leave out by ignore_index",
    )


def _require_positions(view: CanonicalGraph, node: Node) -> None:
    """Raises _Unlike unless a slice leaves the vocabulary whole, told by an index."""
    index = node.args[1] if node.target in (operator.getitem, "__getitem__") and len(node.args) > 1 else None
    items = index if isinstance(index, tuple) else (index,)
    rank = len(view.shape(node.args[0]))
    plain = all(item is Ellipsis or isinstance(item, slice) for item in items) and items.count(Ellipsis) <= 1
    reaches = Ellipsis in items[:-1] or len(items) == rank
    if not plain or None in items or (reaches and items[-1] is not Ellipsis and items[-1] != slice(None)):
        raise _Unlike("the logits are sliced across the vocabulary", "slice positions alone, as logits[..., :-1, :]")
    if any(isinstance(end, Node) for item in items if isinstance(item, slice) for end in (item.start, item.stop)):
        raise _Unlike("the slice of the logits depends on a tensor or a symbol", "slice by numbers")


def _options(view: CanonicalGraph, anchor: Node) -> tuple[int, str, float]:
    """ignore_index, reduction, label_smoothing. Raises _Unlike."""
    call = view.call(anchor, *ANCHORS)
    assert call is not None
    if call["weight"] is not None:
        raise _Unlike("the loss has weights of classes", "take it without `weight`")
    if call["size_average"] is not None or call["reduce"] is not None:
        raise _Unlike("size_average and reduce are obsolete", 'give `reduction` as "mean" or "sum"')
    reduction = "mean" if call["reduction"] is None else call["reduction"]
    if isinstance(reduction, int) and 0 <= reduction < len(_REDUCTIONS):
        reduction = _REDUCTIONS[reduction]
    if reduction not in ("mean", "sum"):
        raise _Unlike(
            "each row's loss is wanted, so its gradient is known in the backward only",
            'reduce by "mean" or "sum"; leave rows out by ignore_index',
        )
    ignore_index = -100 if call["ignore_index"] is None else call["ignore_index"]
    smoothing = 0.0 if call["label_smoothing"] is None else call["label_smoothing"]
    if type(ignore_index) is not int or not isinstance(smoothing, (int, float)):
        raise _Unlike("ignore_index or label_smoothing is symbolic", "give numbers")
    return ignore_index, reduction, float(smoothing)


def _target(view: CanonicalGraph, anchor: Node, logits: Node) -> Node:
    call = view.call(anchor, *ANCHORS)
    assert call is not None
    target = call["target"]
    dtype = view.dtype(target)
    if dtype is not None and dtype.is_floating_point:
        raise _Unlike("the targets are probabilities", "give the numbers of classes")
    if not isinstance(target, Node) or dtype != torch.int64:
        raise _Unlike(f"the targets are {dtype}", "give int64")
    return target


def _require_own(view: CanonicalGraph, nodes: list[Node], anchor: Node) -> None:
    """Raises _Unlike if anything but the loss reads the logits."""
    own = {*nodes, anchor}
    others = sorted({user.name for node in nodes for user in view.readers(node) if user not in own})
    if others:
        raise _Unlike(
            f"the logits are read elsewhere too ({', '.join(others[:3])})",
            "return the loss alone, and compute what else the logits are for in a forward of its own",
        )


def _require_one_head(view: CanonicalGraph, linear: Node, weight: Node) -> None:
    """Raises _Unlike if several linears read the weight: each would keep a gradient of its size."""
    count = sum(view.call(reader, "linear") is not None for reader in view.readers(weight))
    if count > 1:
        raise _Unlike(
            f"its weight is read by {count} linears, each of which would keep a gradient of the weight's size",
            "take one loss of all rows; the operator takes them in chunks by itself",
        )


def _why_no_linear(view: CanonicalGraph, linear: Node) -> tuple[str, str]:
    call = view.call(linear, "linear")
    assert call is not None
    given = [item for item in (call["weight"], call["bias"]) if item is not None]
    for item in (call["input"], *given):
        if is_traceable_wrapper_subclass(view.tensor(item)):  # sharded by the vocabulary it would be gathered
            kind = type(view.tensor(item)).__name__
            remedy = "keep the head out of the tensor-parallel plan, or leave the loss to loss_parallel"
            return f"its input or weight is a {kind}", remedy
    dtypes = {str(view.dtype(item)) for item in (call["input"], *given, linear)}
    if len(dtypes) > 1:
        return (
            f"input, weight and logits differ in dtype: {', '.join(sorted(dtypes))}, as autocast makes them",
            "bring the head's input and weight to one dtype, without autocast",
        )
    return "the weight is computed in the graph", "merge adapters into the weight before compiling"
