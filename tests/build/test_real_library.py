"""The kernels as nvcc compiles them for sm_90a and others: one library for all tests of this file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infuse import build
from infuse.build import library_file
from tests.build.sass import overwritten_operands, parse


@pytest.fixture(scope="session")
def real_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache's library with its log, if it has one of these sources; else compiled once for all workers of a run."""
    if build.find_nvcc() is None:
        pytest.skip("needs nvcc")
    found = library_file.best_library([(9, 0)])
    if found and build.archs_cover(found.archs, (9, 0)) and (found.path.parent / "build.log").exists():
        return found.path
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return build.build(["9.0a"], directory=shared / "kernels")


REPORT = """
import ctypes, json, sys
import torch
if sys.argv[2] == "schema":
    library = torch.library.Library("infuse", "DEF")
    library.define("rms_norm_out(Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_before_weight,"
                   " bool eps_as_minimum, int config, Tensor(a!) out, Tensor(b!)? rstd=None) -> ()")
else:
    import infuse.ops.rms_norm
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
def text(name, *arguments):
    function = library[name]
    function.restype = ctypes.c_char_p
    answer = function(*arguments)
    return None if answer is None else answer.decode()
count = library.infuse_norm_num_configs()
print(json.dumps({
    "cuda": torch._C._dispatch_has_kernel_for_dispatch_key("infuse::rms_norm_out", "CUDA"),
    "id": text("infuse_build_id"),
    "archs": text("infuse_archs"),
    "version": text("infuse_cuda_version"),
    "configs": [text("infuse_norm_config_name", config) for config in range(-1, count + 1)],
}))
"""


@pytest.mark.parametrize("schema", ["schema", "infuse.ops"])
def test_real_library_loads_in_this_torch(schema: str, real_library: Path) -> None:
    answer = subprocess.run([sys.executable, "-c", REPORT, str(real_library), schema], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["cuda"] is True
    archs = report["archs"].split(",")
    assert "sm_90a" in archs
    assert report["id"] == build.build_id(archs)
    found = build.find_nvcc()
    assert found is not None and report["version"] == build.nvcc_version(found)
    names = report["configs"]
    assert names[0] is None and names[-1] is None
    assert len(set(names[1:-1])) == len(names) - 2 >= 6 and all(names[1:-1])


def test_real_library_exports_nothing_of_the_cuda_runtime(real_library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    listed = subprocess.run([nm, "-D", "--defined-only", real_library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "infuse_build_id" in names
    assert not [name for name in names if name.startswith(("cuda", "cu", "__cuda"))]


def test_kernels_do_not_spill(real_library: Path) -> None:
    log = (real_library.parent / "build.log").read_text()
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) > 50
    assert set(frames) == {("0", "0", "0")}


def find_cuobjdump() -> str | None:
    """In CUDA's folder, on the PATH, or in triton, which brings one."""
    nvcc = build.find_nvcc()
    folders = [nvcc.parent] if nvcc else []
    folders.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


@pytest.fixture(scope="session")
def listings(real_library: Path) -> list[str]:
    """The machine code of each kernel, its name first."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])}
    command = [cuobjdump, "--dump-sass", "-arch", "sm_90a", str(real_library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return re.split(r"Function : ", listing)[1:]


def test_machine_code_has_wide_loads_and_no_local_memory(listings: list[str]) -> None:
    assert len(listings) > 50
    for kernel in listings:
        name = kernel.split(None, 1)[0]
        assert not re.search(r"\b(LDL|STL)\b", kernel), f"{name} uses local memory"
        if "register_kernel" in name:
            assert "LDG.E" in kernel and re.search(r"LDG\.E\.(NA\.)?128", kernel), f"{name} has no 16-byte loads"


def test_operands_stay_in_their_registers_until_the_products_are_done(listings: list[str]) -> None:
    kernels = [kernel for kernel in listings if "HGMMA" in kernel]
    assert kernels
    for kernel in kernels:
        assert not list(overwritten_operands(parse(kernel))), kernel.split(None, 1)[0]
