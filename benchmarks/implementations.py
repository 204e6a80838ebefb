"""Who takes part: an implementation is a name and a way to get a function; those of torch.compile are made here."""

from __future__ import annotations

import importlib
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from answers import Function, Output
from torch import Tensor

# Pairs (suffix of the implementation's name, torch.compile's mode).
Modes = Sequence[tuple[str, str | None]]
NO_CUDAGRAPHS = "max-autotune-no-cudagraphs"
# Modes that record CUDA graphs of their own.
_OWN_GRAPHS = ("max-autotune", "reduce-overhead")


class Unavailable(RuntimeError):
    """An implementation that can't run here, with the reason: it is left out, which is no failure."""


class Later:
    """A function that is made when it is first needed, because a model comes with it."""

    def __init__(self, make: Callable[[], Function]) -> None:
        self._make = make
        self._function: Function | None = None

    def get(self) -> Function:
        if self._function is None:
            self._function = self._make()
        return self._function

    def forget(self) -> None:
        """Gives back what the function holds; it is made anew when it is needed again."""
        self._function = None

    def __call__(self, *args: Any) -> Output:
        return self.get()(*args)


@dataclass(frozen=True, slots=True)
class Impl:
    """One implementation of a case. `prepare` builds, loads or compiles, and raises Unavailable if that can't be."""

    name: str
    prepare: Callable[[], Function]
    capture: bool = True  # only kernels and nothing from the host: may be captured into the harness's CUDA graph
    own_graphs: bool = False  # replays CUDA graphs of its own: its memory lies in their pool
    compiles: bool = False  # its first call compiles
    note: str = ""


def eager(function: Function, name: str = "eager", *, capture: bool = True) -> Impl:
    return Impl(name, lambda: function, capture=capture)


def compiled(
    function: Function, name: str, *, backend: str = "inductor", mode: str | None = None, capture: bool = True
) -> Impl:
    """`function` through torch.compile. Nothing is shared with another implementation of the same function."""
    own_graphs = mode in _OWN_GRAPHS and torch.cuda.is_available()

    def prepare() -> Function:
        chosen = infuse_backend() if backend == "infuse" else backend
        result: Function = torch.compile(
            fresh(function, name), backend=chosen, mode=mode, fullgraph=True, dynamic=False
        )
        return _step(result) if own_graphs else result

    note = "mode " + (mode or "default")
    if own_graphs and capture:
        note += ", inputs copied into its CUDA graph"
    return Impl(name, prepare, capture=capture and not own_graphs, own_graphs=own_graphs, compiles=True, note=note)


def compiled_pairs(function: Function, *modes: tuple[str, str | None], capture: bool = True) -> list[Impl]:
    """Stock and Infuse for each (suffix of the name, mode), as `compile<suffix>` and `infuse<suffix>`."""
    return [
        compiled(function, prefix + suffix, backend=backend, mode=mode, capture=capture)
        for suffix, mode in modes
        for prefix, backend in (("compile", "inductor"), ("infuse", "infuse"))
    ]


def fresh(function: Function, name: str) -> Function:
    """A copy of `function` with a code object of its own.

    Dynamo keeps compiled code, and what it learnt about changing shapes, by code object and by its name and line: two
    implementations of one function would share the recompile limit and make each other's shapes dynamic. They live
    until their case is done: torch._dynamo.reset(), which forgets all of them, is called between cases only.
    """
    if isinstance(function, Later):
        function = function.get()
    assert isinstance(function, types.FunctionType), f"expected a plain function, got {function!r}"
    code = function.__code__
    code = code.replace(co_name=f"{code.co_name}_{name}".replace("-", "_"))
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def empty_caches() -> Iterator[None]:
    """Inductor's and Triton's caches on disk and in memory are new ones. Nobody's kernels are shared with what is
    compiled here; its files stay until the process ends, since kernels may be loaded from them at a later call."""
    from torch._inductor.utils import fresh_cache

    global _folders
    _folders = _folders or tempfile.TemporaryDirectory(prefix="infuse-benchmark-", ignore_cleanup_errors=True)
    with fresh_cache(dir=_folders.name, delete=False):
        yield


_folders: tempfile.TemporaryDirectory[str] | None = None


def warm_up_compiler(device: torch.device) -> None:
    """Inductor's own imports, its pool of processes, and its search for a compiler and vector instructions: what a
    process pays once is in no implementation's compile time."""

    def unrelated(x: Tensor) -> Tensor:
        return (x.sin() + 1).sum()

    with torch.enable_grad():
        x = torch.randn(64, 64, device=device, requires_grad=True)
        torch.compile(unrelated, dynamic=False)(x).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def _step(function: Function) -> Function:
    """Tells CUDA graph trees that the previous call's answer may be overwritten."""

    def step(*args: Any) -> Output:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*args)

    return step


def infuse_backend() -> Any:
    """What torch.compile takes as `backend`: the registered name, or the function where infuse isn't installed."""
    try:
        if "infuse" in torch._dynamo.list_backends(exclude_tags=None):
            return "infuse"
        return importlib.import_module("infuse.backend").infuse
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"infuse is not installed: {error}") from error


def optional(module: str) -> Any:
    """A module, or Unavailable with the name of the package that is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} can't be imported: {error}") from error
