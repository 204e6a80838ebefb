"""Launches of every CUDA kernel on small tensors, for compute-sanitizer to watch (test_sanitizer.py).

`python -m tests.csrc.kernel_drivers FAMILY [--skip-memory-barriers]` runs one family. Only the kernels under test run
on the GPU: inputs are made on the CPU and results are left as they were allocated, so that initcheck knows every byte
that a kernel may read.

To add a family, or a new operator of one: a function under `@driver`, in a file of drivers/ that is imported here. It
takes the device and yields the launches, each a call without arguments (`partial(operator, ...)`). test_sanitizer.py
runs all of them; without a GPU it still checks that each launch fits its operator's schema. A driver should take every
configuration, the 16-byte path and the narrow one, odd sizes, no rows at all, views with padding, misaligned addresses
and each dtype, and stay below a thousand launches, which is a few seconds under the slowest tool.
"""

from __future__ import annotations

import sys

import torch

from infuse.ops import library
from tests.csrc.drivers import attention as _attention  # noqa: F401, enters its drivers, as the others do
from tests.csrc.drivers import cross_entropy as _cross_entropy  # noqa: F401
from tests.csrc.drivers import linears as _linears  # noqa: F401
from tests.csrc.drivers import norms as _norms  # noqa: F401
from tests.csrc.drivers import rotations as _rotations  # noqa: F401
from tests.csrc.drivers.launches import DRIVERS as DRIVERS
from tests.csrc.drivers.launches import run

if __name__ == "__main__":
    absent = library.missing(torch.device("cuda"))
    if absent:
        raise SystemExit(absent)
    count = run(sys.argv[1], torch.device("cuda"), "--skip-memory-barriers" in sys.argv)
    torch.cuda.synchronize()
    print(f"{count} launches")
