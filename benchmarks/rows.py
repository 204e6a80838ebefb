"""Results as data: one `Row` per case and implementation, in `<results>/<gpu>/<benchmark>.jsonl`, append only.

A row that breaks a rule can be neither written nor read, so a file in the repository is as trustworthy as a fresh run.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# Ceilings and times are measured apart from each other, so a kernel at its floor may read a little above 100%.
ROOFLINE_PERCENT = 105.0
# In a note: the case's data fits in a cache, so the bandwidth of the memory is no limit to it.
CACHE_RESIDENT = "cache-resident"
_MEASURED_BESIDE = ("compile_s", "saved_bytes", "saved_gradient_bytes")
_MAY_BE_NONE = ("percent_of_limit", "max_error", "peak_bytes", *_MEASURED_BESIDE)
# Left out of a line where there is nothing to say; rows of earlier versions have only some of them.
_OPTIONAL = ("note", *_MEASURED_BESIDE)


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation of one case, measured in one run. None stands for "not measured here"."""

    run_id: str  # the same for everything measured in one run
    case: str
    impl: str
    median_ms: float  # of one call
    p20_ms: float
    p80_ms: float
    bytes: int  # the fewest that must move through memory for this case, whatever the implementation moves
    flops: int
    percent_of_limit: float | None  # floor time / median time, the floor from the run's own ceilings
    max_error: float | None  # largest deviation from the fp64 reference, over the reference's root mean square
    peak_bytes: int | None  # device memory that one call allocates on top of inputs and weights
    gpu: str  # in lower case with dashes; the processor's name when there is no GPU
    torch: str
    commit: str
    note: str = ""
    compile_s: float | None = None  # the first call, with Inductor's and Triton's caches empty
    # Device memory that a training forward leaves allocated for the backward: activations, and weights' gradients that
    # it has computed already, which are no activations. Inputs, weights and the loss are in neither.
    saved_bytes: int | None = None
    saved_gradient_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        for name in ("run_id", "case", "impl", "gpu", "torch", "commit"):
            if not getattr(self, name):
                raise ValueError(f"Row: {name}: got an empty string")
        if self.gpu != slug(self.gpu):
            raise ValueError(f"Row: gpu: got {self.gpu!r}, expected {slug(self.gpu)!r}")
        if not 0 < self.p20_ms <= self.median_ms <= self.p80_ms:
            got = f"{self.p20_ms}, {self.median_ms}, {self.p80_ms}"
            raise ValueError(f"Row: p20_ms, median_ms, p80_ms: got {got}, expected 0 < p20 <= median <= p80")
        sizes = ("bytes", "flops", "peak_bytes", "max_error", *_MEASURED_BESIDE)
        if any((getattr(self, name) or 0) < 0 for name in sizes):
            raise ValueError(f"Row: {', '.join(sizes)}: got a negative one in {self}")
        limit = self.percent_of_limit
        if limit is not None and (limit <= 0 or (limit > ROOFLINE_PERCENT and CACHE_RESIDENT not in self.note)):
            raise ValueError(
                f"Row: {self.case} {self.impl}: percent_of_limit: got {limit}, expected 0 to {ROOFLINE_PERCENT}, "
                f"or a note that says {CACHE_RESIDENT!r}"
            )

    def to_json(self) -> str:
        """The row as one line, without what is optional and not there."""
        values = {
            name: value for name, value in asdict(self).items() if value not in ("", None) or name not in _OPTIONAL
        }
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Raises ValueError for a field that is unknown, missing or out of its range."""
        values: dict[str, Any] = json.loads(line)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = [name for name in known if name not in values and name not in _OPTIONAL]
        if unknown or missing:
            raise ValueError(f"Row: unknown fields {unknown}, missing fields {missing}; known are {known}")
        return cls(**values)


def _check_type(name: str, annotation: str, value: object) -> None:
    """`annotation` is the field's as text: "str", "int", "float", with or without " | None"."""
    if value is None and name in _MAY_BE_NONE:
        return
    kind = annotation.split()[0]
    expected: tuple[type, ...] = {"str": (str,), "int": (int,), "float": (float, int)}[kind]
    if not isinstance(value, expected) or isinstance(value, bool):
        raise TypeError(f"Row: {name}: got {value!r}, expected {annotation}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Row: {name}: got {value}, expected a finite number")


def new_run_id() -> str:
    """The time in UTC and a random part, so that runs of one second on two machines differ."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def results_file(root: Path, gpu: str, benchmark: str) -> Path:
    return root / gpu / f"{benchmark}.jsonl"


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows at the end of a file and makes it if need be. What is there is never read or changed."""
    lines = [row.to_json() + "\n" for row in rows]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def load(path: Path) -> list[Row]:
    """All rows of a file, oldest first.

    Raises ValueError, with the line's number, when a line is no valid row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row.from_json(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return rows
