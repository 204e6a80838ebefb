"""What the kernel library is made of: the C++ and CUDA sources, the compiler flags, and a hash over both."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
from pathlib import Path

from .toolchain import BuildError

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


def source_root() -> Path:
    """The folder of the C++ and CUDA sources: that of the checkout this file lies in, else the installed package data.

    Raises:
        BuildError: neither is there.
    """
    checkout = Path(__file__).resolve().parents[3] / "csrc"
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
