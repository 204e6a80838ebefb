"""GPU architectures: which to compile for, and which GPUs their code runs on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

logger = logging.getLogger("infuse")

ARCH_LIST_VARIABLE = "TORCH_CUDA_ARCH_LIST"
DEFAULT_ARCHITECTURES = ("sm_80", "sm_86", "sm_90a", "compute_80")
OLDEST_CAPABILITY = (8, 0)


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


def front_ends(archs: Iterable[str]) -> dict[str, list[str]]:
    """What is compiled to PTX, and the architectures that are made of each: {"compute_80": ["sm_80", "sm_86"]}.

    Machine code of one generation comes from the PTX of its oldest member among `archs`: the sources tell none of them
    apart, so the code for sm_86 is the same to the byte as from PTX of its own, for two thirds of the time.
    """
    archs = tuple(archs)
    made_of: dict[str, list[str]] = {}
    for arch in archs:
        plain = re.fullmatch(r"(sm_\d+)\d", arch)  # sm_90a and PTX stand for themselves
        relatives = [other for other in archs if re.fullmatch(rf"{plain[1]}\d", other)] if plain else [arch]
        made_of.setdefault(min(relatives).replace("sm_", "compute_"), []).append(arch)
    return made_of


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
