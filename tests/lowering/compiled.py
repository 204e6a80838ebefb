"""The code that a function is compiled to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code


def compiled_code(function: Callable[..., Any], *args: Tensor, **options: Any) -> tuple[Any, str]:
    """The result without gradients and the last code generated (the earlier ones are of candidates being timed)."""
    torch._dynamo.reset()
    with torch.no_grad():
        out, codes = run_and_get_code(torch.compile(function, backend="infuse", **options), *args)
    return out, codes[-1]
