"""SDPA's backward in cuDNN, wherever it comes from, over tensors that lie as no other call's.

Why they must is told in infuse.ops.attention_cudnn_backward. Inductor is told of these layouts: what it makes it writes
so at once, and no Python code runs around the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from infuse.lowering import inductor, inductor_layouts
from infuse.ops.attention_cudnn_backward import order_of, strides_in

_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
_WITH_OWN_KEY = torch.ops.infuse.sdpa_cudnn_backward.default


def guard_backward(graph: Graph) -> None:
    """Replaces torch's operator by that which is lowered to it with layouts of its own.

    Not only where a rewrite has put SDPA: a call that keeps torch's own key would decide the layout for the others in
    the process, or have it decided by them.
    """
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        node.target = _WITH_OWN_KEY


def _lower(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    (dout, q, k, v, out, lse, *rest), kwargs = inductor_layouts.as_sdpa_takes(*args, **kwargs)
    like_q = strides_in(order_of(inductor_layouts.stride_hints(q)), q.get_size())
    own = strides_in(order_of(inductor_layouts.stride_hints(k)), k.get_size(), is_key=True)
    dout, out = (inductor_layouts.with_strides(tensor, like_q) for tensor in (dout, out))
    given = (dout, q, inductor_layouts.with_strides(k, own), v, out, inductor.contiguous(lse), *rest)
    return inductor.call_operator(_BACKWARD, *given, as_they_lie=inductor.tensors_of(given), **kwargs)


inductor.register(_WITH_OWN_KEY, _lower)
