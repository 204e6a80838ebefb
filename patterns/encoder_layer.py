"""torch.nn.TransformerEncoderLayer in evaluation without gradients: one operator of torch, taken apart.

The operator has kernels of its own that Inductor can fuse with nothing. Its parts are written into the graph as an
author would spell them, for the matchers to find (torch/csrc aten/src/ATen/native/transformers/transformer.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from infuse.patterns import attention, layer_norm, metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Refusal

_LAYERS = (torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default)
_NAMES = [argument.name for argument in _LAYERS[1]._schema.arguments]
KINDS = (attention.KIND, layer_norm.KIND, layer_norm.KIND)
# How a mask [B, S], known by its mask_type, meets scores [B, H, L, S]; a mask of another type is broadcast as it is.
_PADDING = 1


def take_apart(graph: Graph) -> int:
    """Replaces the layers that can be; how many they were. What stays is for the matchers to refuse."""
    layers = [node for node in graph.nodes if node.op == "call_function" and node.target in _LAYERS]
    if not layers or _switches_autocast(graph):
        return 0
    return sum(_replace(graph, node) for node in layers)


def _switches_autocast(graph: Graph) -> bool:
    """Autocast leaves the whole operator in its dtype, but not its parts."""
    return any("autocast" in getattr(node.target, "__name__", "") for node in graph.nodes)


def _replace(graph: Graph, node: Node) -> bool:
    given: dict[str, Any] = {**dict(zip(_NAMES, node.args)), **node.kwargs}
    mode = metadata.fake_mode([node])
    try:
        src = metadata.value(given["src"])
    except metadata.MissingMetadata:
        return False
    if mode is None or src.is_nested or src.dim() != 3:
        return False
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)
    with graph.inserting_before(node):
        result = _layer({key: Proxy(item, tracer) if isinstance(item, Node) else item for key, item in given.items()})
    made = [item for item in graph.nodes if item not in before]
    _describe(made, node, mode)
    node.replace_all_uses_with(result.node)
    graph.erase_node(node)
    return True


def _describe(made: Sequence[Node], layer: Node, mode: Any) -> None:
    """Metadata of the new nodes: the layer's, and values of their own."""
    with metadata.undisturbed(mode):
        for node in made:
            args: Any = torch.fx.map_arg(node.args, metadata.value)
            kwargs: Any = torch.fx.map_arg(node.kwargs, metadata.value)
            node.meta.update({key: item for key, item in layer.meta.items() if key not in metadata.KEYS})
            node.meta[metadata.KEYS[0]] = metadata.evaluate(node.target, args, kwargs)


def _layer(given: Mapping[str, Any]) -> Any:
    """The whole layer, [B, L, E] -> [B, L, E]."""
    x, embed_dim, eps = given["src"], given["embed_dim"], given["eps"]

    def norm(value: Tensor, number: int) -> Tensor:
        return F.layer_norm(value, (embed_dim,), given[f"norm_weight_{number}"], given[f"norm_bias_{number}"], eps)

    if given["norm_first"]:
        x = x + _attention(norm(x, 1), given)
        return x + _feed_forward(norm(x, 2), given)
    x = norm(x + _attention(x, given), 1)
    return norm(x + _feed_forward(x, given), 2)


def _attention(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """A row that is masked whole gives NaN, as in the operator."""
    num_heads, head_dim = given["num_heads"], given["embed_dim"] // given["num_heads"]
    packed = F.linear(x, given["qkv_weight"], given["qkv_bias"])
    heads = torch.unflatten(packed, -1, (3, num_heads, head_dim))
    q, k, v = (torch.transpose(torch.select(heads, 2, index), 1, 2) for index in range(3))
    scores = torch.matmul(q * head_dim**-0.5, torch.transpose(k, -2, -1))
    mask = given.get("mask")
    if mask is not None:
        # Whatever is not zero is masked: the operator reads a mask of numbers so too.
        mask = torch.ne(mask, 0)
        if given.get("mask_type") == _PADDING:
            mask = torch.unsqueeze(torch.unsqueeze(mask, 1), 1)
        scores = torch.masked_fill(scores, mask, -math.inf)
    out = torch.matmul(torch.softmax(scores, dim=-1), v)
    merged = torch.flatten(torch.transpose(out, 1, 2), 2)
    return F.linear(merged, given["proj_weight"], given["proj_bias"])


def _feed_forward(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    hidden = F.linear(x, given["ffn_weight_1"], given["ffn_bias_1"])
    hidden = F.gelu(hidden) if given["use_gelu"] else F.relu(hidden)
    return F.linear(hidden, given["ffn_weight_2"], given["ffn_bias_2"])


def refusal_of(kind: str) -> Callable[[CanonicalGraph, Node], Refusal]:
    """What the matchers say of a part of a layer that stayed whole."""

    def refuse(view: CanonicalGraph, anchor: Node) -> Refusal:
        return Refusal(
            kind,
            anchor,
            "the whole encoder layer is one operator (torch's fast path)",
            "switch the fast path off: torch.backends.mha.set_fastpath_enabled(False)",
        )

    return refuse
