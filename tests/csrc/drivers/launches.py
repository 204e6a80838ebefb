"""What drivers are made of: their register, tensors as small as they are awkward, and how many launches one makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from infuse.ops import library

Launch = Callable[[], object]
Driver = Callable[[torch.device], Iterator[Launch]]

OPS = torch.ops.infuse
EPS = 1e-5
DRIVERS: dict[str, Driver] = {}


def driver(function: Driver) -> Driver:
    """Enter a driver under its name."""
    DRIVERS[function.__name__] = function
    return function


# How the names of configurations begin whose warps hand tiles over at barriers in shared memory.
_WITH_MEMORY_BARRIERS = ("wgmma", "warp")
_skip_memory_barriers = False


def configs(family: str) -> list[int]:
    """-1, where the launcher chooses, and every configuration."""
    names = library.configurations(family)
    if _skip_memory_barriers:
        return [number for number, name in enumerate(names) if not name.startswith(_WITH_MEMORY_BARRIERS)]
    return list(range(-1, len(names)))


def random(*shape: int, dtype: torch.dtype, device: torch.device, offset: int = 0) -> Tensor:
    """Behind as many elements as `offset` says, at the end of its memory."""
    storage = torch.randn(math.prod(shape) + offset).to(dtype).to(device)
    return storage[offset:].view(shape)


def padded(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that are followed by as much as they are long."""
    return random(rows, 2 * dim, dtype=dtype, device=device)[:, :dim]


def vector_of(dim: int, *, dtype: torch.dtype | None, device: torch.device, offset: int = 0) -> Tensor | None:
    return None if dtype is None else random(dim, dtype=dtype, device=device, offset=offset)


def run(family: str, device: torch.device, skip_memory_barriers: bool = False) -> int:
    """How many launches there were."""
    global _skip_memory_barriers
    _skip_memory_barriers = skip_memory_barriers
    launches = 0
    for launch in DRIVERS[family](device):
        launch()
        launches += 1
    return launches


def if_it_can(operator: Launch, *args: object) -> object:
    """The call, if the configuration takes the shape."""
    try:
        return operator(*args)
    except RuntimeError as error:
        if "configuration" not in str(error):
            raise
        return None
