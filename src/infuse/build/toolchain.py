"""The programs that a build runs, nvcc and ninja, the headers of torch, and how many compilers run at once."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")


class BuildError(RuntimeError):
    """The kernel library could not be built; the message holds the command and the compiler's words."""


class CompilerNotFoundError(BuildError):
    """There is no nvcc; the message says where it was looked for."""


def _nvcc_places() -> Iterator[tuple[str, Path | None]]:
    """Where nvcc may be, best first: a description and the path, None where there is nothing to look at."""
    compiler = os.environ.get("CUDACXX")
    yield f"CUDACXX={compiler}" if compiler else "CUDACXX (not set)", Path(compiler) if compiler else None
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        yield f"{variable}={home}" if home else f"{variable} (not set)", Path(home) / "bin" / "nvcc" if home else None
    on_path = shutil.which("nvcc")
    yield "PATH", Path(on_path) if on_path else None
    yield str(USUAL_NVCC.parent), USUAL_NVCC


def find_nvcc() -> Path | None:
    """The nvcc to compile with, None if there is none."""
    for _, path in _nvcc_places():
        if path is not None and path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def require_nvcc() -> Path:
    """The nvcc to compile with.

    Raises:
        CompilerNotFoundError: there is none.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        places = ", ".join(description for description, _ in _nvcc_places())
        raise CompilerNotFoundError(
            f"no nvcc: looked in {places}; install the CUDA toolkit 12.4 or newer, or set CUDA_HOME to its folder"
        )
    return nvcc


@functools.cache
def nvcc_version(nvcc: Path) -> str:
    """For example "13.0.88".

    Raises:
        BuildError: the program does not answer like nvcc.
    """
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} --version: {error}") from error
    version = re.search(r"\bV(\d+\.\d+\.\d+)", answer)
    if version is None:
        raise BuildError(f"{nvcc} --version: got {answer.strip()[:200]!r}, expected a version such as V13.0.88")
    return version[1]


def find_ninja() -> Path:
    """The ninja of the Python package, else that on the PATH.

    Raises:
        BuildError: neither is there.
    """
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        binary = Path(ninja.BIN_DIR) / "ninja"
        if binary.is_file():
            return binary
    on_path = shutil.which("ninja")
    if on_path is None:
        raise BuildError("no ninja: neither the Python package nor the program was found; run `pip install ninja`")
    return Path(on_path)


def torch_folder() -> Path:
    """Where torch is installed, found without importing it.

    Raises:
        BuildError: torch is not importable.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch, whose headers the kernels need, is not importable; install torch 2.11 or newer")
    return Path(spec.submodule_search_locations[0])


def job_count() -> int:
    """Compilers to run at once: MAX_JOBS when set, else one a processor.

    Raises:
        ValueError: MAX_JOBS is not a positive integer.
    """
    setting = os.environ.get("MAX_JOBS", "")
    if not setting:
        return os.cpu_count() or 1
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(f"MAX_JOBS: got {setting!r}, expected a positive integer")
    return int(setting)
