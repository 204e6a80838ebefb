"""`infuse.explain`: what would be rewritten in a model, and what not and why, without running it."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from infuse import backend
from infuse.history import History
from infuse.report import Report, raise_if_strict


class _Capture:
    """A torch.compile backend that rewrites a copy of every graph, and hands the graph itself back."""

    def __init__(self, rewrite: backend.InfusePass) -> None:
        self.rewrite = rewrite
        self.history = History()
        self.graphs: dict[object, torch.fx.GraphModule] = {}  # by compile id: the last attempt counts

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs[CompileContext.current_compile_id()] = self._rewritten(gm)
        return gm.forward

    def _rewritten(self, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """A rewritten copy; the subgraphs of higher-order operators come first, as in Inductor."""
        copied = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        for name in _subgraphs(copied):
            setattr(copied, name, self._rewritten(getattr(gm, name)))
        self.history.add(self.rewrite.rewrite(copied.graph, self.history.begin(), self.history.note))
        copied.recompile()
        return copied


def _subgraphs(gm: torch.fx.GraphModule) -> list[str]:
    names = dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
    return [name for name in names if isinstance(getattr(gm, name, None), torch.fx.GraphModule)]


def explain(
    model: Callable[..., Any],
    *args: Any,
    training: bool = False,
    mode: str | None = None,
    dynamic: bool | None = None,
    options: dict[str, object] | None = None,
    **kwargs: Any,
) -> Report:
    """The report of a model on example arguments.

    Nothing is computed: the model is copied without its data and traced on fake tensors with the shapes, dtypes and
    devices of the arguments, so this takes neither the memory nor the time of a run, and the model and its caches
    stay untouched.

    training: trace it in training mode with gradients; otherwise in evaluation mode without.
    mode, dynamic, options: as for torch.compile(model, backend="infuse").
    Raises ValueError or TypeError for a mode or an option that is not one, StrictError with every site of every graph
    if `strict` is set and a site stays as it is; what the model raises while traced is passed on.
    """
    return _trace(model, args, kwargs, training, mode, dynamic, options)[0]


def rewritten_graphs(
    model: Callable[..., Any], *args: Any, training: bool = False, mode: str | None = None, **kwargs: Any
) -> list[torch.fx.GraphModule]:
    """The graphs of a model after the rewrite, to look at. Arguments as for `explain`."""
    return _trace(model, args, kwargs, training, mode, None, None)[1]


def _trace(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool,
    mode: str | None,
    dynamic: bool | None,
    options: dict[str, object] | None,
) -> tuple[Report, list[torch.fx.GraphModule]]:
    rewrite: backend.InfusePass = backend.inductor_config(mode, options)["pre_grad_custom_pass"]
    strict, rewrite.settings = rewrite.settings.strict, dataclasses.replace(rewrite.settings, strict=False)
    capture = _Capture(rewrite)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with torch.set_grad_enabled(training), fake_mode:
        fake_model = _fake(model, fake_mode, training)
        fake_args, fake_kwargs = _fake_tensors((args, kwargs), fake_mode)
        compiled = torch.compile(_entry(), backend=capture, dynamic=dynamic)
        compiled(fake_model, *fake_args, **fake_kwargs)
    report = capture.history.report()
    if strict:
        raise_if_strict(report.sites)
    return report, list(capture.graphs.values())


def _entry() -> Callable[..., Any]:
    """A function that calls its first argument, with a code object of its own.

    Dynamo keeps what it compiled by code object: traced from here, the model's own code keeps its entries, and the
    number of recompilations that it has left.
    """

    def entry(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    return types.FunctionType(entry.__code__.replace(), globals(), "entry")


def _fake(model: Callable[..., Any], fake_mode: FakeTensorMode, training: bool) -> Callable[..., Any]:
    if not isinstance(model, nn.Module):
        return model
    # a torch.compile'd module is explained as the module that it is
    module: nn.Module = getattr(model, "_orig_mod", model)
    with FakeCopyMode(fake_mode):
        duplicate = copy.deepcopy(module)
    duplicate.train(training)
    return duplicate


def _fake_tensors(tree: Any, fake_mode: FakeTensorMode) -> Any:
    def convert(leaf: Any) -> Any:
        return fake_mode.from_tensor(leaf, static_shapes=True) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(convert, tree)
