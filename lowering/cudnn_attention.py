"""SDPA's backward in cuDNN, wherever it comes from, over tensors that lie as no other call's.

torch keeps the graphs that it builds for cuDNN by the sizes and strides of q, k and v (MHAParams in
aten/src/ATen/native/cudnn/MHA.cpp, torch 2.11 and main of 2026). How dout and out lie in memory is built in, too, but
is no part of the key: the first call of a process decides, and later ones with another dout give gradients that have
nothing to do with the right ones, silently. Stock compile's dout is contiguous, eager code's often has its heads
inside. Here k has a stride of its own, and dout and out lie as q does: one key, one layout. Inductor is told of these
layouts: what it makes it writes so at once, and no Python code runs around the call. This can go when torch's key has
all strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph

from infuse.lowering import inductor, inductor_layouts
from infuse.ops import attention_cudnn_backward as _operator  # noqa: F401  (defines the operator)

_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
WITH_OWN_KEY = torch.ops.infuse.sdpa_cudnn_backward.default
_PADDING = 8  # elements: rows still begin at multiples of 16 bytes


def guard_backward(graph: Graph) -> None:
    """Replaces torch's operator by that which is lowered to it with layouts of its own.

    Not only where a rewrite has put SDPA: a call that keeps torch's own key would decide the layout for the others in
    the process, or have it decided by them.
    """
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        node.target = WITH_OWN_KEY


def _strides_like(other: Any, tensor: Any, padding: int = 0) -> list[Any]:
    """Those of a dense tensor in the other's order of dimensions, elements of padding behind each of the outermost."""
    lies, sizes = inductor_layouts.stride_hints(other), tensor.get_size()
    order = sorted(range(len(sizes)), key=lambda dim: (lies[dim], -dim))
    strides, step = [0] * len(sizes), 1
    for dim in order:
        strides[dim] = step
        step *= sizes[dim]
    strides[order[-1]] += padding
    return strides


def _lower(*args: Any, **kwargs: Any) -> Sequence[Any]:
    (dout, q, k, v, out, lse, *rest), kwargs = inductor_layouts.as_sdpa_takes(*args, **kwargs)
    dout, out = (inductor_layouts.with_strides(tensor, _strides_like(q, tensor)) for tensor in (dout, out))
    k = inductor_layouts.with_strides(k, _strides_like(k, k, _PADDING))
    given = (dout, q, k, v, out, inductor.contiguous(lse), *rest)
    return inductor.call_operator(_BACKWARD, *given, as_they_lie=inductor.tensors_of(given), **kwargs)


inductor.register(WITH_OWN_KEY, _lower)
