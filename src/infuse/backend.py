"""The torch.compile backend: Inductor, with the rewrite as its first pass.

`torch.compile(model, backend="infuse", mode=..., options=...)` behaves as with backend="inductor"; options named
"infuse.<setting>" are Infuse's own. `torch.compile(model, options=infuse.options(...))` is the same on
backend="inductor".
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from infuse import history
from infuse.caches import build_hash, tag_caches
from infuse.lowering.policy import place
from infuse.lowering.post_grad_pass import PostGradPass
from infuse.patterns.passes import rewrite
from infuse.report import SiteRecord
from infuse.settings import Settings, resolve, split_options

_LOWERED = (
    *("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "norm_backward", "gated_rms_norm"),
    *("swiglu", "rope", "qk_norm_rope", "qk_norm_rope_bwd", "rope_pair", "attention", "attention_training"),
    *("linear_cross_entropy", "rms_norm_again", "linears", "gated_mlp"),
)
for _op in _LOWERED:
    importlib.import_module(f"infuse.lowering.{_op}")

log = logging.getLogger("infuse")

FROM_CACHE = (
    "a graph came from a cache without the rewrite having run, so its sites are not listed: leave pre_grad_pass_timing "
    "and use_pre_grad_passes at their defaults"
)
Listener = Callable[[Sequence[SiteRecord]], None]
_listeners: list[Listener] = []


class InfusePass(CustomGraphPass):
    """The rewrite as an Inductor pass over the graph before autograd.

    settings: what may be rewritten. before: the user's own pre_grad_custom_pass, which runs first.
    """

    def __init__(self, settings: Settings, max_autotune: bool, before: tuple[Callable[[Any], None], ...] = ()) -> None:
        self.settings = settings
        self.max_autotune = max_autotune
        self.before = before
        self.runs = 0
        self.inputs: Sequence[object] = ()  # the graph's example inputs, for graphs whose nodes have none (freezing)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for user_pass in self.before:
            user_pass(graph)
        self.runs += 1
        past = history.of_this_process()
        records = self.rewrite(graph, past.begin(), past.note)
        past.add(records)
        _log(records)
        for listener in tuple(_listeners):
            listener(records)

    def rewrite(
        self, graph: torch.fx.Graph, run: str = "", note: Callable[[str], None] | None = None
    ) -> list[SiteRecord]:
        """The rewrite alone, without the user's own pass and without a trace in the process's history."""
        with _collector_paused():
            return rewrite(graph, self.settings, self._place, is_training(graph), self.inputs, run, note)

    def _place(self, kind: str, args: tuple[object, ...], training: bool) -> Any:
        return place(kind, args, training, settings=self.settings, max_autotune=self.max_autotune)

    def uuid(self) -> Any:
        """Part of the cache key; None (which disables the caches, as Inductor does) if the user's own pass has none."""
        mine = ("infuse", build_hash(), self.settings, self.max_autotune)
        theirs = tuple(
            user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None for user_pass in self.before
        )
        return None if None in theirs else repr((*mine, *theirs))

    def __reduce__(self) -> tuple[Any, ...]:
        # torch 2.11 pickles the pass into the cache key: the hash must be in it, and the same in every process.
        return _restore, (build_hash(), self.settings, self.max_autotune, self.before)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InfusePass) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash((build_hash(), self.settings, self.max_autotune))


def _restore(
    hash_at_pickling: str, settings: Settings, max_autotune: bool, before: tuple[Callable[[Any], None], ...]
) -> InfusePass:
    del hash_at_pickling
    return InfusePass(settings, max_autotune, before)


@functools.cache
def _say_once(level: int, text: str) -> None:
    log.log(level, "%s", text)


def _log(records: Sequence[SiteRecord]) -> None:
    """What stays as it is, and what runs without the kernel that exists for it: each once a process."""
    for record in records:
        if record.status == "refused":
            _say_once(logging.INFO, f"{record.kind} at {record.place} stays as it is: {record.outcome[1]}")
        elif record.missing:
            _say_once(logging.WARNING, f"{record.kind} runs without its kernel: {record.missing}")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: one over all that torch holds takes 0.4 s, as long as rewriting 64 layers."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_training(graph: torch.fx.Graph) -> bool:
    """Whether AOTAutograd will trace a backward for this graph."""
    if not torch.is_grad_enabled():
        return False
    values = (node.meta.get("example_value", node.meta.get("val")) for node in graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def on_rewrite(listener: Listener) -> Callable[[], None]:
    """Calls `listener` with the records of every graph that is rewritten; returns the function that ends this."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def inductor_config(mode: str | None, options: Mapping[str, object] | None) -> dict[str, Any]:
    """Inductor's configuration for a mode and options, with the rewrite in it.

    Raises ValueError for a mode that Inductor does not know or an unknown option, TypeError for one of the wrong type.
    """
    mine, theirs = split_options(options)
    settings = resolve(mine)
    config = _checked_config(mode, theirs)
    before = _user_passes(config, "pre_grad_custom_pass")
    autotune = any(
        config.get(name, getattr(torch._inductor.config, name)) for name in ("max_autotune", "max_autotune_pointwise")
    )
    rewrite_pass = InfusePass(settings, bool(autotune), before)
    config["pre_grad_custom_pass"] = rewrite_pass
    late = "post_grad_custom_pre_pass"
    config[late] = PostGradPass(build_hash(), _user_passes(config, late))
    if hasattr(torch._inductor.config, "pre_grad_pass_timing"):
        _run_before_the_caches(config, theirs, rewrite_pass)
    return config


def _user_passes(config: Mapping[str, Any], name: str) -> tuple[Callable[[Any], None], ...]:
    """The user's own passes at a place, without ours, which options() inside options() has put around them."""
    given = config.get(name, getattr(torch._inductor.config, name))
    passes = tuple(given) if isinstance(given, (list, tuple)) else (given,) if given else ()
    own = (InfusePass, PostGradPass)
    return tuple(user for found in passes for user in (found.before if isinstance(found, own) else (found,)))


def _run_before_the_caches(config: dict[str, Any], given: Mapping[str, object], rewrite_pass: InfusePass) -> None:
    """Lets torch 2.13 do as 2.11 does: rewrite first, and look the rewritten graph up in the caches.

    Left alone it looks the original graph up and runs no pass on a hit; the report would then be empty, and a site
    under `strict` no error. What the lowering reads of the settings is not in the rewritten graph, and Inductor hashes
    a pass only if it runs late: so they go into the configuration's free-form metadata, which it hashes.
    """
    if "pre_grad_pass_timing" not in given:
        config["pre_grad_pass_timing"] = "early"
    metadata = config.get("aot_inductor.metadata", torch._inductor.config.aot_inductor.metadata)
    config["aot_inductor.metadata"] = {**metadata, "infuse": repr(rewrite_pass.__reduce__()[1][:-1])}


def _checked_config(mode: str | None, options: Mapping[str, object]) -> dict[str, Any]:
    modes = tuple(torch._inductor.list_mode_options())
    if mode is not None and mode not in modes:
        raise ValueError(f"infuse: mode: got {mode!r}, expected one of {list(modes)}")
    known = torch._inductor.config.get_config_copy()
    for name in options:
        if name.replace("-", "_") not in known:
            close = [key for key in known if name.rsplit(".", 1)[-1] in key][:5]
            hint = f" (did you mean one of {close}?)" if close else ""
            raise ValueError(
                f"infuse: options: unknown option {name!r}{hint}; expected an Inductor option "
                "(torch._inductor.list_options()) or infuse.<setting>"
            )
    try:
        return dict(torch._TorchCompileInductorWrapper(mode, dict(options), None).config)
    except RuntimeError as error:
        raise TypeError(f"infuse: options: {error}") from error


def infuse(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """The backend that torch.compile(backend="infuse") calls for every graph.

    Raises ValueError or TypeError for a mode or an option that is not one.
    """
    from torch._inductor.compile_fx import compile_fx

    tag_caches()
    config = inductor_config(mode, options)
    rewrite_pass = config["pre_grad_custom_pass"]
    rewrite_pass.inputs = example_inputs
    try:
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=config)
    finally:
        rewrite_pass.inputs = ()
    if not rewrite_pass.runs:
        history.of_this_process().note(FROM_CACHE)
    return compiled  # type: ignore[no-any-return]


def _reset() -> None:
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


# torch.compile calls this for cudagraph trees, as it does for its own backend.
infuse.reset = _reset  # type: ignore[attr-defined]


def options(mode: str | None = None, **settings: object) -> dict[str, Any]:
    """Options for `torch.compile(model, options=infuse.options("max-autotune"))`, which stays on backend="inductor".

    mode: one of Inductor's modes. settings: names of `infuse.Settings`, or Inductor options with dots written as
    in `**{"triton.cudagraphs": False}`.
    Raises ValueError for a mode, a setting or an option that is not one, TypeError for a value of the wrong type.
    """
    from infuse.settings import NAMES, OPTION_PREFIX

    tag_caches()
    named = {OPTION_PREFIX + name if name in NAMES else name: value for name, value in settings.items()}
    return inductor_config(mode, named)
