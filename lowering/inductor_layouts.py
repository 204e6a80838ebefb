"""How tensors lie in memory that an operator under lowering is given, in Inductor's terms.

Like infuse.lowering.inductor, whose part this is, it may import Inductor's private names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._inductor import ir
from torch._inductor.lowering import sdpa_constraint
from torch._inductor.virtualized import V

from infuse.lowering import inductor

Node = Any  # an Inductor IR node


def as_sdpa_takes(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the node being lowered, its tensors as Inductor places them for SDPA's operators."""
    placed, keywords = sdpa_constraint(inductor.current_node(), *args, **kwargs)
    return tuple(placed), keywords


def stride_hints(tensor: Node) -> tuple[int, ...]:
    """The strides of a tensor in memory, which are final from now on, symbolic ones by their example values."""
    _, layout = ir.as_storage_and_layout(inductor.in_memory(tensor), freeze=True)
    return tuple(int(hint) for hint in V.graph.sizevars.optimization_hints(layout.stride))


def with_strides(tensor: Node, strides: Sequence[Any]) -> Node:
    """The tensor in memory with these strides: itself where it lies so, or where Inductor is yet to write it."""
    return inductor.boxed(ir.ExternKernel.require_exact_strides(inductor.in_memory(tensor), strides))
