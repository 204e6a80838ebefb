"""compute-sanitizer finds no fault in the CUDA kernels: every driver of kernel_drivers.py under each of its tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from infuse import build
from infuse.ops import library
from tests.csrc.kernel_drivers import DRIVERS

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "memcheck": ("--padding", "64"),  # neighbours in memory are no valid addresses then
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
}
# Where one lane arrives at a barrier in shared memory for its warp, which it has waited for, racecheck takes what the
# others have read for unordered with the copies that follow.
DRIVER_OPTIONS = {"racecheck": ("--skip-memory-barriers",)}


def find_sanitizer() -> str | None:
    """On the PATH, in CUDA_HOME, or beside nvcc."""
    nvcc = build.find_nvcc()
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    folders += [nvcc.resolve().parent] if nvcc else []
    places = [shutil.which("compute-sanitizer", path=path) for path in (None, *map(str, folders))]
    return next(filter(None, places), None)


def sanitize(tool: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command under a tool; each tensor gets memory of its own, which the tools can tell from its neighbours."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the PATH, in CUDA_HOME or beside nvcc")
    return subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *TOOLS[tool], *command],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def faults(ran: subprocess.CompletedProcess[str]) -> int:
    """How many the tool's summary names."""
    summary = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ", ran.stdout, re.MULTILINE)
    assert summary is not None, f"no summary:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
    return int(summary[1])


def digest(output: str) -> str:
    """The tool's different reports, each with how often it came, without threads, addresses and host frames."""
    reports: Counter[str] = Counter()
    report: list[str] = []
    for line in [*output.splitlines(), "========= end"]:
        text = re.sub(r"\((\d+,)+\d+\)|(?<!\+)0x[0-9a-f]+", "", line.removeprefix("========="))
        if re.match(" {5,}", text):
            report += [text.strip()] if re.search(r"\bThread\b.* at |^ +at ", text) else []
        elif text.strip():
            reports["\n    ".join(report)] += bool(report)
            report = [text.strip()] if line.startswith("=========") else []
    return "\n".join(f"{count} x {text}" for text, count in reports.most_common(12) if count)


@pytest.mark.gpu
@pytest.mark.parametrize("family", DRIVERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_kernels_have_no_fault(tool: str, family: str) -> None:
    reason = library.missing(torch.device("cuda"))
    if reason:
        pytest.skip(f"needs the compiled kernels: {reason}")
    ran = sanitize(tool, sys.executable, "-m", "tests.csrc.kernel_drivers", family, *DRIVER_OPTIONS.get(tool, ()))
    assert faults(ran) == 0 and ran.returncode == 0, f"{digest(ran.stdout)}\n{ran.stdout[-500:]}{ran.stderr[-1000:]}"
    launches = re.search(r"^(\d+) launches$", ran.stdout, re.MULTILINE)
    assert launches is not None and int(launches[1]) > 0, "the driver launched nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_a_planted_fault_is_found(tool: str, tmp_path: Path) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    program = str(tmp_path / "planted")
    source = str(ROOT / "tests" / "csrc" / "planted_faults.cu")
    subprocess.run([str(nvcc), "-arch=native", source, "-o", program], check=True, timeout=100)
    ran = sanitize(tool, program, tool)
    assert faults(ran) > 0 and ran.returncode != 0, ran.stdout


def test_a_digest_tells_reports_apart() -> None:
    hazard = (
        "========= Error: Race reported between {} access at a_kernel(Params)+0x90 and b\n"
        "=========     Write Thread ({},0,0) at a_kernel(Params)+0x90\n"
        "=========     Current Value : 0\n"
        "=========         Host Frame: main at x\n"
        "=========\n"
    )
    output = hazard.format("Write", 3) + hazard.format("Read", 4) + hazard.format("Write", 5) + "7 launches\n"
    assert digest(output).splitlines()[:2] == [
        "2 x Error: Race reported between Write access at a_kernel(Params)+0x90 and b",
        "    Write Thread  at a_kernel(Params)+0x90",
    ]


@pytest.mark.parametrize("family", DRIVERS)
def test_launches_fit_their_operators(family: str) -> None:
    """On the CPU most operators have no kernel, which is found out after the arguments were matched with the schema."""
    launches = 0
    for launch in DRIVERS[family](torch.device("cpu")):
        try:
            launch()
        except NotImplementedError as error:
            assert "from the 'CPU' backend" in str(error)
        launches += 1
    assert launches > 0
