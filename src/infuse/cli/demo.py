"""`infuse demo`: a Llama with and without Infuse: what was rewritten, that it computes the same, how fast it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infuse.cli.arguments import Parser, UserError, check_settings, natural_number, positive_integer, require
from infuse.cli.doctor import why_inductor_cannot_compile

if TYPE_CHECKING:
    import torch

    from infuse.cli.demo_generation import Generation
    from infuse.cli.demo_plan import Plan
    from infuse.cli.demo_training import Training
    from infuse.report import Report

CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="infuse demo",
        description="What Infuse rewrites in two Llamas; one of them trained on Python's own sources and writing text, "
        "with and without Infuse. Exit code 1 if anything disagrees.",
    )
    parser.add_argument("--steps", type=positive_integer, metavar="N", help="training steps (default: 500)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--seed", type=natural_number, default=0, metavar="N", help="default: 0")
    parser.add_argument("--quick", action="store_true", help="a toy that only shows that everything runs")
    arguments = parser.parse_args(argv)
    require("demo", "rich", "matplotlib", "torchtune", "transformers", "safetensors", "tokenizers")
    check_settings()
    if reason := why_inductor_cannot_compile():
        raise UserError(f"demo: {reason}")
    from infuse.cli.demo_plan import DemoFailed, full_plan, quick_plan

    make_plan = quick_plan if arguments.quick else full_plan
    plan = make_plan(arguments.steps, _device(arguments.device), arguments.seed, _folder(arguments.output))
    try:
        with _state_of_its_own(), warnings.catch_warnings():
            # fp32 is meant: with TF32 two orders of summation would no longer agree.
            warnings.filterwarnings("ignore", message="TensorFloat32")
            _run(plan)
    except DemoFailed as failure:
        print(f"infuse demo: FAILED: {failure}", file=sys.stderr)
        return 1
    return 0


def _device(name: str | None) -> torch.device:
    import torch

    available = torch.cuda.is_available() and torch.version.hip is None
    if name == "cuda" and not available:
        raise UserError(f"--device: got cuda, expected an NVIDIA GPU that torch {torch.__version__} can use")
    return torch.device(name or ("cuda" if available else "cpu"))


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: got {path} ({error.strerror}), expected a folder that can be written") from error
    return path


@contextlib.contextmanager
def _state_of_its_own() -> Iterator[None]:
    """Inductor's and Triton's files go to a folder that is thrown away, so that every demo is like the first one.

    The variables that say so, and torch's number of threads, are put back at the end.
    """
    import torch

    threads = torch.get_num_threads()
    before = {name: os.environ.get(name) for name in CACHE_VARIABLES}
    with tempfile.TemporaryDirectory(prefix="infuse-demo-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder) / name.lower()) for name in CACHE_VARIABLES})
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _run(plan: Plan) -> None:
    from infuse.cli import demo_figure, demo_generation, demo_rewrites, demo_threads, demo_training
    from infuse.cli.terminal import say, stage

    begin = time.perf_counter()
    machine = _machine(plan)
    say(
        f"Infuse {machine['infuse']}, torch {machine['torch']}, Python {machine['python']}, on {machine['device_name']}"
    )
    seconds: dict[str, float] = {}
    with stage("1/3  What Infuse rewrites", seconds, "rewrites"):
        reports = demo_rewrites.explain_models(plan)
    with stage('2/3  Training, eager beside torch.compile(model, backend="infuse")', seconds, "training"):
        machine["threads"] = demo_threads.use_best_threads(plan)
        training, trained = demo_training.train(plan)
        caption = f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}, fp32"
        demo_figure.draw(training, plan.output / "loss.png", caption)
    with stage(
        "3/3  Saving the decoder as a Hugging Face folder, from which `infuse generate` writes", seconds, "generation"
    ):
        generation = demo_generation.write(plan, trained)
    seconds["total"] = time.perf_counter() - begin
    _save(plan, machine, seconds, reports, training, generation)
    _summarise(plan, seconds, reports, training, generation)


def _machine(plan: Plan) -> dict[str, Any]:
    import torch

    from infuse.cli.terminal import processor
    from infuse.version import __version__

    return {
        "infuse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": plan.device.type,
        "device_name": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else processor(),
    }


def _save(
    plan: Plan,
    machine: dict[str, Any],
    seconds: dict[str, float],
    reports: dict[str, Report],
    training: Training,
    generation: Generation,
) -> None:
    details = {name: json.loads(report.to_json()) for name, report in reports.items()}
    (plan.output / "report.json").write_text(json.dumps(details, indent=2) + "\n")
    numbers = {
        "machine": machine,
        "plan": {**dataclasses.asdict(plan), "device": str(plan.device), "output": str(plan.output)},
        "seconds": seconds,
        "rewritten": {name: report.rewritten for name, report in reports.items()},
        "training": dataclasses.asdict(training),
        "generation": dataclasses.asdict(generation),
    }
    (plan.output / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")


def _summarise(
    plan: Plan, seconds: dict[str, float], reports: dict[str, Report], training: Training, generation: Generation
) -> None:
    from infuse.cli import demo_generation
    from infuse.cli.terminal import say

    runs, variants = training.runs, generation.variants
    faster = runs["eager"].step_s / runs["infuse"].step_s
    stock = variants["stock"].median
    say()
    say("Summary", style="bold cyan")
    for name, report in reports.items():
        say(f"  rewritten    {name}: {_counts(report.rewritten)}; nothing refused")
    say(
        f"  training     {len(runs['infuse'].losses)} steps, curves within {training.max_loss_difference:.1e}; "
        f"{faster:.2f} x eager's speed"
    )
    say(
        f"  generation   the same {len(variants['eager'].tokens)} tokens in one shard and in two; tokens/s: "
        f"Infuse {variants['infuse'].median:,.0f}, stock {stock:,.0f}, eager {variants['eager'].median:,.0f}"
    )
    if plan.device.type == "cpu":
        say(
            "  on this CPU  Infuse has no kernels: what it rewrites runs as the plain formulas, in the code that\n"
            "               stock torch.compile makes, give or take some percent of chance. An NVIDIA GPU\n"
            "               (compute capability 8.0 or newer) adds the kernels."
        )
    if plan.quick:
        say("  quick        a toy: these speeds mean nothing")
    say(f"  files        {plan.output / 'loss.png'}  {plan.output / 'report.json'}  {plan.output / 'demo.json'}")
    say(f"  go on with   {demo_generation.command(plan, generation.folder)}")
    say(f"all promises held, {seconds['total']:.0f} s", style="bold green")


def _counts(rewritten: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(rewritten.items()))
