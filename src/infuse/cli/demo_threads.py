"""How many threads the demo's small model is fastest with: on a busy or a large machine that is not one a core."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

from infuse.cli.demo_plan import Plan
from infuse.cli.terminal import say
from infuse.models import llama, training

CANDIDATES = (1, 2, 4, 8)
TRIALS = 3


@contextlib.contextmanager
def best_threads(plan: Plan) -> Iterator[None]:
    """On a CPU, the number of threads with the fastest training step; on a GPU what torch has chosen.

    Threads wait for each other after every operation, so one core that others use holds up all of them.
    """
    before = torch.get_num_threads()
    if plan.device.type == "cpu":
        milliseconds = {threads: _step_ms(plan, threads) for threads in sorted({*CANDIDATES, before}) if threads <= before}
        best = min(milliseconds, key=milliseconds.__getitem__)
        torch.set_num_threads(best)
        tried = ", ".join(f"{ms:.0f} ms with {threads}" for threads, ms in milliseconds.items())
        say(f"threads: {best} (an eager step takes {tried})")
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step_ms(plan: Plan, threads: int) -> float:
    torch.set_num_threads(threads)
    model = llama.torchtune_llama3(plan.config)
    trainer = training.Trainer(model, model, plan.recipe)
    batch = torch.zeros(2, plan.recipe.batch_size, plan.recipe.seq_len, dtype=torch.int64)
    seconds = []
    for _ in range(1 + TRIALS):
        begin = time.perf_counter()
        trainer.backward(*batch)
        trainer.update()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.mean(seconds[1:])
