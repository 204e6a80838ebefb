"""Which kernels of attention may run at a site, what they are given, and how they are called in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infuse import build
from infuse.lowering import inductor
from infuse.lowering.attention_tile_maps import tile_map
from infuse.lowering.heuristics import attention as heuristics
from infuse.ops import attention_kernels, library
from infuse.ops.attention_formulas import only_formula

# What a kernel may be given beside q, k and v, in this order.
OPTIONAL = ("mask", "tile_map", "sinks")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel with one configuration. takes_map: it reads a mask through the map of its tiles."""

    choice: Any
    keywords: dict[str, Any]
    takes_map: bool

    def kernel(self, optional: Sequence[object]) -> inductor.Kernel:
        """The kernel for the tensors of OPTIONAL that are there."""
        given = tuple(name for name, tensor in zip(OPTIONAL, optional) if tensor is not None)
        return inductor.Kernel(self.choice, {**self.keywords, "given": given})

    def call(self, args: tuple[Any, ...], layout: Any) -> Any:
        """The kernel as a node of the graph. args: those of infuse::attention."""
        q, k, v, mask, *_ = args
        found = tile_map(mask, q.get_size()[2], k.get_size()[2]) if self.takes_map and mask is not None else None
        optional = (mask, found, args[7])
        tensors = [tensor for tensor in (q, k, v, *optional) if tensor is not None]
        return inductor.call_kernel(self.kernel(optional), tensors, layout)


def run_decode(*tensors: Tensor, given: tuple[str, ...], out: Tensor, **keywords: Any) -> Tensor:
    """What generated code calls: the kernel for few query rows, writing into `out`."""
    q, k, v, *optional = tensors
    named = dict(zip(given, optional))
    return attention_kernels.decode(q, k, v, named.get("mask"), named.get("sinks"), out, **keywords)


def run_forward(*tensors: Tensor, given: tuple[str, ...], out: Tensor, **keywords: Any) -> Tensor:
    """What generated code calls: the kernel for many query rows. Without a map of the mask's tiles it makes one."""
    q, k, v, *optional = tensors
    named = dict(zip(given, optional))
    mask, found = named.get("mask"), named.get("tile_map")
    if mask is not None and found is None:
        found = attention_kernels.tile_map(mask, q.shape[2], k.shape[2])
    return attention_kernels.forward(q, k, v, mask, found, named.get("sinks"), out, **keywords)


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_DECODE = inductor.kernel_choice(f"infuse_attention_decode_{build.source_id()}", run_decode)
_FORWARD = inductor.kernel_choice(f"infuse_attention_forward_{build.source_id()}", run_forward)


def cannot_run(args: tuple[Any, ...], check: Callable[..., str]) -> str:
    """Why a kernel may not run here, "" when it may. check: of infuse.ops.attention_kernels."""
    q, k, v, mask, scale, _, softcap, sinks, masked_rows, dropout_p, _ = args
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(q.get_device()):
        return reason
    with inductor.fake_mode():
        examples: list[Any] = [None if node is None else inductor.example(node) for node in (q, k, v, mask, sinks)]
        q, k, v, mask, sinks = examples
        return check(q, k, v, mask, scale, softcap, sinks, masked_rows, dropout_p)


def describe(args: tuple[Any, ...]) -> heuristics.Site:
    """What the heuristics are told of a site. args: those of infuse::attention, IR nodes for tensors."""
    q, k, _, mask, _, is_causal, softcap, sinks, masked_rows, dropout_p, _ = args
    dtype = None if mask is None else mask.get_dtype()
    formula = only_formula(q.get_dtype(), dtype, softcap, sinks is not None, masked_rows)
    return heuristics.Site(inductor.hints(q), inductor.hints(k), dtype, is_causal, formula, dropout_p != 0.0)


def inference(args: tuple[Any, ...]) -> dict[str, Candidate]:
    """Every kernel that may compute a site in inference, by label. args: those of infuse::attention."""
    _, _, _, _, scale, is_causal, softcap, _, masked_rows, *_ = args
    found: dict[str, Candidate] = {}
    for label, name, choice, check in (
        ("decode", attention_kernels.DECODE, _DECODE, attention_kernels.can_decode),
        ("forward", attention_kernels.FORWARD, _FORWARD, attention_kernels.can_forward),
    ):
        if cannot_run(args, check):
            continue
        numbers = {"scale": float(scale), "softcap": float(softcap)}
        keywords = {**numbers, "is_causal": is_causal, "masked_rows": masked_rows}
        for config in range(-1, len(library.configurations(name))):
            found[f"{label}_{config}"] = Candidate(choice, {**keywords, "config": config}, label == "forward")
    return found
