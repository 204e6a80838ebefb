"""The compiled kernel library: where it is, whether it can be trusted, how it is built and loaded.

The library is one shared object that speaks torch's stable ABI, so it depends on neither the version of Python nor
that of torch (2.11 or later). It comes from a wheel (`infuse/_lib`) or is compiled by nvcc into
`$INFUSE_CACHE_DIR/<build id>/`, by default `~/.cache/infuse/<build id>/`.

A library file names what it was built from (a marker in its data) and ends in a digest of itself. Both are read
before it is loaded: loading a truncated shared object can kill the process, and one built from other sources would
compute something else than the Python around it believes.

This file imports nothing of infuse and no torch, so that setup.py can run it by its path.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.resources
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger("infuse")

LIBRARY_NAME = "libinfuse_kernels.so"
ARCH_LIST_VARIABLE = "TORCH_CUDA_ARCH_LIST"
DEFAULT_ARCHITECTURES = ("sm_80", "sm_86", "sm_90a", "compute_80")
OLDEST_CAPABILITY = (8, 0)
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")

# Asserts in device code serialise wgmma, hence NDEBUG. The two torch macros select the stable ABI of 2.11.
COMPILE_FLAGS = (
    "-O3",
    "-DNDEBUG",
    "-std=c++20",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
)
# The static CUDA runtime must not be visible to other libraries of the process.
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-ltorch_cpu")
SOURCE_SUFFIXES = (".cu", ".cuh", ".cpp", ".h")
REQUIRED_SYMBOLS = ("infuse_build_id", "infuse_archs", "infuse_cuda_version")

# ptxas: wgmma instructions were serialised; setmaxnreg was ignored. Either makes a kernel several times slower.
FATAL_WARNINGS = re.compile(r"\b(C7508|C7510)\b")

_MARKER = re.compile(
    rb"INFUSE_BUILD_ID=([0-9a-f]+);INFUSE_SOURCE_ID=([0-9a-f]+);INFUSE_ARCHS=([\w,]+);INFUSE_CUDA_VERSION=([\d.]+);"
)
_DIGEST = b"\nINFUSE_SHA256="
_DIGEST_BYTES = len(_DIGEST) + 64

# Run in a process of its own: it loads the library as torch would and prints the id that the library's code returns.
_LOAD_CHECK = """
import ctypes, sys
import torch
library = ctypes.CDLL(sys.argv[1])
library.infuse_build_id.restype = ctypes.c_char_p
print(library.infuse_build_id().decode())
"""


class BuildError(RuntimeError):
    """The kernel library could not be built; the message holds the command and the compiler's words."""


class CompilerNotFoundError(BuildError):
    """There is no nvcc; the message says where it was looked for."""


class _UnusableLibraryError(Exception):
    """A library file that must not be loaded: "got ..., expected ..."."""


@dataclass(frozen=True, slots=True)
class Status:
    """What `load` achieved in this process."""

    loaded: bool
    path: Path | None
    archs: tuple[str, ...]  # of the library, () when none is loaded
    reason: str  # why it is not loaded or does not serve this GPU; "" when all is well


@dataclass(frozen=True, slots=True)
class _Library:
    """What a library file says about itself."""

    path: Path
    build_id: str
    source_id: str
    archs: tuple[str, ...]


# ---- identity ----


def source_root() -> Path:
    """The folder of the C++ and CUDA sources: that of the checkout this file lies in, else the installed package data.

    Raises:
        BuildError: neither is there.
    """
    checkout = Path(__file__).resolve().parents[2] / "csrc"
    if (checkout / "build_info.cpp").is_file():
        return checkout
    with contextlib.suppress(ModuleNotFoundError):
        installed = Path(str(importlib.resources.files("infuse"))) / "csrc"
        if (installed / "build_info.cpp").is_file():
            return installed
    raise BuildError(f"kernel sources: got none in {checkout} or the installed package, expected csrc/build_info.cpp")


def source_files() -> tuple[Path, ...]:
    """Every source and header of the library, sorted."""
    return tuple(sorted(path for path in source_root().rglob("*") if path.suffix in SOURCE_SUFFIXES))


def source_id() -> str:
    """16 hex digits over the text of every source and the compiler flags: what the library computes."""
    root = source_root()
    digest = hashlib.sha256(repr((COMPILE_FLAGS, LINK_FLAGS)).encode())
    for path in source_files():
        digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_id(archs: Iterable[str] | None = None) -> str:
    """16 hex digits over sources, flags, nvcc's version and the architectures: which library file it is.

    The first eight are those of `source_id`, so that the libraries of one set of sources are found by name, also
    where nvcc is gone. Without nvcc its version counts as "none".
    """
    names = architectures() if archs is None else parse_architectures(archs)
    nvcc = find_nvcc()
    version = nvcc_version(nvcc) if nvcc else "none"
    return source_id()[:8] + hashlib.sha256(repr((version, names)).encode()).hexdigest()[:8]


# ---- architectures ----


def architectures() -> tuple[str, ...]:
    """Architectures to build for: those of TORCH_CUDA_ARCH_LIST when set, else all that Infuse is made for.

    "sm_90a" is machine code for compute capability 9.0, "compute_80" is PTX that the driver compiles on GPUs without.

    Raises:
        ValueError: an entry of the variable is malformed, or none is 8.0 or newer.
    """
    entries = os.environ.get(ARCH_LIST_VARIABLE, "").replace(";", " ").split()
    return parse_architectures(entries) if entries else DEFAULT_ARCHITECTURES


def parse_architectures(entries: Iterable[str]) -> tuple[str, ...]:
    """Names in nvcc's form from entries in torch's form ("8.0", "9.0a+PTX") or nvcc's ("sm_90a", "compute_80").

    9.0 becomes sm_90a, since all GPUs of capability 9.0 have what the "a" stands for. Entries older than 8.0, which
    lists made for torch contain, are left out.

    Raises:
        ValueError: an entry is malformed, or none is 8.0 or newer.
    """
    names: list[str] = []
    entries = tuple(entries)
    for entry in entries:
        torch_form = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        nvcc_form = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry)
        if torch_form:
            major, minor, suffix, ptx = torch_form.groups()
            machine_suffix = suffix or ("a" if (major, minor) == ("9", "0") else "")
            found = [f"sm_{major}{minor}{machine_suffix}"] + ([f"compute_{major}{minor}{suffix}"] if ptx else [])
        elif nvcc_form:
            _, major, minor, _ = nvcc_form.groups()
            found = [entry]
        else:
            raise ValueError(f'architectures: got {entry!r}, expected entries such as "8.0", "9.0a" or "9.0a+PTX"')
        if (int(major), int(minor)) < OLDEST_CAPABILITY:
            logger.info("architecture %s is left out: the kernels need 8.0 or newer", entry)
            continue
        names += [name for name in found if name not in names]
    if not names:
        got = " ".join(entries) or "none"
        raise ValueError(f"architectures: got {got}, expected at least one that is 8.0 or newer")
    return tuple(names)


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for when the library is to run on one GPU of this compute capability."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def archs_cover(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of `archs` runs on a GPU of this compute capability."""
    for arch in archs:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        assert parts is not None, arch
        kind, suffix, target = parts[1], parts[4], (int(parts[2]), int(parts[3]))
        if suffix == "a":
            fits = capability == target
        elif kind == "compute" and not suffix:
            fits = capability >= target
        else:
            fits = capability[0] == target[0] and capability[1] >= target[1]
        if fits:
            return True
    return False


# ---- tools ----


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


def _require_nvcc() -> Path:
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


def _find_ninja() -> Path:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        binary = Path(ninja.BIN_DIR) / "ninja"
        if binary.is_file():
            return binary
    on_path = shutil.which("ninja")
    if on_path is None:
        raise BuildError("no ninja: neither the Python package nor the program was found; run `pip install ninja`")
    return Path(on_path)


def _torch_folder() -> Path:
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


# ---- library files ----


def cache_directory() -> Path:
    """$INFUSE_CACHE_DIR, or ~/.cache/infuse."""
    setting = os.environ.get("INFUSE_CACHE_DIR")
    return Path(setting) if setting else Path.home() / ".cache" / "infuse"


def _seal(library: Path) -> None:
    """Append the digest that `_read_library` checks. Data behind an ELF file's sections is ignored by the loader."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    with library.open("ab") as file:
        file.write(_DIGEST + digest.encode())


def _read_library(path: Path) -> _Library:
    """Examine a library file without loading it.

    Raises:
        _UnusableLibraryError: it is no intact library of Infuse.
    """
    data = path.read_bytes()
    if not data.startswith(b"\x7fELF"):
        raise _UnusableLibraryError(f"got a file that begins with {data[:4]!r}, expected an ELF shared library")
    content, footer = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if footer != _DIGEST + hashlib.sha256(content).hexdigest().encode():
        raise _UnusableLibraryError("got a truncated or altered file, expected it to end in the digest of its content")
    marker = _MARKER.search(content)
    missing = [symbol for symbol in REQUIRED_SYMBOLS if f"\0{symbol}\0".encode() not in content]
    if marker is None or missing:
        lacks = ", ".join(missing) if missing else "an INFUSE_BUILD_ID marker"
        raise _UnusableLibraryError(f"got a library without {lacks}, expected a build of infuse's kernels")
    identifier, source, archs, _ = (group.decode() for group in marker.groups())
    return _Library(path, identifier, source, tuple(archs.split(",")))


_reported: set[Path] = set()


def _report_unusable(path: Path, error: Exception) -> None:
    if path not in _reported:
        _reported.add(path)
        warnings.warn(f"infuse: the kernel library {path} is ignored: {error}", RuntimeWarning, stacklevel=3)


def _usable_library(path: Path, expected_build_id: str | None = None) -> _Library | None:
    """The library at `path` if it is intact and of the present sources; anything else is reported once."""
    try:
        library = _read_library(path)
        if library.source_id != source_id():
            raise _UnusableLibraryError(f"got one of sources {library.source_id}, expected sources {source_id()}")
        if expected_build_id not in (None, library.build_id):
            raise _UnusableLibraryError(f"got build {library.build_id}, expected build {expected_build_id}")
    except FileNotFoundError:
        return None
    except (_UnusableLibraryError, OSError) as error:
        _report_unusable(path, error)
        return None
    return library


def _directory_lock(directory: Path, timeout: float = -1) -> FileLock:
    return FileLock(directory / ".lock", timeout=timeout)


def _cached_library(path: Path) -> _Library | None:
    """The library in a folder of the cache; an unusable one is removed, unless a build is about to replace it."""
    library = _usable_library(path, path.parent.name)
    if library is None and path.exists():
        with contextlib.suppress(Timeout, OSError), _directory_lock(path.parent, timeout=0):
            if _usable_library(path, path.parent.name) is None:  # no build has replaced it meanwhile
                path.unlink()
    return library


def _packaged_library() -> Path:
    """Where a wheel that was built with nvcc carries the library."""
    return Path(__file__).resolve().parent / "_lib" / LIBRARY_NAME


def _find(capabilities: Sequence[tuple[int, int]]) -> _Library | None:
    """The best library there is: one for all `capabilities`, then the packaged one, then the newest."""
    packaged = _packaged_library()
    found: list[tuple[bool, bool, float, _Library]] = []

    def add(library: _Library | None) -> None:
        if library is not None:
            fits = all(archs_cover(library.archs, capability) for capability in capabilities)
            found.append((fits, library.path == packaged, library.path.stat().st_mtime, library))

    add(_usable_library(packaged))
    for path in sorted(cache_directory().glob(f"{source_id()[:8]}*/{LIBRARY_NAME}")):
        add(_cached_library(path))
    return max(found, key=lambda entry: entry[:3])[3] if found else None


def find_library() -> Path | None:
    """A library built from the present sources: the packaged one, else the newest in the cache, else None.

    A corrupt or foreign file is never loaded: it is reported once by a RuntimeWarning and treated as absent; in the
    cache it is removed.
    """
    library = _find(())
    return library.path if library else None


# ---- build ----


def _gencode_flags(archs: Iterable[str]) -> list[str]:
    return [
        f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}"  # code=compute_80 keeps the PTX
        for arch in archs
    ]


def _write_ninja_file(work: Path, nvcc: Path, archs: tuple[str, ...]) -> None:
    """One edge per translation unit, so that they compile in parallel, and one that links."""
    root, torch_folder = source_root(), _torch_folder()
    include = [f"-I{work}", f"-I{root}", f"-I{root / 'include'}", f"-isystem={torch_folder / 'include'}"]
    objects: list[str] = []
    lines = ["rule run", "  command = $command", "  description = $out"]

    def edge(output: str, inputs: list[str], command: list[str]) -> None:
        shell_line = shlex.join(command).replace("$", "$$")
        lines.extend([f"build {output}: run {' '.join(inputs)}", f"  command = {shell_line}"])

    for path in source_files():
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
        "INFUSE_SOURCE_ID": source_id(),
        "INFUSE_ARCHS": ",".join(archs),
        "INFUSE_CUDA_VERSION": nvcc_version(nvcc),
    }
    lines = [f'#define {name} "{value}"\n' for name, value in values.items()]
    (work / "infuse_build_info.h").write_text("".join(lines))


def _run_ninja(work: Path, jobs: int, verbose: bool) -> str:
    """Run the build in `work` and return what the compilers printed.

    Raises:
        BuildError: a command failed, or ptxas warned of what makes kernels slow.
    """
    command = [str(_find_ninja()), "-C", str(work), "-j", str(jobs), *(["-v"] if verbose else [])]
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
    nvcc = _require_nvcc()
    identifier = build_id(names)
    folder = Path(directory).resolve() if directory is not None else cache_directory().resolve() / identifier
    folder.mkdir(parents=True, exist_ok=True)
    destination = folder / LIBRARY_NAME
    with _directory_lock(folder):
        if _usable_library(destination, identifier) is not None:
            return destination
        _remove_leftovers(folder)
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
        try:
            _write_build_info(work, identifier, names, nvcc)
            _write_ninja_file(work, nvcc, names)
            log = _run_ninja(work, job_count() if jobs is None else jobs, verbose)
            _seal(work / LIBRARY_NAME)
            _check_loads(work / LIBRARY_NAME, identifier)
            (work / "build.log").write_text(log)
            (work / "build.log").replace(folder / "build.log")
            (work / LIBRARY_NAME).replace(destination)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return destination


# ---- load ----

_load_lock = threading.RLock()
_loaded: Status | None = None
_failures: dict[bool, Status] = {}  # by build_missing


def load(*, build_missing: bool) -> Status:
    """Load the library into this process, once; later calls return the same answer.

    It defines no operator but implements those that `infuse.ops` defines. Call it when a kernel is about to be needed
    rather than at import: with `build_missing`, or once torch has initialised CUDA, it asks for the GPUs' compute
    capabilities. With `build_missing` a missing library, or one that does not serve these GPUs, is compiled, for
    these GPUs only unless TORCH_CUDA_ARCH_LIST says otherwise. A failure is an answer with a reason, not an error.
    """
    global _loaded
    with _load_lock:
        if _loaded is None:
            if build_missing not in _failures:
                status = _load_now(build_missing)
                if not status.loaded:
                    logger.info("%s", status.reason)
                    _failures[build_missing] = status
                    return status
                logger.info("loaded %s (%s)", status.path, ", ".join(status.archs))
                if status.reason:
                    logger.warning("%s", status.reason)
                _loaded = status
            else:
                return _failures[build_missing]
        return _loaded


def covers(capability: tuple[int, int]) -> bool:
    """Whether the library that is loaded in this process runs on a GPU of this compute capability."""
    return _loaded is not None and archs_cover(_loaded.archs, capability)


def _absent(reason: str) -> Status:
    return Status(loaded=False, path=None, archs=(), reason=f"no compiled kernels: {reason}")


def _device_capabilities(build_missing: bool) -> list[tuple[int, int]]:
    import torch

    if not (build_missing or torch.cuda.is_initialized()) or not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def _uncovered(archs: Iterable[str], capabilities: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [capability for capability in capabilities if not archs_cover(archs, capability)]


def _not_covered(capabilities: Iterable[tuple[int, int]], archs: Iterable[str]) -> str:
    gpus = ", ".join(f"sm_{major}{minor}" for major, minor in capabilities)
    return f"GPU {gpus} is not covered by {', '.join(archs)}"


def _build_for(capabilities: list[tuple[int, int]]) -> str:
    """Compile what these GPUs need; "" or the reason why there is no such library."""
    served = [capability for capability in capabilities if capability >= OLDEST_CAPABILITY]
    reason = ""
    try:
        chosen = os.environ.get(ARCH_LIST_VARIABLE)
        archs = architectures() if chosen else tuple(architecture_of(capability) for capability in served)
        missing = _uncovered(archs, served)
        if not served or missing:
            reason = _not_covered(missing or capabilities, archs or DEFAULT_ARCHITECTURES)
        else:
            _require_nvcc()
            logger.warning("compiling the CUDA kernels for %s, once for this machine", ", ".join(archs))
            start = time.monotonic()
            path = build(archs)
            logger.info("compiled in %.0f s: %s", time.monotonic() - start, path)
    except (BuildError, ValueError, OSError) as error:
        reason = str(error)
    if reason:
        logger.warning("no CUDA kernels were compiled: %s", reason)
    return reason


def _load_now(build_missing: bool) -> Status:
    import torch

    if torch.version.cuda is None:
        return _absent(f"torch has no CUDA (it is {torch.__version__})")
    capabilities = _device_capabilities(build_missing)
    reason = "the library is not built; `python -m infuse build` compiles it"
    try:
        library = _find(capabilities)
        if build_missing and not capabilities:
            reason = "torch sees no CUDA device"
        elif build_missing and (library is None or _uncovered(library.archs, capabilities)):
            reason = _build_for(capabilities)
            library = _find(capabilities)
    except (BuildError, OSError) as error:
        return _absent(str(error))
    if library is None:
        return _absent(reason)
    try:
        torch.ops.load_library(str(library.path))
    except OSError as error:
        logger.warning("%s does not load: %s", library.path, error)
        return _absent(f"{library.path} does not load: {error}")
    missing = _uncovered(library.archs, capabilities)
    shortfall = _not_covered(missing, library.archs) if missing else ""
    return Status(loaded=True, path=library.path, archs=library.archs, reason=shortfall)


# ---- command line ----


def main(argv: Sequence[str] | None = None) -> int:
    """`infuse build`: compile the library and say what was done. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="infuse build", description="Compile Infuse's CUDA kernels with nvcc.")
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help='architecture, such as 9.0a or 8.0+PTX; may be repeated or hold several: "8.0;9.0a" '
        f"(default: {ARCH_LIST_VARIABLE}, else {', '.join(DEFAULT_ARCHITECTURES)})",
    )
    parser.add_argument("--jobs", type=int, help="compilers to run at once (default: MAX_JOBS, else one a processor)")
    parser.add_argument("--output", metavar="DIR", help="folder for the library (default: the cache)")
    parser.add_argument("--verbose", action="store_true", help="print the compilers' commands and output")
    arguments = parser.parse_args(argv)
    try:
        entries = " ".join(arguments.arch or []).replace(";", " ").split()
        archs = parse_architectures(entries) if entries else architectures()
        nvcc = _require_nvcc()
        print(f"compiling for {', '.join(archs)} with {nvcc} {nvcc_version(nvcc)}")
        start = time.monotonic()
        path = build(archs, directory=arguments.output, jobs=arguments.jobs, verbose=arguments.verbose)
    except (BuildError, ValueError) as error:
        print(f"infuse build: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - start:.1f} s)")
    return 0
