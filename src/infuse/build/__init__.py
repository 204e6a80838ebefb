"""The compiled kernel library: where it is, whether it can be trusted, how it is built and loaded.

The library is one shared object that speaks torch's stable ABI, so it depends on neither the version of Python nor
that of torch (2.11 or later). It comes from a wheel (`infuse/_lib`) or is compiled by nvcc into
`$INFUSE_CACHE_DIR/<build id>/`, by default `~/.cache/infuse/<build id>/`.

    sources, arch_list, toolchain    what is compiled, for which GPUs, with which programs
    library_file, compilation        the file that comes of it
    loading, command                 who asks for it: a process that needs kernels, a user

This package imports nothing of infuse and no torch, and its modules import each other relatively, so that setup.py
can run it by its path.
"""

from __future__ import annotations

from .arch_list import DEFAULT_ARCHITECTURES, architecture_of, architectures, archs_cover, parse_architectures
from .command import main
from .compilation import build, build_id
from .library_file import LIBRARY_NAME, cache_directory, find_library
from .loading import Status, covers, load
from .sources import COMPILE_FLAGS, LINK_FLAGS, source_files, source_id, source_root
from .toolchain import BuildError, CompilerNotFoundError, find_nvcc, job_count, nvcc_version

__all__ = [
    "COMPILE_FLAGS",
    "DEFAULT_ARCHITECTURES",
    "LIBRARY_NAME",
    "LINK_FLAGS",
    "BuildError",
    "CompilerNotFoundError",
    "Status",
    "architecture_of",
    "architectures",
    "archs_cover",
    "build",
    "build_id",
    "cache_directory",
    "covers",
    "find_library",
    "find_nvcc",
    "job_count",
    "load",
    "main",
    "nvcc_version",
    "parse_architectures",
    "source_files",
    "source_id",
    "source_root",
]
