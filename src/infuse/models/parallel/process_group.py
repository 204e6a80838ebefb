"""The processes that torchrun has started: joined, watched, and ended together when one of them is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from infuse.models.parallel.heartbeat import Heartbeat, PeerLostError

Result = TypeVar("Result")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = itertools.count()  # of the groups that this process has joined: each has keys of its own in the store
# NCCL's groups warn that a send waits for the collectives before it, which is the order that a pipeline's steps have.
_WARNING_OF_ORDER = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
_OF_CONNECTIONS = ("gloo", "nccl", "connection")  # words in the RuntimeErrors of collectives whose peer has gone


@dataclass(frozen=True, slots=True)
class Peers:
    """This process among those of the job. device: the one that its tensors belong on."""

    rank: int
    world_size: int
    device: torch.device
    heartbeat: Heartbeat

    def describe(self, part: str) -> None:
        """part: what this process holds, such as "layers 0-15"; the others name it if they lose it."""
        self.heartbeat.rename(_name(part))

    def agree(self, action: Callable[[], Result]) -> Result:
        """Runs an action that talks to nobody, on every rank, and returns its result.

        When it raises on any rank it raises on all, so that none waits for one that has given up: on the rank itself
        what it raised, on the others ValueError with its rank and words.
        """
        mine: Exception | None = None
        try:
            result = action()
        except Exception as error:
            mine = error
        said: list[str | None] = [None] * self.world_size
        dist.all_gather_object(said, None if mine is None else f"{type(mine).__name__}: {mine}")
        if mine is not None:
            raise mine
        for rank, text in enumerate(said):
            if text is not None:
                raise ValueError(f"rank {rank}: {text}")
        return result


@contextlib.contextmanager
def process_group(
    device: torch.device | str | None = None, *, timeout_s: float = 60.0, collective_timeout_s: float = 1800.0
) -> Iterator[Peers]:
    """Joins the job that torchrun's environment describes; as a context, leaves it when all have come to the end.

    device: "cpu" (gloo), "cuda" (NCCL, the GPU of this process's place on its machine), None for a GPU if there is one.
    timeout_s: how long the others may take to start, and a peer may be silent until it is lost (see `Heartbeat`; twice
    as long when the machine that holds the store is gone). collective_timeout_s: how long a collective waits for a peer
    that is alive, such as one that compiles.
    Raises ValueError outside torchrun or without a GPU for "cuda"; PeerLostError naming what was lost, instead of the
    error of a collective, when a peer has died or failed. A process that is stuck then prints that and ends.
    """
    rank, world_size, own = _place(device)
    limit = timedelta(seconds=timeout_s)
    job, _, _ = next(rendezvous("env://", timeout=limit))
    store = PrefixStore(f"infuse/{next(_NUMBERS)}", job)
    beats: Any = PrefixStore("peers", store)
    heartbeat = Heartbeat(beats.clone(), rank, world_size, timeout_s)
    heartbeat.meet(_name(f"rank {rank} of {world_size}"))
    os.environ.setdefault(_WARNING_OF_ORDER, "false")
    try:
        dist.init_process_group(
            "nccl" if own.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_timeout_s),
            device_id=own if own.type == "cuda" else None,
        )
        yield Peers(rank, world_size, own, heartbeat)
        _wait_for_all(store, rank, world_size, heartbeat)
        dist.destroy_process_group()
    except BaseException as error:
        _fail(error, rank, heartbeat)
        raise
    finally:
        heartbeat.stop()


def _place(device: torch.device | str | None) -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device of this process."""
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        remedy = "torchrun --nproc-per-node N sets it"
        raise ValueError(f"process_group: got no {', '.join(missing)} in the environment, expected them; {remedy}")
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"process_group: got device {device!r}, expected cpu or cuda")
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if kind == "cpu":
        return rank, world_size, torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        got = f"got place {local_rank} on a machine with {torch.cuda.device_count()} GPUs"
        raise ValueError(f"process_group: {got}, expected a GPU for each process; --nproc-per-node is how many start")
    torch.cuda.set_device(local_rank)
    return rank, world_size, torch.device("cuda", local_rank)


def _name(part: str) -> str:
    return f"{part}, process {os.getpid()} on {socket.gethostname()}"


def _fail(error: BaseException, rank: int, heartbeat: Heartbeat) -> None:
    """Tells the others; raises PeerLostError when the error only says that a peer has gone."""
    text = f"{type(error).__name__}: {error}"
    of_connection = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_CONNECTIONS)
    )
    lost = heartbeat.find_lost() if of_connection and not isinstance(error, PeerLostError) else None
    cause = heartbeat.report(lost or f"rank {rank} failed: {text}")
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()  # closes connections, which wakes those that wait for this rank
    if lost is not None:
        raise PeerLostError(f"rank {rank} ends: {cause}") from error


def _wait_for_all(store: Store, rank: int, world_size: int, heartbeat: Heartbeat) -> None:
    """Nobody closes connections, or the store that it holds, while another still uses them."""
    store.set(f"end/{rank}", "1")
    keys = [f"end/{other}" for other in range(world_size)]
    while heartbeat.lost is None:
        try:
            store.wait(keys, timedelta(seconds=heartbeat.interval_s))
        except dist.DistStoreError:
            continue  # not all are there yet
        except RuntimeError:
            return  # rank 0 held the store, saw all others at the end and has gone
        return
    raise PeerLostError(f"rank {rank} ends: {heartbeat.lost}")
