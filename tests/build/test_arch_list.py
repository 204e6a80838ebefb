"""Which architectures are compiled for, and which GPUs they serve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infuse import build
from infuse.build.arch_list import front_ends


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["8.0", "8.6", "9.0a+PTX"], ("sm_80", "sm_86", "sm_90a", "compute_90a")),
        (["8.0+PTX"], ("sm_80", "compute_80")),
        (["9.0"], ("sm_90a",)),
        (["9.0+PTX"], ("sm_90a", "compute_90")),
        (["10.0f", "12.0"], ("sm_100f", "sm_120")),
        (["7.5", "8.0", "8.0"], ("sm_80",)),
        (["sm_90a", "compute_80"], ("sm_90a", "compute_80")),
    ],
)
def test_architectures_are_parsed(entries: list[str], expected: tuple[str, ...]) -> None:
    assert build.parse_architectures(entries) == expected


@pytest.mark.parametrize("entry", ["9", "9.0b", "9.0a+ptx", "sm90", "Hopper", "8.0,9.0", "9.0a-PTX"])
def test_malformed_architecture_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(entry))):
        build.parse_architectures(["8.0", entry])


def test_only_old_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 7\.0 7\.5, expected at least one that is 8\.0 or newer"):
        build.parse_architectures(["7.0", "7.5"])


@pytest.mark.parametrize("setting", ["8.6;9.0a", "8.6 9.0a", " 8.6; 9.0a ;"])
def test_arch_list_variable_separates_by_spaces_or_semicolons(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    assert build.architectures() == ("sm_86", "sm_90a")


def test_default_architectures(cache: Path) -> None:
    assert build.architectures() == ("sm_80", "sm_86", "sm_90a", "compute_80")


@pytest.mark.parametrize(
    ("arch", "covered", "not_covered"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_80", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_architecture_covers(arch: str, covered: list[tuple[int, int]], not_covered: list[tuple[int, int]]) -> None:
    assert all(build.archs_cover([arch], capability) for capability in covered)
    assert not any(build.archs_cover([arch], capability) for capability in not_covered)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpus_own_architecture_covers_it(capability: tuple[int, int]) -> None:
    assert build.archs_cover([build.architecture_of(capability)], capability)


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        (build.DEFAULT_ARCHITECTURES, {"compute_80": ["sm_80", "sm_86", "compute_80"], "compute_90a": ["sm_90a"]}),
        (("sm_86", "compute_80"), {"compute_86": ["sm_86"], "compute_80": ["compute_80"]}),
        (("sm_89", "sm_86", "compute_89"), {"compute_86": ["sm_89", "sm_86"], "compute_89": ["compute_89"]}),
        (("sm_90", "sm_90a"), {"compute_90": ["sm_90"], "compute_90a": ["sm_90a"]}),
        (
            ("sm_100f", "sm_103", "sm_120"),
            {"compute_100f": ["sm_100f"], "compute_103": ["sm_103"], "compute_120": ["sm_120"]},
        ),
    ],
)
def test_one_generation_is_compiled_once(archs: tuple[str, ...], expected: dict[str, list[str]]) -> None:
    assert front_ends(archs) == expected
