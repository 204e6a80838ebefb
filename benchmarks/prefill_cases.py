"""The logits of a whole prompt."""

from __future__ import annotations

from harness import Case, compiled_pairs, eager
from implementations import Later, Modes
from model_sources import Model
from torch import Generator, Tensor, randint

# In one sample: only the first call waits for what Python does before the first kernel.
CALLS = 4


def random_tokens(generator: Generator, vocab_size: int, length: int) -> Tensor:
    return randint(vocab_size, (1, length), generator=generator, device=generator.device)


def prefill(model: Model, length: int, modes: Modes) -> Case:
    shape = model.shape
    function = Later(model.logits)
    return Case(
        name=f"{model.name} prefill {length}",
        inputs=lambda g: (random_tokens(g, shape.vocab_size, length),),
        eager=function,
        reference=lambda tokens: model.logits(model.exact())(tokens),
        impls=[eager(function, capture=False), *compiled_pairs(function, *modes, capture=False)],
        bytes=(shape.matmul_weights() + length * shape.vocab_size) * shape.dtype.itemsize,
        flops=2 * shape.matmul_weights() * length + shape.attention_flops(length * length // 2),
        dtype=shape.dtype,
        sets=2,
        calls=CALLS,
        tolerance_factor=3.0,
        release=model.releasing(function),
        cold=True,
    )
