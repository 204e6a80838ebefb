"""Kernels from outside the package: where they may run, and how they compete with the operator's formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infuse.lowering import graph_neighbours, inductor, policy, profit
from infuse.lowering.decisions import Decision, record
from infuse.report import Placement
from infuse.settings import Settings

FORMULA, KERNEL = "decomposition", "kernel"
Predicate = Callable[..., "bool | str"]


@dataclass(frozen=True, slots=True)
class UserKernel:
    """A kernel of one operator on one type of device.

    choice: what Inductor's generated code calls. can_run: told the operator's arguments, tensors as examples without
    data, it returns True, or False or a reason. runs_well: likewise, whether to take it where nothing is measured.
    """

    kind: str
    device: str
    choice: Any
    can_run: Predicate | None
    runs_well: Predicate | None

    def declines(self, args: Sequence[object]) -> str:
        """Why it may not run, "" if it may."""
        if any(isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)) for arg in args):
            return "a number is symbolic"
        answer = True if self.can_run is None else self.can_run(*args)
        return answer if isinstance(answer, str) else "" if answer else "its can_run says no"

    def why_unmeasured(self, args: Sequence[object], settings: Settings) -> str:
        """Why it is taken without being measured, "" if it is not."""
        if settings.kernels == "always":
            return "kernels are always taken"
        return "its runs_well says so" if self.runs_well is not None and self.runs_well(*args) is True else ""


@dataclass(frozen=True, slots=True)
class UserOperator:
    """names: the operator's parameters. kernels: by type of device."""

    kind: str
    formula: Callable[..., Tensor]
    names: tuple[str, ...]
    kernels: dict[str, UserKernel]


_operators: dict[str, UserOperator] = {}


def add_operator(kind: str, formula: Callable[..., Tensor]) -> None:
    """Gives an operator that was defined elsewhere its lowering and its place in the policy."""
    packet = getattr(torch.ops.infuse, kind)
    names = tuple(argument.name for argument in packet.default._schema.arguments)
    _operators[kind] = operator = UserOperator(kind, formula, names, {})
    inductor.register(packet.default, lambda *args, **keywords: _lower(operator, _in_order(packet, args, keywords)))
    policy.PLACED_ELSEWHERE[kind] = lambda args, training, settings, autotune: _place(
        operator, args, training, settings, autotune
    )


def has_operator(kind: str) -> bool:
    return kind in _operators


def add_kernel(
    kind: str,
    function: Callable[..., object],
    device: str,
    can_run: Predicate | None,
    runs_well: Predicate | None,
    identity: str,
) -> None:
    """function: writes into its keyword argument `out`. identity: part of the name, for Inductor's caches."""

    def run(*tensors: Tensor, out: Tensor, tensor_names: str, **numbers: object) -> Tensor:
        function(**dict(zip(tensor_names.split(), tensors)), **numbers, out=out)
        return out

    choice = inductor.kernel_choice(f"infuse_{kind}_{device}_{identity}", run)
    _operators[kind].kernels[device] = UserKernel(kind, device, choice, can_run, runs_well)


def _place(
    operator: UserOperator, args: Sequence[object], training: bool, settings: Settings, max_autotune: bool
) -> Placement:
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    kernel = operator.kernels.get(device)
    reason = f"no {operator.kind} kernel for {device}"
    if kernel is not None:
        reason = "no backward kernel" if training else kernel.declines(args)
    if kernel is None or reason:
        return Placement("inline", f"{FORMULA} ({reason})")
    if why := kernel.why_unmeasured(args, settings):
        return Placement("default", f"{KERNEL} ({why})")
    if max_autotune and device == "cuda":
        return Placement("default", f"{KERNEL} or {FORMULA}, measured")
    return Placement("inline", f"{FORMULA} (Inductor fuses it with its neighbours)")


def _in_order(packet: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """Every argument by position, defaults included."""
    schema = packet.default._schema.arguments
    given = {**dict(zip((argument.name for argument in schema), args)), **keywords}
    return tuple(given.get(argument.name, argument.default_value) for argument in schema)


def _lower(operator: UserOperator, args: tuple[Any, ...]) -> Any:
    """The IR node of the result."""
    tensors = [arg for arg in args if inductor.is_tensor(arg)]
    kernel = operator.kernels.get(tensors[0].get_device().type)
    described = f"{inductor.hints(tensors[0])} {tensors[0].get_dtype()}"

    def decide(label: str, why: str, timings: Any = None, costs: Any = None) -> None:
        site = inductor.current_site()
        record(Decision(operator.kind, described, label, why, timings or {}, costs or {}, site))

    if kernel is None or (reason := _declined(kernel, args)):
        decide(FORMULA, reason if kernel else f"no {operator.kind} kernel for this device")
        return inductor.inline(operator.formula, *args)
    candidate = inductor.Kernel(kernel.choice, _keywords(operator, args))
    layout = inductor.output_layout(getattr(torch.ops.infuse, operator.kind).default, args)
    if why := kernel.why_unmeasured(_examples(args), inductor.settings_in_effect()):
        decide(KERNEL, why)
        return inductor.call_kernel(candidate, tensors, layout)
    if inductor.max_autotune() and kernel.device == "cuda":
        formulas = {FORMULA: operator.formula}
        timings = inductor.measure(f"infuse_{operator.kind}", {KERNEL: candidate}, formulas, args, layout)
        lost = graph_neighbours.neighbours(tensors[:1], inductor.current_node()).passes
        label, costs = profit.choose(timings, FORMULA, len(tensors) + 1, lost)
        decide(label, f"measured; fusing with the neighbours saves {lost} passes", timings, costs)
        if label == KERNEL:
            return inductor.call_kernel(candidate, tensors, layout)
    else:
        decide(FORMULA, "Inductor fuses it with its neighbours")
    return inductor.inline(operator.formula, *args)


def _declined(kernel: UserKernel, args: Sequence[Any]) -> str:
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    with inductor.fake_mode():
        return kernel.declines(_examples(args))


def _examples(args: Sequence[Any]) -> list[Any]:
    with inductor.fake_mode():
        return [inductor.example(arg) if inductor.is_tensor(arg) else arg for arg in args]


def _keywords(operator: UserOperator, args: Sequence[Any]) -> dict[str, object]:
    """What a kernel is told besides its tensors: their names, and the arguments that are none."""
    pairs = list(zip(operator.names, args))
    names = " ".join(name for name, arg in pairs if inductor.is_tensor(arg))
    return {"tensor_names": names, **{name: arg for name, arg in pairs if not inductor.is_tensor(arg)}}
