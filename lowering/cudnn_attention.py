"""SDPA's backward in cuDNN, wherever it comes from, by the operator that is safe from other calls' layouts."""

from __future__ import annotations

import torch
from torch.fx import Graph

from infuse.lowering import inductor
from infuse.ops import attention_cudnn_backward as _operator  # noqa: F401  (defines the operator)

_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def guard_backward(graph: Graph) -> None:
    """Replaces torch's operator: see infuse.ops.attention_cudnn_backward, which takes the same arguments.

    Not only where a rewrite has put SDPA: a call that keeps torch's own key would decide the layout for the others in
    the process, or have it decided by them. Generated C++, which cannot call the operator, keeps torch's.
    """
    if inductor.writes_cpp():
        return
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        node.target = torch.ops.infuse.sdpa_cudnn_backward.default
