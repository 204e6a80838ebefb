"""infuse.build: identity, architectures, the build and its failures, library files that must not be loaded, loading.

Most builds here use a stand-in for nvcc, a shell script that makes a tiny library in no time; the tests of the real
library share one real build for sm_90a.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infuse import build

C_COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_c_compiler = pytest.mark.skipif(C_COMPILER is None, reason="the stand-in for nvcc needs a C compiler")

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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no settings in the environment, and a module that has not loaded or reported anything."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(folder))
    for variable in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(build, "_packaged_library", lambda: tmp_path / "no such package" / build.LIBRARY_NAME)
    monkeypatch.setattr(build, "_reported", set())
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_failures", {})
    return folder


@pytest.fixture
def nvcc(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvcc:
    if C_COMPILER is None:
        pytest.skip("the stand-in for nvcc needs a C compiler")
    fake = FakeNvcc(tmp_path / "fake nvcc")
    monkeypatch.setenv("CUDACXX", str(fake.path))
    return fake


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the trial load in a new process, which imports torch: seconds."""
    monkeypatch.setattr(build, "_check_loads", lambda library, identifier: None)


@pytest.fixture
def no_nvcc(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "USUAL_NVCC", tmp_path / "usual" / "nvcc")


def left_behind(folder: Path) -> list[str]:
    """Names of all files under a folder but the locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def only_warning(action: Callable[[], Any]) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    return result, str(caught[0].message)


# ---- architectures ----


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


# ---- identity ----


def copy_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = folder / "csrc"
    shutil.copytree(build.source_root(), copy)
    monkeypatch.setattr(build, "source_root", lambda: copy)
    return copy


def test_ids_follow_the_sources(nvcc: FakeNvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.source_id(), build.build_id()
    sources = copy_sources(tmp_path, monkeypatch)
    assert (build.source_id(), build.build_id()) == before  # wherever they lie
    (sources / "notes.txt").write_text("no source")
    assert build.source_id() == before[0]
    (sources / "include" / "infuse" / "new.cuh").write_text("// a header")
    assert build.source_id() != before[0]
    assert build.build_id() != before[1]


def test_build_id_follows_architectures_and_compiler(nvcc: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {build.build_id(["8.0"]), build.build_id(["9.0a"])}
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "14.0.0")
    ids.add(build.build_id(["9.0a"]))
    assert len(ids) == 3
    assert {identifier[:8] for identifier in ids} == {build.source_id()[:8]}


# ---- build ----


def test_build_makes_one_library_and_then_reuses_it(nvcc: FakeNvcc, cache: Path) -> None:
    path = build.build(["9.0a", "8.0"], jobs=2)
    assert path == cache / build.build_id(["9.0a", "8.0"]) / build.LIBRARY_NAME
    assert left_behind(cache) == ["build.log", build.LIBRARY_NAME]
    compiled = [call for call in nvcc.calls() if " -c " in call]
    assert len(compiled) == sum(source.suffix in (".cu", ".cpp") for source in build.source_files())
    for call in compiled:
        assert "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=sm_80" in call
    calls = len(nvcc.calls())
    assert build.build(["9.0a", "8.0"]) == path
    assert len(nvcc.calls()) == calls
    assert build.find_library() == path


def test_build_goes_where_it_is_told(nvcc: FakeNvcc, tmp_path: Path, quick_check: None) -> None:
    assert build.build(["9.0a"], directory=tmp_path / "here") == tmp_path / "here" / build.LIBRARY_NAME


@pytest.mark.parametrize(("setting", "expected"), [("3", "-j 3"), ("", f"-j {os.cpu_count()}")])
def test_max_jobs_reaches_ninja(
    setting: str, expected: str, nvcc: FakeNvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", setting)
    fake_ninja = tmp_path / "ninja"
    fake_ninja.write_text('#!/bin/sh\necho "FAILED: $*"\nexit 1\n')
    fake_ninja.chmod(0o755)
    monkeypatch.setattr(build, "_find_ninja", lambda: fake_ninja)
    with pytest.raises(build.BuildError, match=re.escape(expected) + r"\b"):
        build.build(["9.0a"])


@pytest.mark.parametrize("setting", ["0", "-1", "many"])
def test_malformed_max_jobs_is_refused(setting: str, nvcc: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", setting)
    with pytest.raises(ValueError, match="MAX_JOBS: got '.*', expected a positive integer"):
        build.build(["9.0a"])


def test_missing_nvcc_says_where_it_was_looked_for(no_nvcc: None, cache: Path) -> None:
    assert build.find_nvcc() is None
    with pytest.raises(build.CompilerNotFoundError, match=r"CUDACXX.*CUDA_HOME.*PATH.*install the CUDA toolkit"):
        build.build(["9.0a"])
    assert not cache.exists()


def test_nvcc_is_found_through_cuda_home(no_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvcc(tmp_path / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == fake.path


@pytest.mark.parametrize(
    "behaviour",
    [
        'echo "kernel.cu(7): error: identifier is undefined"; exit 2',
        'echo object > "$output"; echo "kernel.cu(7): error: identifier is undefined"; exit 2',
    ],
    ids=["nothing written", "half written"],
)
def test_compile_error_is_shown_and_leaves_nothing(behaviour: str, nvcc: FakeNvcc, cache: Path) -> None:
    nvcc.behave(behaviour)
    with pytest.raises(build.BuildError, match=r"kernel\.cu\(7\): error: identifier is undefined") as caught:
        build.build(["9.0a"])
    assert str(nvcc.path) in str(caught.value)  # the command
    assert left_behind(cache) == []
    nvcc.behave("")
    assert build.build(["9.0a"]).is_file()


def test_error_in_a_source_is_shown(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.find_nvcc() is None:
        pytest.skip("needs nvcc")
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "planted.cu").write_text("__global__ void kernel() { undeclared(); }\n")
    monkeypatch.setattr(build, "source_root", lambda: sources)
    with pytest.raises(build.BuildError, match=r'planted\.cu\(1\): error: identifier "undeclared" is undefined'):
        build.build(["9.0a"])
    assert left_behind(cache) == []


@pytest.mark.parametrize("code", ["C7508", "C7510"])
def test_ptxas_warnings_of_slow_kernels_fail_the_build(code: str, nvcc: FakeNvcc, cache: Path) -> None:
    nvcc.behave(f'echo "ptxas info : ({code}) Potential Performance Loss: something was ignored"')
    with pytest.raises(build.BuildError, match=f"ptxas warned {code}"):
        build.build(["9.0a"])
    assert left_behind(cache) == []


def test_a_library_that_does_not_load_is_not_kept(nvcc: FakeNvcc, cache: Path) -> None:
    (nvcc.folder / "library.c").write_text(FAKE_LIBRARY + "void absent(void);\nvoid call(void) { absent(); }\n")
    wrapper = nvcc.path.read_text().replace("-shared", "-shared -Wl,-z,now")  # resolve `absent` at once
    nvcc.path.write_text(wrapper)
    with pytest.raises(build.BuildError, match=r"does not load(.|\n)*undefined symbol: absent"):
        build.build(["9.0a"])
    assert left_behind(cache) == []


def test_a_library_that_gives_another_id_is_not_kept(nvcc: FakeNvcc, cache: Path) -> None:
    source = FAKE_LIBRARY.replace("{ return INFUSE_BUILD_ID; }", '{ return "another"; }')
    (nvcc.folder / "library.c").write_text(source)
    with pytest.raises(build.BuildError, match="build id: got 'another', expected "):
        build.build(["9.0a"])
    assert left_behind(cache) == []


BUILD_IN_A_PROCESS = """
import sys
from infuse import build
print(build.build(["9.0a"], jobs=2))
"""


def start_build() -> subprocess.Popen[str]:
    """A process that a SIGINT interrupts, even where the shell started this one in the background and ignoring it."""
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"]
    command[-1] += BUILD_IN_A_PROCESS
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_that_build_at_once_make_one_library(nvcc: FakeNvcc, cache: Path) -> None:
    nvcc.behave("sleep 0.3")
    processes = [start_build(), start_build()]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    expected = cache / build.build_id(["9.0a"]) / build.LIBRARY_NAME
    assert [Path(output.strip()) for output, _ in answers] == [expected, expected]
    assert build.find_library() == expected
    assert len([call for call in nvcc.calls() if " -shared " in call]) == 1


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_interrupted_build_leaves_nothing_and_no_compiler_running(nvcc: FakeNvcc, cache: Path) -> None:
    pids = nvcc.folder / "pids"
    nvcc.behave(f'echo $$ >> "{pids}"; exec sleep 600')
    process = start_build()
    deadline = time.monotonic() + 60
    while not pids.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert left_behind(cache) == []
    deadline = time.monotonic() + 10
    while running := [pid for pid in map(int, pids.read_text().split()) if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.05)


def test_leftovers_of_a_killed_build_are_removed(nvcc: FakeNvcc, cache: Path, quick_check: None) -> None:
    leftover = cache / build.build_id(["9.0a"]) / ".build-killed"
    leftover.mkdir(parents=True)
    (leftover / "kernel.o").write_text("half")
    build.build(["9.0a"])
    assert not leftover.exists()


# ---- library files ----


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def replace_by_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def replace_by_foreign(path: Path) -> None:
    path.write_bytes(b"\x7fELF another project's library")
    build._seal(path)


def replace_by_other_architectures(path: Path) -> None:
    shutil.copy(build.build(["8.0"]), path)


DAMAGE = {
    truncate: "truncated or altered",
    alter: "truncated or altered",
    replace_by_text: "expected an ELF shared library",
    replace_by_foreign: "without infuse_build_id",
    replace_by_other_architectures: "got build .*, expected build ",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=[function.__name__ for function in DAMAGE])
def test_unusable_library_is_reported_once_and_replaced(
    damage: Callable[[Path], None], message: str, nvcc: FakeNvcc, cache: Path, quick_check: None
) -> None:
    path = build.build(["9.0a"])
    damage(path)
    for other in cache.iterdir():
        if other != path.parent:
            shutil.rmtree(other)
    found, warning = only_warning(build.find_library)
    assert found is None
    assert re.search(rf"{re.escape(str(path))}.*got .*expected", warning) and re.search(message, warning)
    assert not path.exists()
    assert "\n" not in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.find_library() is None
        assert build.build(["9.0a"]) == path
        assert build.find_library() == path


def test_build_replaces_an_unusable_library(nvcc: FakeNvcc, cache: Path, quick_check: None) -> None:
    path = build.build(["9.0a"])
    truncate(path)
    rebuilt, warning = only_warning(lambda: build.build(["9.0a"]))
    assert rebuilt == path and "truncated" in warning
    assert build.find_library() == path


def test_libraries_of_other_sources_are_left_alone(
    nvcc: FakeNvcc, cache: Path, quick_check: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build.build(["9.0a"])
    (copy_sources(tmp_path, monkeypatch) / "new.h").write_text("// newer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.find_library() is None
    assert old.is_file()


def test_library_is_found_when_nvcc_is_gone(
    nvcc: FakeNvcc, cache: Path, quick_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build(["9.0a"])
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.find_library() == path


def test_packaged_library_is_preferred_and_must_match_the_sources(
    nvcc: FakeNvcc, cache: Path, quick_check: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = build.build(["9.0a"], directory=tmp_path / "_lib")
    cached = build.build(["9.0a"])
    monkeypatch.setattr(build, "_packaged_library", lambda: packaged)
    assert build.find_library() == packaged
    cached.unlink()
    (copy_sources(tmp_path, monkeypatch) / "new.h").write_text("// newer")
    found, warning = only_warning(build.find_library)
    assert found is None
    assert re.search(r"_lib.*got one of sources \w+, expected sources \w+", warning)
    assert packaged.is_file()


# ---- load ----


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


# ---- command line ----


def test_command_says_what_it_did(
    nvcc: FakeNvcc, tmp_path: Path, quick_check: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--arch", "8.0;9.0a", "--arch", "8.6", "--jobs", "2", "--output", str(tmp_path / "out"), "--verbose"]
    assert build.main(arguments) == 0
    output = capsys.readouterr().out
    assert "compiling for sm_80, sm_90a, sm_86" in output
    assert re.search(rf"{re.escape(str(tmp_path / 'out' / build.LIBRARY_NAME))} \(.* MiB, .* s\)", output)
    assert str(nvcc.path) in output


def test_command_fails_in_words(no_nvcc: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--arch", "9.0a"]) == 1
    assert "infuse build: no nvcc" in capsys.readouterr().err
    assert build.main(["--arch", "nine"]) == 1
    assert "'nine'" in capsys.readouterr().err


# ---- the real library ----


@pytest.fixture(scope="session")
def real_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for sm_90a, compiled once for all workers of a test run."""
    if build.find_nvcc() is None:
        pytest.skip("needs nvcc")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return build.build(["9.0a"], directory=shared / "kernels")


REPORT = """
import ctypes, json, sys
import torch
if sys.argv[2] == "schema":
    library = torch.library.Library("infuse", "DEF")
    library.define("rms_norm_out(Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_before_weight,"
                   " bool eps_as_minimum, int config, Tensor(a!) out, Tensor(b!)? rstd=None) -> ()")
else:
    import infuse.ops.rms_norm
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
def text(name, *arguments):
    function = library[name]
    function.restype = ctypes.c_char_p
    answer = function(*arguments)
    return None if answer is None else answer.decode()
count = library.infuse_norm_num_configs()
print(json.dumps({
    "cuda": torch._C._dispatch_has_kernel_for_dispatch_key("infuse::rms_norm_out", "CUDA"),
    "id": text("infuse_build_id"),
    "archs": text("infuse_archs"),
    "version": text("infuse_cuda_version"),
    "configs": [text("infuse_norm_config_name", config) for config in range(-1, count + 1)],
}))
"""


@pytest.mark.parametrize("schema", ["schema", "infuse.ops"])
def test_real_library_loads_in_this_torch(schema: str, real_library: Path) -> None:
    answer = subprocess.run([sys.executable, "-c", REPORT, str(real_library), schema], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["cuda"] is True
    assert report["id"] == build.build_id(["9.0a"])
    assert report["archs"] == "sm_90a"
    found = build.find_nvcc()
    assert found is not None and report["version"] == build.nvcc_version(found)
    names = report["configs"]
    assert names[0] is None and names[-1] is None
    assert len(set(names[1:-1])) == len(names) - 2 >= 6 and all(names[1:-1])


def test_real_library_exports_nothing_of_the_cuda_runtime(real_library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    listed = subprocess.run([nm, "-D", "--defined-only", real_library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "infuse_build_id" in names
    assert not [name for name in names if name.startswith(("cuda", "cu", "__cuda"))]


def test_kernels_do_not_spill(real_library: Path) -> None:
    log = (real_library.parent / "build.log").read_text()
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) > 50
    assert set(frames) == {("0", "0", "0")}


def find_cuobjdump() -> str | None:
    """In CUDA's folder, on the PATH, or in triton, which brings one."""
    nvcc = build.find_nvcc()
    folders = [nvcc.parent] if nvcc else []
    folders.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def test_machine_code_has_wide_loads_and_no_local_memory(real_library: Path) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])}
    command = [cuobjdump, "--dump-sass", str(real_library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    kernels = re.split(r"Function : ", listing)[1:]
    assert len(kernels) > 50
    for kernel in kernels:
        name = kernel.split(None, 1)[0]
        assert not re.search(r"\b(LDL|STL)\b", kernel), f"{name} uses local memory"
        if "register_kernel" in name:
            assert "LDG.E" in kernel and re.search(r"LDG\.E\.(NA\.)?128", kernel), f"{name} has no 16-byte loads"


def test_module_is_loaded_by_its_path_without_infuse() -> None:
    """As setup.py does, in an environment where infuse is not installed."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('infuse_build', {build.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules[spec.name] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'infuse', 'torch'} & set(sys.modules)\n"
        "print(module.source_id())\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == build.source_id(), answer.stderr


def test_build_is_a_module_not_hidden_by_a_name() -> None:
    import infuse

    assert isinstance(infuse.build, types.ModuleType)
