"""Decode steps of one model over two GPUs, by tensor parallel and in a pipeline, and on one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from answers import bounds, check
from implementations import infuse_backend, optional
from model_shapes import Shape
from parallel_models import chunk_of, config_of, engine, exact_dtype, read_prompt, tokens_of
from parallel_timing import Measured, take_turns
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

BACKENDS = {"compile": "inductor", "infuse": "infuse"}
CALLS = 8  # steps of a sample


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """batch tokens a step behind a prompt of half the caches' length. cut: (shards, ways of tensor parallel)."""

    shape: Shape
    batch: int
    length: int
    cut: tuple[int, int]
    mode: str | None

    @property
    def name(self) -> str:
        shards, ways = self.cut
        how = f"tensor parallel {ways}" if ways > 1 else f"pipeline {shards}" if shards > 1 else "one device"
        return f"{self.shape.name} decode b{self.batch}, cache {self.length} half full, {how}"

    @property
    def impls(self) -> list[str]:
        return [prefix + (f"-{self.mode}" if self.mode else "") for prefix in BACKENDS]

    @property
    def is_alone(self) -> bool:
        """Whether one process measures it by itself."""
        return self.cut == (1, 1)

    @property
    def bytes(self) -> int:
        read = self.shape.matmul_weights() + 2 * self.shape.layers * self.shape.kv_dim * self.batch * self.length // 2
        return read * self.shape.dtype.itemsize

    @property
    def flops(self) -> int:
        return self.batch * (2 * self.shape.matmul_weights() + self.shape.attention_flops(self.length // 2))

    def measure(self, peers: Any, rounds: int) -> list[Measured]:
        """Every implementation's times. Raises WrongAnswer for a step that rounding does not explain."""
        config = config_of(self.shape, self.length)
        mesh = None
        if not self.is_alone:
            mesh = init_device_mesh(peers.device.type, self.cut, mesh_dim_names=("shard", "tensor"))
        prompt = prompt_of(self.shape, self.batch, self.length, peers.device)
        steps = {}
        for impl, backend in zip(self.impls, BACKENDS.values(), strict=True):
            chain = engine(config, self.cut, mesh, peers.device, self.length)
            read_prompt(chain, prompt[:, :-1], chunk_of(self.length))
            if backend == "infuse":
                infuse_backend()
            chain.models[0].model.compile(backend=backend, mode=self.mode, fullgraph=True, dynamic=False)
            steps[impl] = _Steps(chain, prompt[:, -1:])
        first = {impl: step().clone() for impl, step in steps.items()}
        check_first = lambda: self._errors(peers.device, first)  # noqa: E731
        if self.is_alone:
            errors = check_first()
        else:
            errors = peers.agree(check_first if peers.rank == 0 else dict)
        for step in steps.values():
            for _ in range(3):  # a CUDA graph is recorded at the second call
                step()
        stats = take_turns(steps, rounds, CALLS, None if self.is_alone else peers)
        last = {impl: step().clone() for impl, step in steps.items()}
        for impl in steps:
            allowed = bounds(first[impl], first[self.impls[0]], self.shape.dtype, 2.0)
            check(f"{impl}, the last step", last[impl], last[self.impls[0]], [max(2 * allowed[0], 0.1)])
        held = optional("infuse.models.cut_parameters").held
        size = sum(held(part).nbytes for part in chain.models[0].model.parameters())
        note = f"weights {size / 1e9:.2f} GB a device"
        return [Measured(self.name, impl, stats[impl], errors.get(impl), note) for impl in steps]

    def _errors(self, device: torch.device, first: dict[str, Tensor]) -> dict[str, float]:
        """Each first step against the same model in a wider dtype on this device, within what eager rounding sets."""
        exact, eager = _eager_steps(self.shape, self.batch, self.length, device)
        allowed = bounds(eager, exact, self.shape.dtype, 2.0)
        return {impl: check(impl, found, exact, allowed) for impl, found in first.items()}


@functools.cache
def _eager_steps(shape: Shape, batch: int, length: int, device: torch.device) -> list[Tensor]:
    """The first step's logits on one device, in a wider dtype and in the shape's."""
    config, prompt = config_of(shape, length), prompt_of(shape, batch, length, device)
    found = []
    for dtype in (exact_dtype(shape.dtype), shape.dtype):
        chain = engine(config, (1, 1), None, device, length, dtype)
        read_prompt(chain, prompt[:, :-1], chunk_of(length))
        found.append(chain.generate(prompt[:, -1:], curr_pos=length // 2))
    return found


def prompt_of(shape: Shape, batch: int, length: int, device: torch.device) -> Tensor:
    """Half the caches' length, and the token that every step takes."""
    return tokens_of(shape.vocab_size, batch, length // 2 + 1, device)


class _Steps:
    """The next step at each call, always with the same token."""

    def __init__(self, chain: Any, token: Tensor) -> None:
        self._generate: Callable[..., Tensor] = chain.generate
        self._token = token
        self._position = chain.models[0].cache_length // 2

    def __call__(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = self._generate(self._token, curr_pos=self._position)
        self._position += 1
        return logits


def decode_cases(shape: Shape, length: int, mode: str | None) -> list[DecodeCase]:
    cuts = ((1, 1), (1, 2), (2, 1))
    return [DecodeCase(shape, batch, length, cut, mode) for batch in (16, 1) for cut in cuts]
