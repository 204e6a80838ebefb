"""Inductor's and AOTAutograd's caches, kept from serving the code of another version of Infuse."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

from infuse import build

_PACKAGES = ("infuse", "infuse.build", "infuse.ops", "infuse.patterns", "infuse.lowering", "infuse.lowering.heuristics")


_sources: set[str] = set()  # what users registered


def add_source(text: str) -> None:
    """Makes a user's registration part of the build hash."""
    before = build_hash()
    _sources.add(text)
    tag_caches(before)


def build_hash() -> str:
    """Hash of everything that shapes generated code: the package's own sources, and what users registered."""
    if not _sources:
        return _package_hash()
    return hashlib.sha256("\0".join([_package_hash(), *sorted(_sources)]).encode()).hexdigest()[:16]


@functools.cache
def _package_hash() -> str:
    """Hash of the text of every module that shapes generated code, and of the kernels' sources.

    Neither cache looks into the body of a custom operator's backward, fake or lowering: without this hash in their keys
    an upgraded Infuse would be served the code, and the gradients, of the old one (seen on torch 2.11 and 2.13).
    """
    digest = hashlib.sha256(build.source_id().encode())
    for package in _PACKAGES:
        for file in sorted(resources.files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(f"{package}/{file.name}".encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def tag_caches(instead_of: str = "") -> None:
    """Puts the build hash into torch.compiler.config.cache_key_tag, which both caches include in their keys; once.

    instead_of: an earlier hash, whose place it takes.
    """
    import torch.compiler.config

    tag = f"infuse-{build_hash()}"
    current = torch.compiler.config.cache_key_tag
    if instead_of and f"infuse-{instead_of}" in current:
        current = torch.compiler.config.cache_key_tag = current.replace(f"infuse-{instead_of}", tag)
    if tag not in current:
        torch.compiler.config.cache_key_tag = f"{current};{tag}" if current else tag
