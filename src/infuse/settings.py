"""Settings: one frozen dataclass, set by options, by a context manager or by the environment, in this precedence."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Operators that stand for several others, taken where a kernel for them pays.
LARGER = (
    *("qk_norm_rope", "rope_cache_write", "norm_linear", "packed_linear", "linear_swiglu", "norm_linear_swiglu"),
    *("linear_add", "gated_mlp", "grouped_linear_swiglu"),
)
PATTERNS = (
    *("attention", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "gated_rms_norm", "swiglu", "rope"),
    "linear_cross_entropy",
    *LARGER,
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "numerics": ("exact", "fused"),
    "kernels": ("auto", "always", "never"),
    "verify": ("off", "compile"),
    "mlp_memory": ("gate_up", "recompute"),
}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
OPTION_PREFIX = "infuse."
ENV_PREFIX = "INFUSE_"


_added: list[str] = []  # kinds that users registered


def add_pattern(kind: str) -> None:
    """Makes a kind from outside the package one that `patterns` may name, and does by default."""
    _added.append(kind)


def patterns() -> tuple[str, ...]:
    """Every kind that there is."""
    return (*PATTERNS, *_added)


@dataclass(frozen=True, slots=True)
class Settings:
    """What Infuse may do.

    patterns: the families that are rewritten, any of PATTERNS and of those that `infuse.register_pattern` added.
    strict: a site that looks fusable but is refused is an error (`infuse.StrictError`) instead of a line in the report.
    numerics: "exact" allows only rewrites that keep every rounding step of the source; "fused" also those that keep
        more precision.
    kernels: "auto" lets measurement (under max-autotune) or the heuristic decide, "always" takes a kernel wherever
        one can run, "never" takes the decomposition everywhere.
    verify: "compile" runs each site and its operator on trial values while compiling, and refuses what is less exact
        than the source; "off" relies on the proofs.
    mlp_memory: what a gated MLP that a kernel trains keeps for its backward beside its input: "gate_up" its gate and up
        projections, half of what autograd keeps; "recompute" nothing, for two more products.
    """

    patterns: tuple[str, ...] = dataclasses.field(default_factory=lambda: patterns())
    strict: bool = False
    numerics: str = "fused"
    kernels: str = "auto"
    verify: str = "off"
    mlp_memory: str = "gate_up"

    def __post_init__(self) -> None:
        unknown = [name for name in self.patterns if name not in patterns()]
        if unknown:
            raise ValueError(f"infuse.patterns: got {unknown}, expected names out of {list(patterns())}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"infuse.strict: got {self.strict!r}, expected True or False")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"infuse.{name}: got {value!r}, expected one of {list(allowed)}")


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
_overrides: contextvars.ContextVar[tuple[tuple[str, object], ...]] = contextvars.ContextVar(
    "infuse_overrides", default=()
)


def _coerce(name: str, value: object, origin: str) -> object:
    """The value in the type of its field; text (from the environment) is parsed, a list becomes a tuple."""
    if name not in NAMES:
        raise ValueError(f"{origin}: unknown setting {name!r}, expected one of {list(NAMES)}")
    if name == "patterns":
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise TypeError(f"{origin}: patterns: got {value!r}, expected a list of names or a comma-separated string")
        chosen = {str(item).strip() for item in items} - {""}
        return tuple(name for name in patterns() if name in chosen) + tuple(sorted(chosen - set(patterns())))
    if name == "strict" and isinstance(value, str):
        if value.lower() not in _TRUE + _FALSE:
            raise ValueError(f"{origin}: strict: got {value!r}, expected one of {list(_TRUE + _FALSE)}")
        return value.lower() in _TRUE
    return value


def _from_environment() -> dict[str, object]:
    return {
        name: _coerce(name, os.environ[ENV_PREFIX + name.upper()], ENV_PREFIX + name.upper())
        for name in NAMES
        if ENV_PREFIX + name.upper() in os.environ
    }


def resolve(options: Mapping[str, object] | None = None) -> Settings:
    """The settings in effect: defaults, environment, `override` contexts, `options` (no prefix); later ones win."""
    values = _from_environment()
    values.update(_overrides.get())
    values.update({name: _coerce(name, value, "infuse") for name, value in (options or {}).items()})
    return Settings(**values)  # type: ignore[arg-type]


def split_options(options: Mapping[str, object] | None) -> tuple[dict[str, object], dict[str, object]]:
    """Parts `options={...}` of torch.compile into Infuse's (keys "infuse.<name>", prefix removed) and Inductor's."""
    mine: dict[str, object] = {}
    inductor: dict[str, object] = {}
    for key, value in (options or {}).items():
        if key.startswith(OPTION_PREFIX):
            mine[key[len(OPTION_PREFIX) :]] = value
        else:
            inductor[key] = value
    return mine, inductor


@contextlib.contextmanager
def override(**values: object) -> Iterator[Settings]:
    """Settings for everything that is compiled inside the `with` block.

    Raises ValueError for an unknown setting or value.
    """
    coerced = tuple((name, _coerce(name, value, "infuse.override")) for name, value in values.items())
    token = _overrides.set(_overrides.get() + coerced)
    try:
        yield resolve()
    finally:
        _overrides.reset(token)
