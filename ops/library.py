"""The compiled kernels as the operators see them: present for a device, or missing with a reason."""

from __future__ import annotations

import ctypes
import functools

import torch

from infuse import build


@functools.cache
def _missing(device_index: int) -> str:
    status = build.load(build_missing=True)
    if not status.loaded:
        return status.reason
    capability = torch.cuda.get_device_capability(device_index)
    if not build.covers(capability):
        return f"the kernel library covers {', '.join(status.archs)}, this GPU is sm_{capability[0]}{capability[1]}"
    return ""


def missing(device: torch.device) -> str:
    """Why there are no compiled kernels for a device, "" when there are.

    The first question about a CUDA device loads the library, and builds it if nvcc is there; an import does neither.
    """
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _missing(torch.cuda.current_device() if device.index is None else device.index)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, (0, 0) of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def configurations(op: str) -> tuple[str, ...]:
    """Names of a kernel's configurations, in the order of their numbers; () without a library."""
    status = build.load(build_missing=False)
    if not status.loaded:
        return ()
    library = ctypes.CDLL(str(status.path))
    name = getattr(library, f"infuse_{op}_config_name")
    name.restype = ctypes.c_char_p
    count: int = getattr(library, f"infuse_{op}_num_configs")()
    return tuple(name(index).decode() for index in range(count))
