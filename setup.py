"""The part of the build that pyproject.toml can't say: a wheel may carry the compiled kernel library.

INFUSE_BUILD_KERNELS=1 demands the library, =0 leaves it out; unset, it is built when nvcc and torch are there.
An editable install never compiles: `python -m infuse build` does that.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def why_no_kernels() -> str:
    """The reason why this machine can't compile the kernels, "" if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch, whose headers they need, is not importable (--no-build-isolation uses the installed one)"
    if not load_build().find_nvcc():
        return "nvcc was not found"
    return ""


def wants_kernels() -> bool:
    """Read INFUSE_BUILD_KERNELS; say why when the library is left out.

    Raises:
        SystemExit: the variable has an unknown value, or demands kernels that can't be compiled here.
    """
    setting = os.environ.get("INFUSE_BUILD_KERNELS", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"INFUSE_BUILD_KERNELS: expected 0, 1 or nothing, got {setting!r}")
    if setting == "0":
        print("infuse: no compiled kernels in this wheel (INFUSE_BUILD_KERNELS=0)", file=sys.stderr)
        return False
    reason = why_no_kernels()
    if reason and setting == "1":
        raise SystemExit(f"INFUSE_BUILD_KERNELS=1: the kernels can't be compiled: {reason}")
    if reason:
        print(f"infuse: no compiled kernels in this wheel: {reason}", file=sys.stderr)
    return not reason


def load_build() -> ModuleType:
    """src/infuse/build as a package of its own, without importing the one around it."""
    spec = importlib.util.spec_from_file_location("infuse_build", ROOT / "src" / "infuse" / "build" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its own modules look for it
    spec.loader.exec_module(module)
    return module


class BdistWheel(bdist_wheel):
    """A pure wheel, or with the library in it one for any Python 3 on Linux: it speaks torch's stable ABI only."""

    kernels = False

    def run(self) -> None:
        build_lib = Path(self.get_finalized_command("build").build_lib)
        shutil.rmtree(build_lib, ignore_errors=True)  # what an earlier build left there would be packed as well
        self.kernels = wants_kernels()
        if self.kernels:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
            self.ship_kernels(build_lib / "infuse" / "_lib")
        super().run()

    def ship_kernels(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        build = load_build()
        print(f"infuse: compiling the kernels for {', '.join(build.architectures())}", file=sys.stderr, flush=True)
        shutil.copy2(build.build(), directory / build.LIBRARY_NAME)

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "linux_x86_64") if self.kernels else super().get_tag()


setup(cmdclass={"bdist_wheel": BdistWheel})
