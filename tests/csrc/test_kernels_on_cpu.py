"""The kernels' logic without a GPU: each program runs the CUDA source on the CPU and compares with double precision.

What only a GPU shows (races, caches, speed) is tested in tests/ops/*_cuda.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from infuse import build

HERE = Path(__file__).resolve().parent
FLAGS = ("-O1", "-std=c++20", "-x", "c++", "-Xcompiler=-fno-strict-aliasing,-Wall,-Wextra,-Wno-unknown-pragmas,-Werror")


@pytest.mark.parametrize(
    "program",
    [
        "attention_backward",
        "attention_decode",
        "attention_forward",
        "cross_entropy",
        "gated_backward",
        "gemm",
        "linear_results",
        "norm",
        "norm_backward",
        "rope",
        "skinny_linear",
        "skinny_row",
        "split_norm",
    ],
)
def test_kernel_is_right_on_the_cpu(program: str, tmp_path: Path) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc, for CUDA's headers")
    sources = build.source_root()
    include = [f"-I{folder}" for folder in (HERE / "emulation", sources, sources / "include")]
    command = [str(nvcc), *FLAGS, *include, str(HERE / f"{program}.cpp"), "-o", str(tmp_path / program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([str(tmp_path / program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout == "ok\n"
