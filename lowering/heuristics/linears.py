"""Which kernels of linears are taken without a measurement.

Everything rests on what was measured (benchmarks/results/nvidia-h200/swiglu.jsonl, models.jsonl).
"""

from __future__ import annotations

from infuse.lowering.heuristics import H200
from infuse.ops.linear_kernels import Sizes

MOST_SKINNY_ROWS = 64
# Sizes of linears with few rows: from those of Qwen2.5 0.5B to those of Llama 8B.
SKINNY_INPUTS, SKINNY_OUTPUTS = range(896, 14337), range(896, 28673)
# Their heads, behind a norm: the weights come at 94% to 100% of the memory's bandwidth.
HEAD_OUTPUTS = range(28673, 151937)
# Gate and up together, from where their tiles fill the device: 128 rows of Llama 8B.
LARGE_INPUTS, LARGE_OUTPUTS, FILLING_RESULTS = 2048, 8192, 128 * 28672
# Those of Llama 8B, 1.06 to 1.22 times as fast as what max-autotune finds for 128 to 8,192 rows.
TUNED_INPUTS, TUNED_OUTPUTS = 4096, 28672
# Smaller ones of many rows, those of MAHIA-X: a layer of its fabric takes 0.86 of the time, its experts 0.87.
SMALL_INPUTS, SMALL_OUTPUTS, MANY_ROWS = 1024, 4096, 65536
FEWEST_TRAINED_ROWS = 2048
# Of a linear with a residual; with more, cuBLAS's products are as fast.
MOST_ADDED_ROWS = 32
# Of what a norm between two linears reads: 16 rows of Qwen2.5 0.5B are half of it, those of Llama 8B, where it made no
# difference, twice as many.
MOST_SPLIT_ELEMENTS = 1 << 15
# Elements of a product that is written in float32 at once: a quarter GiB.
FEWEST_WIDE_RESULTS = 1 << 26
# Qwen3 30B-A3B's.
EXPERT_ROWS, EXPERT_INPUTS, EXPERT_OUTPUTS = 4096, 2048, 1536


def runs_well(kind: str, family: str, sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether a kernel is faster than what Inductor makes without tuning."""
    if capability != H200:
        return False
    if kind == "grouped_linear_swiglu":
        as_measured = sizes.rows >= EXPERT_ROWS and sizes.inputs >= EXPERT_INPUTS and sizes.outputs >= EXPERT_OUTPUTS
        return as_measured or _has_many_rows(sizes)
    if family == "skinny":
        return sizes.inputs in SKINNY_INPUTS and sizes.outputs in SKINNY_OUTPUTS
    return _is_large(sizes)


def beats_tuned(kind: str, family: str, sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether a kernel, configured by its launcher, is faster in a model than what a measurement of it alone chooses.

    Alone, Inductor's products of one row are within some percent of the kernels. In a decoder they take longer than
    alone, and nothing overlaps between them: on an H200 a step of 8 layers of Llama 8B took 1.67 ms where measurements
    had chosen, 1.39 ms where all were kernels. Nor does a measurement see how a configuration's shared memory makes
    room for the kernels after it, or does not.

    Gate and up of many rows are faster alone, too: there a measurement of each shape only takes its time, 13 of the
    68 seconds in which a prefill of Llama 8B was compiled (stock: 58).
    """
    if kind == "linear_swiglu" and family == "gated":
        as_measured = sizes.inputs >= TUNED_INPUTS and sizes.outputs >= TUNED_OUTPUTS
        return capability == H200 and as_measured and _is_large(sizes)
    if family != "skinny" or (kind == "linear_add" and sizes.rows > MOST_ADDED_ROWS):
        return False
    is_head = kind == "norm_linear" and sizes.inputs in SKINNY_INPUTS and sizes.outputs in HEAD_OUTPUTS
    return capability == H200 and (is_head or runs_well(kind, family, sizes, capability))


def _is_large(sizes: Sizes) -> bool:
    fills = sizes.rows * sizes.outputs >= FILLING_RESULTS
    return (sizes.inputs >= LARGE_INPUTS and sizes.outputs >= LARGE_OUTPUTS and fills) or _has_many_rows(sizes)


def _has_many_rows(sizes: Sizes) -> bool:
    return sizes.inputs >= SMALL_INPUTS and sizes.outputs >= SMALL_OUTPUTS and sizes.rows >= MANY_ROWS


def splits_norm_well(rows: int, features: int, capability: tuple[int, int]) -> bool:
    """Whether a norm between two linears of few rows is faster halved between their kernels than as a third one.

    Every CTA of the second kernel reads the sums of squares of all rows, a byte for each element of x.
    """
    return capability == H200 and rows * features <= MOST_SPLIT_ELEMENTS


def packs_well(rows: int, capability: tuple[int, int]) -> bool:
    """Whether one product over packed weights is faster than several of one input."""
    return capability == H200 and rows > MOST_SKINNY_ROWS


def widens_well(results: int, capability: tuple[int, int]) -> bool:
    """Whether a product of half precision is made in float32, `results` elements, faster than made and then widened."""
    return capability == H200 and results >= FEWEST_WIDE_RESULTS


def trains(sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether both passes of a gated MLP are faster than what Inductor makes, each piece by its kernel."""
    return capability == H200 and _is_large(sizes) and sizes.rows >= FEWEST_TRAINED_ROWS
