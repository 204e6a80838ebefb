"""What Infuse does to a graph behind autograd, before Inductor lowers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Graph

from infuse.lowering import inductor
from infuse.lowering.cudnn_attention import guard_backward
from infuse.lowering.donated_buffers import keep_shared
from infuse.lowering.rotary_pairs import pair_rotations
from infuse.lowering.rotary_tables import gather_tables_first
from infuse.lowering.split_norms import split_norms
from infuse.lowering.wide_products import widen_products


class PostGradPass(inductor.CustomGraphPass):
    """The pass for Inductor's post_grad_custom_pre_pass. before: the user's own passes, which run first."""

    def __init__(self, build_hash: str, before: tuple[Callable[[Graph], None], ...] = ()) -> None:
        self.build_hash = build_hash
        self.before = before

    def __call__(self, graph: Graph) -> None:
        for user_pass in self.before:
            user_pass(graph)
        keep_shared(graph)
        guard_backward(graph)
        pair_rotations(graph)
        widen_products(graph)
        split_norms(graph)
        gather_tables_first(graph)

    def uuid(self) -> Any:
        """Part of the cache key; None, which disables the caches, if a user's pass has none."""
        theirs = [*_uuids(self.before)]
        return None if None in theirs else repr(("infuse-post-grad", self.build_hash, *theirs))


def _uuids(passes: tuple[Callable[[Graph], None], ...]) -> Iterator[Any]:
    for user_pass in passes:
        yield user_pass.uuid() if isinstance(user_pass, inductor.CustomGraphPass) else None
