"""What the benchmarks run on: the device and its two ceilings, measured in the same run as the cases."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rows import slug

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Device:
    """The machine as the rows and the printed header name it. Sizes in bytes."""

    type: str  # "cuda" | "cpu"
    name: str  # as in Row.gpu
    units: int  # streaming multiprocessors, or threads
    cache_bytes: int  # the last level's
    memory_bytes: int
    driver: str
    torch_version: str
    python: str
    commit: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.type)

    def synchronize(self) -> None:
        if self.type == "cuda":
            torch.cuda.synchronize()

    def describe(self) -> str:
        units = "SMs" if self.type == "cuda" else "threads"
        cache, memory = self.cache_bytes / 2**20, self.memory_bytes / 2**30
        return (
            f"{self.name}: {self.units} {units}, {cache:.0f} MiB last-level cache, {memory:.0f} GiB memory, "
            f"driver {self.driver}; torch {self.torch_version}, Python {self.python}, commit {self.commit}"
        )


def describe_device(type_: str | None = None) -> Device:
    """The device to measure on: `type_`, or the GPU if there is one."""
    type_ = type_ or ("cuda" if torch.cuda.is_available() else "cpu")
    common = {"torch_version": str(torch.__version__), "python": platform.python_version(), "commit": commit()}
    if type_ == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Device(
            type="cuda",
            name=slug(properties.name),
            units=properties.multi_processor_count,
            cache_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            **common,
        )
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Device(
        type="cpu",
        name=slug(_cpu_name()) or "cpu",
        units=torch.get_num_threads(),
        cache_bytes=_cpu_cache_bytes(),
        memory_bytes=pages * page_size,
        driver=f"{platform.system()} {platform.release()}",
        **common,
    )


def commit() -> str:
    """The commit that is measured, with "-dirty" if the sources differ from it.

    INFUSE_COMMIT names it for a copy of a checkout, whose git knows nothing of it. Results and the README, which the
    benchmarks themselves write, don't make a tree dirty.
    """
    if named := os.environ.get("INFUSE_COMMIT", ""):
        return named
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    written = (":(exclude)benchmarks/results", ":(exclude)README.md")
    changed = _output("git", "status", "--porcelain", "--", ".", *written)
    return f"{head}-dirty" if changed else head


def _output(*command: str) -> str:
    """What a command prints, "" when it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    """The largest cache that core 0 sees; 32 MiB when the system doesn't tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = [int(text[:-1]) for text in (path.read_text().strip() for path in sizes) if text.endswith("K")]
    return max(kib, default=32 * 1024) * 1024


@dataclass(slots=True)
class Ceilings:
    """The device's limits: memory bandwidth in bytes/s, and a matmul rate in flop/s for each dtype asked for."""

    device: Device
    quick: bool = False
    bandwidth: float = 0.0
    times: dict[str, tuple[float, int, int]] = field(default_factory=dict)  # name -> (seconds, bytes, flops)
    _rates: dict[torch.dtype, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._measure_bandwidth()

    def rate(self, dtype: torch.dtype) -> float:
        """flop/s of a square matmul in `dtype` on random data, through the vendor's library."""
        if dtype not in self._rates:
            self._rates[dtype] = self._measure_rate(dtype)
        return self._rates[dtype]

    def again(self) -> None:
        """Measures all of them once more and keeps the higher values: on a shared machine the first may be low."""
        self._measure_bandwidth()
        for dtype, rate in self._rates.items():
            self._rates[dtype] = max(rate, self._measure_rate(dtype))

    def floor_ms(self, bytes_: int, flops: int, dtype: torch.dtype) -> float:
        """The time below which no implementation can be: all bytes moved once, or all operations at the matmul rate."""
        return 1e3 * max(bytes_ / self.bandwidth, flops / self.rate(dtype) if flops else 0.0)

    def describe(self) -> str:
        return f"{self.bandwidth / 1e12:.3f} TB/s" + "".join(
            f", {rate / 1e12:.2f} TFLOP/s {str(dtype).removeprefix('torch.')}" for dtype, rate in self._rates.items()
        )

    def _measure_bandwidth(self) -> None:
        """The better of a large copy (read + written) and a large sum (read only)."""
        size = 2**31 if self.device.type == "cuda" else 2**26 if self.quick else 2**28
        source = torch.randn(size // 4, device=self.device.torch_device)
        target = torch.empty_like(source)
        self._note("ceiling copy", self._fastest(lambda: target.copy_(source)), 2 * size, 0)
        self._note("ceiling read", self._fastest(lambda: source.sum()), size, 0)
        self.bandwidth = max(bytes_ / seconds for seconds, bytes_, flops in self.times.values() if not flops)

    def _measure_rate(self, dtype: torch.dtype) -> float:
        sides = (4096, 8192) if self.device.type == "cuda" else (256,) if self.quick else (1024,)
        return max(self._matmul_rate(side, dtype) for side in sides)

    def _matmul_rate(self, side: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=self.device.torch_device).to(dtype) for _ in range(2))
        flops = 2 * side**3
        seconds = self._fastest(lambda: a @ b)
        name = f"ceiling matmul {side} {str(dtype).removeprefix('torch.')}"
        self._note(name, seconds, 3 * side * side * dtype.itemsize, flops)
        return flops / seconds

    def _note(self, name: str, seconds: float, bytes_: int, flops: int) -> None:
        if name not in self.times or seconds < self.times[name][0]:
            self.times[name] = seconds, bytes_, flops

    def _fastest(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest of several calls: a ceiling is what the device can do, not what it does at times."""
        repeats = 20 if self.device.type == "cuda" else 3 if self.quick else 10
        call()
        self.device.synchronize()
        seconds: list[float] = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                seconds.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begin)
        return min(seconds)
