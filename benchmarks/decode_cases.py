"""One token for each sequence of a batch, into a static cache that is half full."""

from __future__ import annotations

from typing import Any

import torch
from harness import Case, Function, Inputs, compiled_pairs, eager
from implementations import Later, Modes
from model_sources import Model
from torch import Tensor

# Calls in one sample; each moves the cache's write position on by one. So many that the time a call takes to reach the
# GPU, which the previous ones hide in a loop that generates, is a small part of the first one's share: half a
# millisecond of 16 calls was 4% of the shortest step. Steps of large batches take long enough for a few.
CALLS, CALLS_OF_LARGE_BATCHES, LARGE_BATCH = 64, 16, 64


def decode(model: Model, modes: Modes) -> Case:
    """Every call gives the same answer: the positions and the mask stay those of the first."""
    shape, length, batch = model.shape, model.max_seq_len, model.cache_batch
    position = length // 2
    function = Later(model.step)

    def inputs(generator: torch.Generator) -> Inputs:
        tokens = torch.randint(shape.vocab_size, (batch, 1), generator=generator, device=generator.device)
        return model.source.step_inputs(tokens, length, position)

    def reference(*args: Tensor) -> Any:
        module = model.exact()
        model.rewind(position, module)
        exact: Function = model.step(module)
        return exact(*args)

    cache = batch * shape.cache_elements(position + 1)
    return Case(
        name=f"{model.name} decode, batch {batch}, cache {length} half full",
        inputs=inputs,
        eager=function,
        reference=reference,
        impls=[eager(function, capture=False), *compiled_pairs(function, *modes, capture=False)],
        bytes=(shape.matmul_weights() + cache) * shape.dtype.itemsize,
        flops=batch * (2 * shape.matmul_weights() + shape.attention_flops(position + 1)),
        dtype=shape.dtype,
        sets=1,
        calls=min(CALLS if batch < LARGE_BATCH else CALLS_OF_LARGE_BATCHES, length - position),
        tolerance_factor=3.0,
        reset=lambda: model.rewind(position),
        release=model.releasing(function),
        cold=True,
    )
