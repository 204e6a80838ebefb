"""Lowering of infuse::linear_cross_entropy's backward; the forward runs as it is, in chunks of rows.

The gradients are there since the forward, and are multiplied by the loss's. x's is an ordinary product, which Inductor
fuses with what reads it. The weight's is large: where its memory is the backward's alone, it is multiplied in place, by
a kernel that does nothing where the factor is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.lowering import inductor, inductor_sums
from infuse.ops import cross_entropy_kernels, library, linear_cross_entropy

_BWD = torch.ops.infuse.linear_cross_entropy_bwd.default


def _lower(dloss: Any, dx: Any, dweight: Any, dbias: Any) -> tuple[Any, ...]:
    """The IR nodes of the three gradients."""
    node = inductor.current_node()
    if not _in_place(dweight, node.args[2]):
        return tuple(inductor.inline(linear_cross_entropy.linear_cross_entropy_bwd_ref, dloss, dx, dweight, dbias))
    dx, factor, dbias = inductor.inline(_with_factor, dloss, dx, dbias)
    inductor.call_operator(torch.ops.infuse.scale_unless_one.default, dweight, factor)
    return dx, dweight, dbias


def _with_factor(dloss: Tensor, dx: Tensor, dbias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, the kernel's factor in the place of the weight's."""
    dx, _, dbias = linear_cross_entropy.linear_cross_entropy_bwd_ref(dloss, dx, dbias[:0], dbias)
    return dx, dloss.float().reshape(1), dbias


def _in_place(dweight: Any, argument: Any) -> bool:
    """Whether the kernel can take the weight's gradient, and may write to it."""
    device = dweight.get_device()
    if inductor.settings_in_effect().kernels == "never" or library.missing(device):
        return False
    # A graph that is replayed must not write to what it is given.
    if inductor.cuda_graphs() or dweight.get_dtype() not in cross_entropy_kernels.DTYPES:
        return False
    return inductor_sums.is_donated(dweight) and isinstance(argument, torch.fx.Node) and len(argument.users) == 1


inductor.register(_BWD, _lower)
