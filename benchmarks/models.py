"""Whole models: a decode step over a static KV cache, prefill, and a training step (forward and backward).

    python benchmarks/models.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

On a GPU, in bf16: Llama-3.1-8B's shapes with few layers and Qwen2.5-0.5B from torchtune, a Hugging Face Llama with
either of its attentions, a Llama in gpt-fast's style, and MAHIA-X with its components. On a CPU small models in fp32,
which show that enabling Infuse costs nothing where it has no kernels: the notes hold its time over stock's from the
same rounds. Weights are random. The fp64 reference keeps the statistics and rotations that a model's code forces to
fp32. Every implementation is compiled with empty caches; rows have the seconds that this took.
"""

from __future__ import annotations

from collections.abc import Iterator

import mahia_cases
from command import main
from decode_cases import decode
from harness import Case, Device
from implementations import NO_CUDAGRAPHS, Modes
from model_shapes import QWEN, SMALL, TINY, llama_8b
from model_sources import (
    GPT_FAST,
    HUGGING_FACE_EAGER,
    HUGGING_FACE_SDPA,
    TORCHTUNE_LLAMA,
    TORCHTUNE_QWEN,
    Model,
)
from prefill_cases import prefill
from training_cases import train

# The token's steps are recorded as CUDA graphs, as whoever generates text does.
STEP_MODES: Modes = (("", None), ("-reduce-overhead", "reduce-overhead"), ("-max-autotune", "max-autotune"))
MODES: Modes = (("", None), ("-max-autotune", NO_CUDAGRAPHS))
LENGTH = 4096


def cases(device: Device, quick: bool) -> Iterator[Case]:
    if device.type == "cuda" and not quick:
        yield from decode_cases(device)
        yield from prefill_cases(device)
        yield from training_cases(device)
    else:
        yield from small_cases(device, quick)
    yield from mahia_cases.cases(device, quick)


def decode_cases(device: Device) -> Iterator[Case]:
    eight = llama_8b(8)
    for source, shape, batches in (
        (TORCHTUNE_LLAMA, eight, (1, 16, 64)),
        (TORCHTUNE_QWEN, QWEN, (1, 16, 64)),
        (GPT_FAST, eight, (1, 16)),
        (HUGGING_FACE_SDPA, llama_8b(4), (1, 16)),
    ):
        for batch in batches:
            yield decode(Model(source, shape, device, LENGTH, cache_batch=batch), STEP_MODES)


def prefill_cases(device: Device) -> Iterator[Case]:
    eight, four = llama_8b(8), llama_8b(4)
    yield prefill(Model(TORCHTUNE_LLAMA, eight, device, LENGTH), LENGTH, MODES)
    yield prefill(Model(TORCHTUNE_QWEN, QWEN, device, LENGTH), LENGTH, MODES)
    yield prefill(Model(GPT_FAST, eight, device, LENGTH, cache_batch=1), LENGTH, MODES)
    yield prefill(Model(HUGGING_FACE_SDPA, four, device, LENGTH), LENGTH, MODES)
    yield prefill(Model(HUGGING_FACE_EAGER, four, device, LENGTH), LENGTH, MODES)


def training_cases(device: Device) -> Iterator[Case]:
    four = llama_8b(4)
    yield train(Model(TORCHTUNE_LLAMA, four, device, LENGTH), LENGTH, MODES)
    yield train(Model(HUGGING_FACE_SDPA, four, device, LENGTH), LENGTH, MODES)
    yield train(Model(TORCHTUNE_QWEN, QWEN, device, LENGTH), LENGTH, MODES)


def small_cases(device: Device, quick: bool) -> Iterator[Case]:
    shape, prompt, batch, cache = (TINY, 32, 16, 32) if quick else (SMALL, 256, 128, 512)
    modes: Modes = (("", None),)
    yield decode(Model(TORCHTUNE_LLAMA, shape, device, cache, cache_batch=1), modes)
    yield decode(Model(GPT_FAST, shape, device, cache, cache_batch=2), modes)
    yield decode(Model(HUGGING_FACE_SDPA, shape, device, cache, cache_batch=2), modes)
    for source in (TORCHTUNE_LLAMA, HUGGING_FACE_SDPA):
        yield prefill(Model(source, shape, device, prompt), prompt, modes)
        yield train(Model(source, shape, device, batch), batch, modes)
    yield prefill(Model(HUGGING_FACE_EAGER, shape, device, prompt), prompt, modes)


if __name__ == "__main__":
    raise SystemExit(main("models", __doc__, cases))
