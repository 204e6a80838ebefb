"""The library in this process: found, or built for the GPUs that are there, and loaded once."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import compilation, toolchain
from .arch_list import (
    ARCH_LIST_VARIABLE,
    DEFAULT_ARCHITECTURES,
    OLDEST_CAPABILITY,
    architecture_of,
    architectures,
    archs_cover,
)
from .library_file import best_library
from .toolchain import BuildError

logger = logging.getLogger("infuse")


@dataclass(frozen=True, slots=True)
class Status:
    """What `load` achieved in this process."""

    loaded: bool
    path: Path | None
    archs: tuple[str, ...]  # of the library, () when none is loaded
    reason: str  # why it is not loaded or does not serve this GPU; "" when all is well


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
            toolchain.require_nvcc()
            logger.warning("compiling the CUDA kernels for %s, once for this machine", ", ".join(archs))
            start = time.monotonic()
            path = compilation.build(archs)
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
        library = best_library(capabilities)
        if build_missing and not capabilities:
            reason = "torch sees no CUDA device"
        elif build_missing and (library is None or _uncovered(library.archs, capabilities)):
            reason = _build_for(capabilities)
            library = best_library(capabilities)
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
