"""The demo's second stage: one decoder trained twice on the same batches, eagerly and through backend="infuse"."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse import backend
from infuse.cli.demo_plan import Plan, promise, synchronize
from infuse.cli.demo_rewrites import promise_all_sites
from infuse.cli.terminal import TrainingProgress, say, show_table, waiting
from infuse.models import llama, text, training
from infuse.report import Report, SiteRecord

# Both runs compute in fp32, in another order of summation. A gradient is then off by some 1e-6 of its largest entry;
# a wrong formula would show by far more than this.
MAX_GRADIENT_DIFFERENCE = 1e-4
# Rounding grows over the steps, since each starts from what the last one left: on a CPU to 2e-4 after 500 of them.
# The losses of two batches differ by some 0.1.
MAX_LOSS_DIFFERENCE = 0.01
NAMES = ("eager", "infuse")


@dataclass(slots=True)
class Run:
    """One of the two runs. losses, seconds: of each step; validation: by the number of steps done. Nats a token."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Median, without the first step, which compiles or warms up."""
        return statistics.median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True, slots=True)
class Training:
    """What was found. runs: by NAMES. first_gradient_difference: relative to each parameter's largest gradient."""

    runs: dict[str, Run]
    tokens_per_step: int
    num_parameters: int
    text_digest: str
    text_bytes: int
    first_gradient_difference: float
    max_loss_difference: float
    rewritten: dict[str, int]


def train(plan: Plan) -> tuple[Training, nn.Module]:
    """Returns what was measured, and the model that Infuse trained.

    Raises DemoFailed if a site is not rewritten, gradients or loss curves disagree, or nothing is learned.
    """
    sources = _read_text()
    models = {name: llama.torchtune_llama3(plan.config, plan.seed).to(plan.device) for name in NAMES}
    compiled = torch.compile(models["infuse"], backend="infuse", dynamic=False, fullgraph=True)
    forwards: dict[str, Callable[..., Any]] = {"eager": models["eager"], "infuse": compiled}
    trainers = {name: training.Trainer(models[name], forwards[name], plan.recipe) for name in NAMES}
    runs = {name: Run() for name in NAMES}
    num_parameters = llama.num_parameters(models["eager"])
    say(
        f"model: torchtune Llama-3, {plan.config.num_layers} layers, {num_parameters / 1e6:.2f} M parameters, fp32; "
        f"{plan.recipe.steps} steps of {plan.recipe.batch_size} x {plan.recipe.seq_len} tokens, AdamW"
    )
    batches = _batches(plan, sources.train)
    held_out = list(itertools.islice(_batches(plan, sources.validation), plan.validation_batches))
    validate = functools.partial(_validate, models, runs, held_out)
    validate(0)
    gradient_difference, rewritten = _first_step(plan, trainers, runs, next(batches))
    with TrainingProgress(plan.recipe.steps, done=1) as progress, torch.compiler.set_stance("fail_on_recompile"):
        for done in range(2, plan.recipe.steps + 1):
            batch = next(batches)
            for name in NAMES if done % 2 else NAMES[::-1]:
                _step(plan, trainers[name], runs[name], batch)
            progress.show(
                done,
                [runs[name].losses[-1] for name in NAMES],
                [plan.recipe.tokens_per_step / runs[name].step_s for name in NAMES],
            )
            if done % plan.validate_every == 0 or done == plan.recipe.steps:
                validate(done)
    result = Training(
        runs=runs,
        tokens_per_step=plan.recipe.tokens_per_step,
        num_parameters=num_parameters,
        text_digest=sources.digest,
        text_bytes=sources.train.numel() + sources.validation.numel(),
        first_gradient_difference=gradient_difference,
        max_loss_difference=max(abs(a - b) for a, b in zip(runs["eager"].losses, runs["infuse"].losses)),
        rewritten=rewritten,
    )
    _show(result)
    _promise(result, plan)
    return result, models["infuse"]


def _read_text() -> text.Text:
    sources = text.read_sources(Path(sysconfig.get_paths()["stdlib"]))
    megabytes = (sources.train.numel() + sources.validation.numel()) / 1e6
    say(
        f"text: Python's standard library, {sources.num_files} files, {megabytes:.1f} MB, a token a byte, "
        "every tenth file held out"
    )
    return sources


def _batches(plan: Plan, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    recipe = plan.recipe
    return text.batches(data.to(plan.device), batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=plan.seed)


def _first_step(
    plan: Plan, trainers: dict[str, training.Trainer], runs: dict[str, Run], batch: tuple[Tensor, Tensor]
) -> tuple[float, dict[str, int]]:
    """The step that compiles: both start from the same weights, so their gradients must be the same up to rounding."""
    sites: list[SiteRecord] = []
    stop = backend.on_rewrite(sites.extend)
    try:
        with waiting("compiling its forward and backward with Infuse"):
            for name in NAMES:
                _step(plan, trainers[name], runs[name], batch, update=False)
    finally:
        stop()
    report = Report(tuple(sites), graphs=1)
    promise_all_sites("the decoder that is trained", report, plan.config)
    difference = training.gradient_difference(trainers["infuse"].model, trainers["eager"].model)
    for name in NAMES:
        trainers[name].update()
    return difference, report.rewritten


def _step(plan: Plan, trainer: training.Trainer, run: Run, batch: tuple[Tensor, Tensor], update: bool = True) -> None:
    synchronize(plan.device)
    begin = time.perf_counter()
    loss = trainer.backward(*batch)
    if update:
        trainer.update()
    synchronize(plan.device)
    run.seconds.append(time.perf_counter() - begin)
    run.losses.append(loss)


def _validate(
    models: dict[str, nn.Module], runs: dict[str, Run], held_out: list[tuple[Tensor, Tensor]], done: int
) -> None:
    for name in NAMES:
        runs[name].validation[done] = training.validation_loss(models[name], held_out)


def _show(result: Training) -> None:
    rows = []
    for name, run in result.runs.items():
        last = list(run.validation)[-1]
        rows.append(
            (
                name,
                f"{run.seconds[0]:.1f} s",
                f"{1e3 * run.step_s:.1f} ms",
                f"{result.tokens_per_step / run.step_s:,.0f}",
                f"{statistics.mean(run.losses[-20:]):.4f}",
                f"{run.validation[last]:.4f}",
            )
        )
    columns = ("training", "first step", "median step", "tokens/s", "loss, last 20", "held-out loss")
    show_table(columns, rows)
    say(
        f"same curves: the losses differ by at most {result.max_loss_difference:.1e} (bound {MAX_LOSS_DIFFERENCE:g}), "
        f"the first gradients by {result.first_gradient_difference:.1e} of their largest entry "
        f"(bound {MAX_GRADIENT_DIFFERENCE:g})"
    )


def _promise(result: Training, plan: Plan) -> None:
    losses = result.runs["infuse"].losses
    promise(all(map(math.isfinite, losses)), f"training: got a loss that is not finite among {losses}")
    promise(
        result.first_gradient_difference <= MAX_GRADIENT_DIFFERENCE,
        f"gradients of the first step: got a difference of {result.first_gradient_difference:.1e} of the largest "
        f"entry, expected at most {MAX_GRADIENT_DIFFERENCE:g}",
    )
    promise(
        result.max_loss_difference <= MAX_LOSS_DIFFERENCE,
        f"loss curves: got a difference of {result.max_loss_difference:.3g}, expected at most {MAX_LOSS_DIFFERENCE:g}",
    )
    if plan.recipe.steps >= 100:
        held_out = list(result.runs["infuse"].validation.values())
        promise(
            held_out[-1] < 0.7 * held_out[0], f"learning: got held-out losses {held_out}, expected them to fall by 30%"
        )
