"""Which saved tensors Inductor may overwrite in a backward: not those that share memory with another one.

AOTAutograd donates every saved tensor that is no view of an input or a result. It does not compare saved tensors with
each other (torch 2.11 and 2.13): where a tensor and a view of it are both saved, both are donated, and code that
overwrites the one before the other is read gives wrong gradients, silently. What is saved depends on the partitioning,
which a rewrite changes; so a rewrite must not make a model meet this that did not.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch._guards import TracingContext
from torch.fx import Graph, Node


def keep_shared(graph: Graph) -> None:
    """Takes back the donation of a backward graph's inputs that share their memory. Other graphs are left alone."""
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    donated = getattr(metadata, "bw_donated_idxs", None)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not donated or not any(str(node.target).startswith("tangents") for node in inputs):
        return
    storages = [_storage(node) for node in inputs]
    readers = Counter(storages)
    assert metadata is not None
    metadata.bw_donated_idxs = [index for index in donated if readers[storages[index]] == 1]


def _storage(node: Node) -> object:
    """What is equal for two inputs of which one is a view of the other's memory."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node
