"""How many threads the demo's small model is fastest with: on a busy or a large machine that is not one a core."""

from __future__ import annotations

import statistics
import time

import torch

from infuse.cli.demo_plan import Plan
from infuse.cli.terminal import say
from infuse.models import llama, training

CANDIDATES = (1, 2, 4, 8)
TRIALS = 3


def use_best_threads(plan: Plan) -> int:
    """On a CPU torch is set to the number of threads with the fastest training step; a GPU leaves it as it is.

    Threads wait for each other after every operation, so one core that others use holds up all of them.
    """
    available = torch.get_num_threads()
    if plan.device.type != "cpu":
        return available
    milliseconds = {
        threads: _step_ms(plan, threads) for threads in sorted({*CANDIDATES, available}) if threads <= available
    }
    best = min(milliseconds, key=milliseconds.__getitem__)
    torch.set_num_threads(best)
    tried = ", ".join(f"{ms:.0f} ms with {threads}" for threads, ms in milliseconds.items())
    say(f"threads: {best} (an eager step takes {tried})")
    return best


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
