"""The build: one library whoever asks for it, nothing left behind by a failure, errors in the compiler's words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infuse import build
from infuse.build import sources, toolchain
from tests.build.fake_nvcc import FAKE_LIBRARY, FakeNvcc, left_behind


def test_build_makes_one_library_and_then_reuses_it(nvcc: FakeNvcc, cache: Path) -> None:
    path = build.build(["9.0a", "8.0"], jobs=2)
    assert path == cache / build.build_id(["9.0a", "8.0"]) / build.LIBRARY_NAME
    assert left_behind(cache) == ["build.log", build.LIBRARY_NAME]
    compiled = [call for call in nvcc.calls() if " -c " in call]
    assert len(compiled) == sum(source.suffix in (".cu", ".cpp") for source in build.source_files())
    for call in compiled:
        assert "-gencode=arch=compute_90a,code=[sm_90a] -gencode=arch=compute_80,code=[sm_80]" in call
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
    monkeypatch.setattr(toolchain, "find_ninja", lambda: fake_ninja)
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
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "planted.cu").write_text("__global__ void kernel() { undeclared(); }\n")
    monkeypatch.setattr(sources, "source_root", lambda: folder)
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
