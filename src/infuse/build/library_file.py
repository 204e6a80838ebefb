"""Library files: where they lie, whether they can be trusted, which one is the best.

A library file names what it was built from (a marker in its data) and ends in a digest of itself. Both are read
before it is loaded: loading a truncated shared object can kill the process, and one built from other sources would
compute something else than the Python around it believes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from . import sources
from .arch_list import archs_cover

LIBRARY_NAME = "libinfuse_kernels.so"
REQUIRED_SYMBOLS = ("infuse_build_id", "infuse_archs", "infuse_cuda_version")

_MARKER = re.compile(
    rb"INFUSE_BUILD_ID=([0-9a-f]+);INFUSE_SOURCE_ID=([0-9a-f]+);INFUSE_ARCHS=([\w,]+);INFUSE_CUDA_VERSION=([\d.]+);"
)
_DIGEST = b"\nINFUSE_SHA256="
_DIGEST_BYTES = len(_DIGEST) + 64


class _UnusableLibraryError(Exception):
    """A library file that must not be loaded: "got ..., expected ..."."""


@dataclass(frozen=True, slots=True)
class Library:
    """What a library file says about itself."""

    path: Path
    build_id: str
    source_id: str
    archs: tuple[str, ...]


def cache_directory() -> Path:
    """$INFUSE_CACHE_DIR, or ~/.cache/infuse."""
    setting = os.environ.get("INFUSE_CACHE_DIR")
    return Path(setting) if setting else Path.home() / ".cache" / "infuse"


def seal(library: Path) -> None:
    """Append the digest that `_read_library` checks. Data behind an ELF file's sections is ignored by the loader."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    with library.open("ab") as file:
        file.write(_DIGEST + digest.encode())


def _read_library(path: Path) -> Library:
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
    return Library(path, identifier, source, tuple(archs.split(",")))


_reported: set[Path] = set()


def _report_unusable(path: Path, error: Exception) -> None:
    if path not in _reported:
        _reported.add(path)
        warnings.warn(f"infuse: the kernel library {path} is ignored: {error}", RuntimeWarning, stacklevel=3)


def usable_library(path: Path, expected_build_id: str | None = None) -> Library | None:
    """The library at `path` if it is intact and of the present sources; anything else is reported once."""
    try:
        library, source_id = _read_library(path), sources.source_id()
        if library.source_id != source_id:
            raise _UnusableLibraryError(f"got one of sources {library.source_id}, expected sources {source_id}")
        if expected_build_id not in (None, library.build_id):
            raise _UnusableLibraryError(f"got build {library.build_id}, expected build {expected_build_id}")
    except FileNotFoundError:
        return None
    except (_UnusableLibraryError, OSError) as error:
        _report_unusable(path, error)
        return None
    return library


def directory_lock(directory: Path, timeout: float = -1) -> FileLock:
    """What a build holds on the folder it writes to; timeout in seconds, -1 waits for ever."""
    return FileLock(directory / ".lock", timeout=timeout)


def _cached_library(path: Path) -> Library | None:
    """The library in a folder of the cache; an unusable one is removed, unless a build is about to replace it."""
    library = usable_library(path, path.parent.name)
    if library is None and path.exists():
        with contextlib.suppress(Timeout, OSError), directory_lock(path.parent, timeout=0):
            if usable_library(path, path.parent.name) is None:  # no build has replaced it meanwhile
                path.unlink()
    return library


def packaged_library() -> Path:
    """Where a wheel that was built with nvcc carries the library."""
    return Path(__file__).resolve().parents[1] / "_lib" / LIBRARY_NAME


def best_library(capabilities: Sequence[tuple[int, int]]) -> Library | None:
    """The best library there is: one for all `capabilities`, then the packaged one, then the newest."""
    packaged = packaged_library()
    found: list[tuple[bool, bool, float, Library]] = []

    def add(library: Library | None) -> None:
        if library is not None:
            fits = all(archs_cover(library.archs, capability) for capability in capabilities)
            found.append((fits, library.path == packaged, library.path.stat().st_mtime, library))

    add(usable_library(packaged))
    for path in sorted(cache_directory().glob(f"{sources.source_id()[:8]}*/{LIBRARY_NAME}")):
        add(_cached_library(path))
    return max(found, key=lambda entry: entry[:3])[3] if found else None


def find_library() -> Path | None:
    """A library built from the present sources: the packaged one, else the newest in the cache, else None.

    A corrupt or foreign file is never loaded: it is reported once by a RuntimeWarning and treated as absent; in the
    cache it is removed.
    """
    library = best_library(())
    return library.path if library else None
