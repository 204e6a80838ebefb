"""`infuse doctor`: what this machine has, what is missing, what that costs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from infuse.cli.arguments import Parser
from infuse.settings import PATTERNS

MINIMUM_TORCH = (2, 11)
# The check that a norm is rewritten must not depend on what the environment sets.
DEFAULTS = {
    "infuse.patterns": PATTERNS,
    "infuse.strict": False,
    "infuse.numerics": "fused",
    "infuse.kernels": "auto",
    "infuse.verify": "off",
    "infuse.mlp_memory": "gate_up",
}
EXTRAS = ("torchtune", "transformers", "rich", "matplotlib")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination. broken: Infuse can't work as long as this is so."""

    subject: str
    says: str
    broken: bool = False


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="infuse doctor", description="Check the installation. Exit code 1 if something is broken.")
    parser.parse_args(argv)
    broken = 0
    for finding in examine():
        broken += finding.broken
        subject = f"BROKEN {finding.subject}:" if finding.broken else f"{finding.subject}:"
        print(f"{subject:<20} {finding.says}")
    print(f"\n{broken} broken" if broken else "\nnothing is broken")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """The findings, in the order in which one builds on the other."""
    for check in (_versions, _extras, _entry_point, _settings, _host_compiler, _gpu, _kernels, _rewriting):
        yield from _guarded(check)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a doctor reports, whatever it meets
        yield Finding(check.__name__.strip("_").replace("_", " "), f"{type(error).__name__}: {error}", broken=True)


def _versions() -> Iterator[Finding]:
    import torch

    from infuse.caches import build_hash
    from infuse.version import __version__

    yield Finding("infuse", f"{__version__}, build hash {build_hash()}, in {Path(__file__).resolve().parents[1]}")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    too_old = "" if version >= MINIMUM_TORCH else ", expected 2.11 or newer"
    yield Finding("torch", f"{torch.__version__}{too_old}, {torch.get_num_threads()} threads", broken=bool(too_old))
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("platform", f"{platform.platform()}, {os.cpu_count()} processors")


def _extras() -> Iterator[Finding]:
    found = [f"{name} {version}" for name in EXTRAS if (version := _version_of(name))]
    missing = [name for name in EXTRAS if not _version_of(name)]
    hint = f"; without {', '.join(missing)}: pip install 'infuse[demo]' if you want the demo" if missing else ""
    yield Finding("optional packages", (", ".join(found) or "none") + hint)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _entry_point() -> Iterator[Finding]:
    expected = "infuse.backend:infuse"
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="infuse")
    values = sorted({point.value for point in points})
    if values == [expected]:
        yield Finding("torch.compile", 'backend="infuse" is registered')
        return
    remedy = "reinstall it, or `import infuse.backend` and pass infuse.backend.infuse as the backend"
    yield Finding(
        "torch.compile", f'backend="infuse": got {values or "no entry point"}, expected {expected}; {remedy}', True
    )


def _settings() -> Iterator[Finding]:
    from infuse.settings import ENV_PREFIX, NAMES, resolve

    try:
        settings = resolve()
    except (ValueError, TypeError) as error:
        yield Finding("settings", str(error), broken=True)
        return
    values = [f"{field.name}={_plain(getattr(settings, field.name))}" for field in dataclasses.fields(settings)]
    named = [ENV_PREFIX + name.upper() for name in NAMES if ENV_PREFIX + name.upper() in os.environ]
    yield Finding("settings", ", ".join(values) + (f" (set by {', '.join(named)})" if named else ""))


def _plain(value: object) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _host_compiler() -> Iterator[Finding]:
    reason = why_inductor_cannot_compile()
    if reason:
        yield Finding("C++ compiler", reason, broken=True)
    else:
        yield Finding("C++ compiler", f"{_host_compiler_path()}, for torch.compile")


def _host_compiler_path() -> str:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    return next((found for name in names if (found := shutil.which(name))), "")


def why_inductor_cannot_compile() -> str:
    """What torch.compile itself lacks on this machine, with the remedy; "" if nothing."""
    if not _host_compiler_path():
        return "got none, expected g++ or clang++, which torch.compile needs (Debian and Ubuntu: apt install g++)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"got no {header}, expected Python's headers, which torch.compile needs (Debian and Ubuntu: python3-dev)"
    return ""


def _gpu() -> Iterator[Finding]:
    import torch

    if torch.version.hip is not None:
        yield Finding("GPU", "torch is built for ROCm; Infuse has CUDA kernels only and runs the plain formulas")
    elif not torch.cuda.is_available():
        built = (
            "torch is a CPU build" if torch.version.cuda is None else f"torch (CUDA {torch.version.cuda}) finds none"
        )
        yield Finding("GPU", built)
        yield Finding("a GPU would add", _what_a_gpu_adds())
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield Finding(f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")


def _what_a_gpu_adds() -> str:
    return (
        "Infuse's CUDA kernels (compute capability 8.0 or newer); "
        "without one the same sites are rewritten and run as plain formulas, at stock speed"
    )


def _kernels() -> Iterator[Finding]:
    import torch

    from infuse import build

    try:
        nvcc = build.find_nvcc()
        yield Finding(
            "nvcc", f"{nvcc} {build.nvcc_version(nvcc)}" if nvcc else "not found; needed only to compile the kernels"
        )
    except build.BuildError as error:
        yield Finding("nvcc", str(error), broken=True)
        nvcc = None
    yield Finding(
        "kernel cache", f"{build.cache_directory()} ({'there' if build.cache_directory().is_dir() else 'empty'})"
    )
    status = build.load(build_missing=False)
    if status.loaded:
        yield Finding(
            "kernels", f"{status.path} ({', '.join(status.archs)}){'; ' if status.reason else ''}{status.reason}"
        )
        return
    buildable = "they can be compiled here: `infuse build`" if nvcc else "they can't be compiled here: no nvcc"
    # Only a machine that could use them is hurt; they are compiled at their first use if nvcc is there.
    yield Finding("kernels", f"{status.reason}; {buildable}", broken=torch.cuda.is_available() and not nvcc)


def _rewriting() -> Iterator[Finding]:
    import torch
    from torch.nn import functional as F

    from infuse.inspection import explain

    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x + x, (8,), weight, 1e-6)

    report = explain(block, torch.ones(4, 8), torch.ones(8), options=dict(DEFAULTS))
    ok = sum(report.rewritten.values()) == 1
    yield Finding(
        "rewriting", "a norm was found and rewritten" if ok else f"got {report.summary()}, expected one norm", not ok
    )
