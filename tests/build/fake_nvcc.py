"""A stand-in for nvcc, a shell script that makes a tiny library in no time, and what tests around it share."""

from __future__ import annotations

import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infuse import build
from infuse.build import sources

C_COMPILER = shutil.which("cc") or shutil.which("gcc")

FAKE_LIBRARY = """
#include "infuse_build_info.h"
const char infuse_marker[] = "INFUSE_BUILD_ID=" INFUSE_BUILD_ID ";INFUSE_SOURCE_ID=" INFUSE_SOURCE_ID
                             ";INFUSE_ARCHS=" INFUSE_ARCHS ";INFUSE_CUDA_VERSION=" INFUSE_CUDA_VERSION ";";
const char* infuse_build_id(void) { return INFUSE_BUILD_ID; }
const char* infuse_archs(void) { return INFUSE_ARCHS; }
const char* infuse_cuda_version(void) { return INFUSE_CUDA_VERSION; }
"""
FAKE_NVCC = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.1"; exit; fi
echo "$*" >> "$here/log"
for argument in "$@"; do
  case $argument in *.cu | *.cpp) compiles=yes ;; esac
  [ "$previous" = -o ] && output=$argument
  previous=$argument
done
if [ -n "$compiles" ]; then
  . "$here/behaviour"
  echo object > "$output"
else
  exec COMPILER -shared -fPIC -I. -o "$output" "$here/library.c"
fi
"""


class FakeNvcc:
    """A script that answers like nvcc; `behave` adds shell commands to each compilation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "nvcc"
        folder.mkdir()
        (folder / "library.c").write_text(FAKE_LIBRARY)
        self.path.write_text(FAKE_NVCC.replace("COMPILER", C_COMPILER or "cc"))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        self.behave("")

    def behave(self, commands: str) -> None:
        (self.folder / "behaviour").write_text(commands + "\n")

    def calls(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []


def left_behind(folder: Path) -> list[str]:
    """Names of all files under a folder but the locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def only_warning(action: Callable[[], Any]) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    return result, str(caught[0].message)


def copy_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = folder / "csrc"
    shutil.copytree(build.source_root(), copy)
    monkeypatch.setattr(sources, "source_root", lambda: copy)
    return copy
