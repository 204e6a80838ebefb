"""`@infuse.fuse`: opt in one module class, one module or one function, in eager code too."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from infuse import backend

Target = TypeVar("Target")
_MARK = "_infuse_fused"


def fuse(
    target: Any = None,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **settings: object,
) -> Any:
    """Compiles a module class, a module instance or a function with Infuse, by itself.

        @infuse.fuse
        class Block(nn.Module): ...

        infuse.fuse(model.layers[0], mode="max-autotune")

    A class or a module is returned as it was: same type, same state_dict keys, isinstance and subclasses as before;
    only its forward is compiled, at the first call. Under an outer torch.compile it is inlined like any other code,
    and the outer backend decides. Decorating twice does nothing more.

    mode, dynamic, fullgraph: as for torch.compile. settings: names of `infuse.Settings`.
    Raises TypeError for anything but a module class, a module or a function; ValueError for an unknown mode or setting.
    """
    if target is None:
        return lambda chosen: fuse(chosen, mode=mode, dynamic=dynamic, fullgraph=fullgraph, **settings)
    options = backend.options(mode, **settings)
    keywords: dict[str, Any] = {"options": options, "dynamic": dynamic, "fullgraph": fullgraph}
    if isinstance(target, type) and issubclass(target, nn.Module):
        if _MARK not in vars(target):
            setattr(target, "forward", torch.compile(target.forward, **keywords))  # noqa: B010
            setattr(target, _MARK, True)
        return target
    if isinstance(target, nn.Module):
        if _MARK not in vars(target) and not hasattr(type(target), _MARK):
            target.compile(**keywords)
            object.__setattr__(target, _MARK, True)
        return target
    if callable(target) and not isinstance(target, type):
        return target if hasattr(target, _MARK) else _compile_function(target, keywords)
    raise TypeError(f"infuse.fuse: got {target!r}, expected an nn.Module class, an nn.Module or a function")


def _compile_function(function: Any, keywords: dict[str, Any]) -> Any:
    compiled = torch.compile(function, **keywords)
    setattr(compiled, _MARK, True)
    return compiled
