"""The build: one run of ninja over all sources, whose result appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import sources, toolchain
from .arch_list import architectures, front_ends, parse_architectures
from .library_file import LIBRARY_NAME, cache_directory, directory_lock, seal, usable_library
from .sources import COMPILE_FLAGS, LINK_FLAGS
from .toolchain import BuildError

# ptxas: wgmma instructions were serialised; setmaxnreg was ignored. Either makes a kernel several times slower.
FATAL_WARNINGS = re.compile(r"\b(C7508|C7510)\b")

# Run in a process of its own: it loads the library as torch would and prints the id that the library's code returns.
_LOAD_CHECK = """
import ctypes, sys
import torch
library = ctypes.CDLL(sys.argv[1])
library.infuse_build_id.restype = ctypes.c_char_p
print(library.infuse_build_id().decode())
"""


def build_id(archs: Iterable[str] | None = None) -> str:
    """16 hex digits over sources, flags, nvcc's version and the architectures: which library file it is.

    The first eight are those of `source_id`, so that the libraries of one set of sources are found by name, also
    where nvcc is gone. Without nvcc its version counts as "none".
    """
    names = architectures() if archs is None else parse_architectures(archs)
    nvcc = toolchain.find_nvcc()
    version = toolchain.nvcc_version(nvcc) if nvcc else "none"
    return sources.source_id()[:8] + hashlib.sha256(repr((version, names)).encode()).hexdigest()[:8]


def _gencode_flags(archs: Iterable[str]) -> list[str]:
    """One flag for each PTX that `front_ends` names; code=compute_80 keeps it, code=sm_86 is machine code from it."""
    return [f"-gencode=arch={ptx},code=[{','.join(codes)}]" for ptx, codes in front_ends(archs).items()]


def _write_ninja_file(work: Path, nvcc: Path, archs: tuple[str, ...]) -> None:
    """One edge per translation unit, so that they compile in parallel, and one that links."""
    root, torch_folder = sources.source_root(), toolchain.torch_folder()
    include = [f"-I{work}", f"-I{root}", f"-I{root / 'include'}", f"-isystem={torch_folder / 'include'}"]
    objects: list[str] = []
    lines = ["rule run", "  command = $command", "  description = $out"]

    def edge(output: str, inputs: list[str], command: list[str]) -> None:
        shell_line = shlex.join(command).replace("$", "$$")
        lines.extend([f"build {output}: run {' '.join(inputs)}", f"  command = {shell_line}"])

    for path in sources.source_files():
        if path.suffix in (".cu", ".cpp"):
            objects.append("_".join(path.relative_to(root).with_suffix(".o").parts))
            command = [str(nvcc), *COMPILE_FLAGS, *_gencode_flags(archs), *include, "-c", str(path), "-o", objects[-1]]
            edge(objects[-1], [], command)
    link = [str(nvcc), *_gencode_flags(archs), *objects, f"-L{torch_folder / 'lib'}", *LINK_FLAGS, "-o", LIBRARY_NAME]
    edge(LIBRARY_NAME, objects, link)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")


def _write_build_info(work: Path, identifier: str, archs: tuple[str, ...], nvcc: Path) -> None:
    values = {
        "INFUSE_BUILD_ID": identifier,
        "INFUSE_SOURCE_ID": sources.source_id(),
        "INFUSE_ARCHS": ",".join(archs),
        "INFUSE_CUDA_VERSION": toolchain.nvcc_version(nvcc),
    }
    lines = [f'#define {name} "{value}"\n' for name, value in values.items()]
    (work / "infuse_build_info.h").write_text("".join(lines))


def _run_ninja(work: Path, jobs: int, verbose: bool) -> str:
    """Run the build in `work` and return what the compilers printed.

    Raises:
        BuildError: a command failed, or ptxas warned of what makes kernels slow.
    """
    command = [str(toolchain.find_ninja()), "-C", str(work), "-j", str(jobs), *(["-v"] if verbose else [])]
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                output.append(line)
                if verbose:
                    print(line, end="", flush=True)
        except BaseException:  # interrupted: ninja stops the compilers it started
            process.terminate()
            raise
    text = "".join(output)
    if process.returncode != 0:
        failure = text[max(text.find("FAILED:"), 0) :]
        raise BuildError(f"the kernels did not compile ({shlex.join(command)}):\n{_shorten(failure)}")
    fatal = FATAL_WARNINGS.search(text)
    if fatal is not None:
        said = [line for line in text.splitlines() if FATAL_WARNINGS.search(line)]
        raise BuildError(f"ptxas warned {fatal[1]}, which makes a kernel slow, expected no such warning:\n{said[0]}")
    return text


def _shorten(text: str, most_lines: int = 60) -> str:
    """The compiler's message without the resource reports, cut to a readable length."""
    lines = [line for line in text.splitlines() if "ptxas info" not in line and "bytes stack frame" not in line]
    left_out = len(lines) - most_lines
    return "\n".join(lines[:most_lines]) + (f"\n... {left_out} more lines" if left_out > 0 else "")


def _check_loads(library: Path, identifier: str) -> None:
    """Load the new library in another process and compare the id that its code returns.

    Raises:
        BuildError: it does not load, or answers with another id.
    """
    command = [sys.executable, "-c", _LOAD_CHECK, str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if answer.returncode != 0:
        raise BuildError(f"the new library does not load (exit status {answer.returncode}):\n{_shorten(answer.stderr)}")
    got = answer.stdout.strip()
    if got != identifier:
        raise BuildError(f"the new library's build id: got {got!r}, expected {identifier!r}")


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed builds left; the caller holds the lock, so no other build is under way."""
    for path in directory.glob(".build-*"):
        shutil.rmtree(path, ignore_errors=True)


def build(
    archs: Iterable[str] | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    verbose: bool = False,
) -> Path:
    """Compile the kernel library, unless it is there already, and return its path.

    Several processes may call this at once: one builds, the others wait and use its result. The file appears whole or
    not at all; nothing but an empty lock file stays behind after a failure. The compilers' resource reports are kept
    beside the library, in build.log.

    Args:
        archs: entries as in `parse_architectures`; None: as `architectures` says.
        directory: where to put the library; None: the folder of its build id in the cache.
        jobs: compilers to run at once; None: as `job_count` says.
        verbose: print the commands and their output as they run.

    Raises:
        BuildError: it does not compile, or does not load.
        CompilerNotFoundError: there is no nvcc.
        ValueError: an architecture is malformed.
    """
    names = architectures() if archs is None else parse_architectures(archs)
    nvcc = toolchain.require_nvcc()
    identifier = build_id(names)
    folder = Path(directory).resolve() if directory is not None else cache_directory().resolve() / identifier
    folder.mkdir(parents=True, exist_ok=True)
    destination = folder / LIBRARY_NAME
    with directory_lock(folder):
        if usable_library(destination, identifier) is not None:
            return destination
        _remove_leftovers(folder)
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
        try:
            _write_build_info(work, identifier, names, nvcc)
            _write_ninja_file(work, nvcc, names)
            log = _run_ninja(work, toolchain.job_count() if jobs is None else jobs, verbose)
            seal(work / LIBRARY_NAME)
            _check_loads(work / LIBRARY_NAME, identifier)
            (work / "build.log").write_text(log)
            (work / "build.log").replace(folder / "build.log")
            (work / LIBRARY_NAME).replace(destination)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return destination
