"""Loading: once in a process, and built first where a GPU needs it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from infuse import build
from tests.build.fake_nvcc import FakeNvcc


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that torch is asked to load, instead of loading them."""
    paths: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    return paths


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch claim GPUs of these compute capabilities."""

    def claim(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return claim


Gpus = Callable[..., None]


def test_load_without_cuda_neither_loads_nor_builds(
    nvcc: FakeNvcc, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    status = build.load(build_missing=True)
    assert not status.loaded and status.path is None and status.archs == ()
    assert "torch has no CUDA" in status.reason
    assert not loads and not nvcc.calls()
    assert not build.covers((9, 0))


def test_load_without_a_gpu_does_not_build(nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus) -> None:
    with_gpus()
    assert "torch sees no CUDA device" in build.load(build_missing=True).reason
    assert not nvcc.calls()


def test_load_builds_for_the_present_gpus_only(
    nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, quick_check: None
) -> None:
    with_gpus((9, 0), (8, 6), (9, 0))
    assert "is not built" in build.load(build_missing=False).reason
    assert not nvcc.calls()
    status = build.load(build_missing=True)
    assert status.loaded and status.reason == "" and status.archs == ("sm_86", "sm_90a")
    assert loads == [str(status.path)]
    assert build.covers((8, 9)) and build.covers((9, 0)) and not build.covers((8, 0))
    assert build.load(build_missing=False) is status


def test_load_builds_what_the_arch_list_says(
    nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, quick_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus((8, 6))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    assert build.load(build_missing=True).archs == ("sm_80", "sm_90a")


def test_load_says_when_the_arch_list_leaves_out_the_gpu(
    nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus((8, 6))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert "GPU sm_86 is not covered by sm_90a" in build.load(build_missing=True).reason
    assert not nvcc.calls()


def test_load_prefers_the_library_that_fits_the_gpu(
    nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, quick_check: None
) -> None:
    fitting = build.build(["8.0"])
    newer = build.build(["9.0a"])
    os.utime(newer, (time.time() + 60, time.time() + 60))
    with_gpus((8, 0))
    assert build.load(build_missing=True).path == fitting


def test_load_says_when_a_gpu_is_too_old(nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus) -> None:
    with_gpus((7, 5))
    status = build.load(build_missing=True)
    assert "GPU sm_75 is not covered by sm_80, sm_86, sm_90a, compute_80" in status.reason
    assert not status.loaded and not nvcc.calls()


def test_load_keeps_a_library_for_the_gpus_it_serves(
    nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, quick_check: None
) -> None:
    with_gpus((7, 5), (9, 0))
    status = build.load(build_missing=True)
    assert status.loaded and status.archs == ("sm_90a",)
    assert "GPU sm_75 is not covered by sm_90a" in status.reason
    assert build.covers((9, 0)) and not build.covers((7, 5))


def test_load_without_nvcc_gives_the_reason(no_nvcc: None, loads: list[str], with_gpus: Gpus) -> None:
    with_gpus((9, 0))
    assert "no nvcc: looked in" in build.load(build_missing=True).reason


def test_failed_build_is_tried_and_logged_once(
    nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, caplog: pytest.LogCaptureFixture
) -> None:
    with_gpus((9, 0))
    nvcc.behave('echo "error: planted"; exit 1')
    status = build.load(build_missing=True)
    calls = len(nvcc.calls())
    assert "error: planted" in status.reason
    assert build.load(build_missing=True) is status
    assert len(nvcc.calls()) == calls
    assert len([record for record in caplog.records if "planted" in record.getMessage()]) == 1


def test_threads_load_the_library_once(nvcc: FakeNvcc, loads: list[str], with_gpus: Gpus, quick_check: None) -> None:
    with_gpus((9, 0))
    nvcc.behave("sleep 0.1")
    statuses: list[build.Status] = []
    threads = [threading.Thread(target=lambda: statuses.append(build.load(build_missing=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(statuses) == 4 and len(set(statuses)) == 1
