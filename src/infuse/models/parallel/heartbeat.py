"""Who of a job's processes is alive, told from the counts that each writes into the job's store.

A peer that compiles for minutes is not lost, one whose machine has gone is; waiting for a collective tells neither.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_FAILED = "failed"
_INTERVALS_OF_SILENCE = 3  # beats a peer may miss once a connection to somebody has broken


class PeerLostError(RuntimeError):
    """Another process of the job has died, failed or fallen silent; the message names it and says what it held."""


class Heartbeat:
    """A thread that writes this rank's beat and watches the others'.

    A rank that is silent for timeout_s is lost, as is one that has reported why it fails. This process then has a
    moment to end by an error of its own; if it is stuck in a collective, the thread prints what was lost and ends it.
    store: a connection of its own, since another's waiting call would block it. Raises ValueError for a timeout_s that
    is not above 0.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise ValueError(f"process_group: got timeout_s={timeout_s}, expected more than 0")
        self.timeout_s = timeout_s
        self.interval_s = min(1.0, timeout_s / 10)
        self.lost: str | None = None
        self._store, self._rank = store, rank
        self._others = [other for other in range(world_size) if other != rank]
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="infuse-heartbeat", daemon=True)
        store.set_timeout(timedelta(seconds=timeout_s))

    def meet(self, name: str) -> None:
        """Waits for every rank, then starts. name: what this process is. Raises PeerLostError for absent ranks."""
        self.rename(name)
        self._store.set(f"beat/{self._rank}", "0")
        keys = [f"beat/{other}" for other in self._others]
        end = time.monotonic() + self.timeout_s
        # Asked again and again: beside one waiting call a busy machine's store has left another's request unanswered.
        while keys and not self._store.check(keys):
            is_late = time.monotonic() > end
            absent = [str(rank) for rank in self._others if is_late and not self._store.check([f"beat/{rank}"])]
            if absent:
                got = f"rank {self._rank} waited {self.timeout_s:g} s for rank {', '.join(absent)}"
                raise PeerLostError(f"process_group: {got}, expected every rank to start")
            time.sleep(self.interval_s / 10)
        now = time.monotonic()
        self._seen = dict.fromkeys(self._others, (b"0", now))
        self._thread.start()

    def rename(self, name: str) -> None:
        """Says what this process is now, for the others' messages."""
        self._store.set(f"name/{self._rank}", name)

    def report(self, cause: str) -> str:
        """Tells the other ranks why this one ends; returns the first such report of the job."""
        try:
            return str(self._store.compare_set(_FAILED, "", cause), "utf-8")
        except (dist.DistError, RuntimeError):
            return cause  # who holds the store is gone; the others see that by themselves

    def find_lost(self) -> str | None:
        """What was lost, once a connection has broken: waits until a rank reports or has missed a few beats."""
        patience_s = min(self.timeout_s, (_INTERVALS_OF_SILENCE + 3) * self.interval_s)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            lost = self.lost or self._silent(_INTERVALS_OF_SILENCE * self.interval_s)
            if lost:
                return lost
            time.sleep(self.interval_s / 4)
        return self._ended()

    def stop(self) -> None:
        """Ends the thread; the others are told that this rank is not lost."""
        self._stop.set()
        self._thread.join(self.timeout_s)
        try:
            self._store.set(f"beat/{self._rank}", "done")
        except (dist.DistError, RuntimeError):
            return  # nobody is left to be told

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self.interval_s):
            count += 1
            try:
                lost = self._beat(count)
            except (dist.DistError, RuntimeError) as error:
                lost = f"lost the process that holds the job's store, rank 0 or torchrun's agent: {error}"
            if lost:
                self.lost = lost
                self._end_unless_stopped(lost)
                return

    def _beat(self, count: int) -> str | None:
        self._store.set(f"beat/{self._rank}", str(count))
        now = time.monotonic()
        for other in self._others:
            beat = self._store.get(f"beat/{other}")
            if beat != self._seen[other][0]:
                self._seen[other] = (beat, now)
        if self._store.check([_FAILED]):
            return str(self._store.get(_FAILED), "utf-8")
        return self._silent(self.timeout_s)

    def _silent(self, limit_s: float) -> str | None:
        now = time.monotonic()
        for other, (beat, seen) in self._seen.items():
            if beat != b"done" and now - seen > limit_s:
                died = "it was killed, or its machine can't be reached"
                return f"lost rank {other} ({self._name(other)}), silent for {now - seen:.1f} s: {died}"
        return None

    def _ended(self) -> str | None:
        for other, (beat, _) in self._seen.items():
            if beat == b"done":
                return f"rank {other} ({self._name(other)}) had ended already, expected it to take part to the end"
        return None

    def _name(self, rank: int) -> str:
        try:
            return str(self._store.get(f"name/{rank}"), "utf-8")
        except (dist.DistError, RuntimeError):
            return "name unknown"

    def _end_unless_stopped(self, lost: str) -> None:
        """NCCL's and gloo's calls can't be interrupted: who is inside one leaves with the process only."""
        cause = self.report(lost)
        if not self._stop.wait(2 * self.interval_s):
            print(f"infuse: rank {self._rank} ends: {cause}", file=sys.stderr, flush=True)
            os._exit(1)
