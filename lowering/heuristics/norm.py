"""When the kernels of the norms run well, and with which configurations they compete."""

from __future__ import annotations

from dataclasses import dataclass

from infuse.lowering.heuristics import H200


@dataclass(frozen=True, slots=True)
class Problem:
    """An operator's kind and rows x row_size elements of itemsize bytes.

    capability: of the GPU. scattered: the rows of x do not lie at one distance, as heads inside a packed projection.
    captured: the graph is replayed as a CUDA graph, so that a launch costs no time of the host.
    """

    kind: str
    rows: int
    row_size: int
    itemsize: int
    capability: tuple[int, int]
    scattered: bool = False
    captured: bool = False


# Inductor keeps a row up to this size in registers where all rows lie at one distance; others it reads twice.
READ_ONCE = 1024
# With fewer elements launches count, of which the kernel's costs the host 2 to 5 us more than that of generated code.
MANY_ELEMENTS = 1 << 24
# Ranges of row sizes above READ_ONCE, in order: the largest, and the factor, see below.
FACTORS = {
    "rms_norm": ((5120, 1.09), (32768, 1.0), (65536, 1.15)),
    "layer_norm": ((7168, 1.28), (12288, 1.04), (16384, 1.0), (65536, 1.25)),
    "add_rms_norm": (),
    "add_layer_norm": (),
    "gated_rms_norm": ((5120, 1.15),),
}
# Rows of few elements, in a CUDA graph.
CAPTURED_FACTORS = {"rms_norm": 1.2, "layer_norm": 1.1, "add_rms_norm": 1.15}
FEW_ROWS = 64


def factor(problem: Problem) -> float:
    """Time of the formula, compiled alone and without tuning, over the kernel's, rounded down.

    1.0 where the kernel is no faster or nobody has looked. On an H200 with torch 2.11, bfloat16, x out of L2:
    rows of 1536, 2560 and 3072 elements RMSNorm 1.29, 1.38, 1.26, LayerNorm 2.29, 2.63, 2.43, for Inductor's blocks are
    powers of two; 2048, 4096, 5120, 6144 and 7168 RMSNorm 1.14, 1.10, 1.11, 1.03, 0.98, LayerNorm 1.41, 1.32, 1.74,
    1.52, 1.46; 8192, 12288, 16384, 32768 and 65536 RMSNorm 0.99, 0.89, 0.98, 0.92, 1.38, LayerNorm 1.05, 1.06, 0.93,
    1.30, 1.40. A gate before the norm 1.44, 1.51, 1.84, 1.34 and 1.32 at 2048, 4096, 5120, 8192 and 16384, behind it
    1.25, 1.17, 1.42, 0.95 and 1.02. With a residual add 1.00 to 1.07, but LayerNorm at 5120 1.23. Heads of 128 inside a
    packed projection 2.3. One to 64 rows of 4096 1.23 to 1.40, LayerNorm 1.10 to 1.18, with an add 1.27 to 1.59.
    """
    if problem.capability != H200 or problem.itemsize != 2:
        return 1.0
    if problem.rows * problem.row_size < MANY_ELEMENTS:
        is_row = READ_ONCE < problem.row_size <= 8192 and problem.rows <= FEW_ROWS
        return CAPTURED_FACTORS.get(problem.kind, 1.0) if problem.captured and is_row else 1.0
    if problem.row_size <= READ_ONCE:
        return 2.0 if problem.scattered and problem.kind == "rms_norm" else 1.0
    if problem.kind == "add_layer_norm" and problem.row_size.bit_count() > 1 and problem.row_size <= 7168:
        return 1.15
    return next((found for largest, found in FACTORS[problem.kind] if problem.row_size <= largest), 1.0)


def expected_times(problem: Problem, passes: int) -> dict[str, float]:
    """Times of formula and kernel in units of a pass over one tensor; passes: what both read and write."""
    return {"decomposition": passes * factor(problem), "kernel_-1": float(passes)}


def configurations(problem: Problem, available: int) -> tuple[int, ...]:
    """The launcher's configurations worth timing: its own choice (-1) and every one of its table."""
    del problem
    return (-1, *range(available))
