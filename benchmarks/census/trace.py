"""A record of an eager run: every ATen operator with the values it read and wrote, its module and its source line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators whose result holds the elements of their first argument, moved, repeated, picked or cast.
VIEWS = names(
    "view _unsafe_view reshape _reshape_alias _reshape_copy transpose t permute expand unsqueeze squeeze slice "
    "select alias clone _to_copy detach split split_with_sizes unbind as_strided roll contiguous unsafe_split "
    "unsafe_split_with_sizes lift_fresh constant_pad_nd unfold diagonal view_as_real view_as_complex "
    "_conj repeat flip index_select"
)
# Those of them that pick a part: two parts of one tensor are different values.
PARTS = names("slice select split split_with_sizes unbind unsafe_split unsafe_split_with_sizes")


@dataclass(eq=False, slots=True)
class Value:
    """One tensor that the run made or was given. maker: None for what existed before the run."""

    maker: Op | None
    output: int  # which of the maker's results
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    users: list[Op] = field(default_factory=list, repr=False)


@dataclass(eq=False, slots=True)
class Op:
    """One operator that was executed. name: without namespace and overload, "add" for in-place `add_` too."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    source: str
    index: int
    outputs: list[Value] = field(default_factory=list, repr=False)

    @property
    def inputs(self) -> list[Value]:
        return list(values_in((self.args, self.kwargs)))

    @property
    def out(self) -> Value:
        return self.outputs[0]


def values_in(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        yield from values_in(list(tree.values()))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.values: dict[int, Value] = {}
        self.kept: dict[int, Tensor] = {}  # an id is a tensor's name only while the tensor lives
        self.sharing: dict[int, set[int]] = {}  # storage: ids of the tensors that lie in it
        self.modules: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = Op(
            name=func._opname.rstrip("_") if func.namespace == "aten" else str(func),
            args=self._translate(args),
            kwargs=self._translate(kwargs),
            module=self.modules[-1] if self.modules else "",
            source=_source(),
            index=len(self.ops),
        )
        result = func(*args, **kwargs)
        self.ops.append(op)
        for value in op.inputs:
            value.users.append(op)
        for i, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(tensor, Tensor):
                op.outputs.append(self._add(tensor, op, i))
        if func._schema.is_mutable:
            self._update_aliases(op, args)
        return result

    def _update_aliases(self, op: Op, args: Any) -> None:
        """What shares memory with an operator's first argument has become a result of that operator, too."""
        written = args[0] if args and isinstance(args[0], Tensor) else None
        for name in self.sharing.get(_storage(written), ()) if written is not None else ():
            if name != id(written):
                op.outputs.append(self._add(self.kept[name], op, len(op.outputs)))

    def _add(self, tensor: Tensor, maker: Op | None, output: int) -> Value:
        parameter = maker is None and isinstance(tensor, nn.Parameter)
        value = Value(maker, output, tuple(tensor.shape), tensor.dtype, parameter)
        self.values[id(tensor)] = value
        self.kept[id(tensor)] = tensor
        self.sharing.setdefault(_storage(tensor), set()).add(id(tensor))
        return value

    def _translate(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.values.get(id(tree)) or self._add(tree, None, 0)
        if isinstance(tree, (tuple, list)):
            return tuple(self._translate(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._translate(item) for key, item in tree.items()}
        return tree


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(function: Callable[..., Any], *args: Any, root: nn.Module | None = None, **kwargs: Any) -> list[Op]:
    """The operators that a call executes, in order, without gradients. root: names the modules in the record."""
    recorder = _Recorder()
    paths = {module: name for name, module in root.named_modules()} if root is not None else {}

    def enter(module: nn.Module, inputs: Any) -> None:
        recorder.modules.append(paths.get(module, recorder.modules[-1] if recorder.modules else ""))

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        recorder.modules.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with torch.no_grad(), recorder:
            function(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.ops


def _source() -> str:
    """The innermost frame outside torch and this folder, as "file.py:12"."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE)):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def first(op: Op) -> Value | None:
    """An operator's first argument, if it is a tensor."""
    return op.args[0] if op.args and isinstance(op.args[0], Value) else None


def origin(value: Value, stop: frozenset[str] = frozenset()) -> Value:
    """What a value is a view, a copy or a cast of. stop: views that are not looked through."""
    while value.maker is not None and value.maker.name in VIEWS and value.maker.name not in stop:
        inner = first(value.maker)
        if inner is None:
            break
        value = inner
    return value


Key = tuple[Value, tuple[Any, ...]]


def part(value: Value) -> Key:
    """(origin, which part of it): equal for two values that hold the same elements of the same tensor."""
    steps: list[Any] = []
    while value.maker is not None and value.maker.name in VIEWS:
        maker = value.maker
        inner = first(maker)
        if inner is None:
            break
        if maker.name in PARTS and value.shape != inner.shape:
            steps.append((*(arg for arg in maker.args[1:]), value.output))
        elif maker.name in ("roll", "flip", "constant_pad_nd", "unfold", "diagonal", "index_select"):
            steps.append((maker.name, *maker.args[1:]))
        value = inner
    return value, tuple(_hashable(step) for step in reversed(steps))


def _hashable(item: Any) -> Any:
    return tuple(_hashable(part) for part in item) if isinstance(item, (tuple, list)) else item
