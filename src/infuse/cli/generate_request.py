"""What `infuse generate` is asked for, checked before a weight is read: folder, prompts, device, processes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infuse.cli.arguments import UserError
from infuse.cli.doctor import why_inductor_cannot_compile
from infuse.models.checkpoint import CheckpointMismatch, check_checkpoint
from infuse.models.config import ModelConfig
from infuse.models.hugging_face_config import load_model_config
from infuse.models.sampling import Sampling
from infuse.models.shard import Shard, split_layers
from infuse.models.tokenizer import load_stop_tokens, load_tokenizer

DEFAULT_TOKENS = 256
# Caches of such lengths: prompts of many lengths then have the same compiled step, in the next run too.
CACHE_MULTIPLE = 256


@dataclass(frozen=True, slots=True)
class Request:
    """prompts: token ids, one list each. num_parameters: of all shards. backend, mode: for torch.compile; None: eager.

    shards: of all processes together; tensor_parallel: processes that share each of them.
    """

    folder: Path
    config: ModelConfig
    num_parameters: int
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    prompts: tuple[list[int], ...]
    max_tokens: int
    sampling: Sampling
    seed: int
    device: torch.device
    dtype: torch.dtype
    backend: str | None
    mode: str | None
    shards: tuple[Shard, ...]
    tensor_parallel: int

    @property
    def longest(self) -> int:
        """How many tokens the longest prompt has."""
        return max(map(len, self.prompts))

    @property
    def max_generated_tokens(self) -> int:
        """What the caches hold besides the longest prompt."""
        needed = self.longest + self.max_tokens
        return -(-needed // CACHE_MULTIPLE) * CACHE_MULTIPLE - self.longest


def check(arguments: argparse.Namespace) -> Request:
    """Raises UserError for what is wrong, before memory is taken for a weight."""
    device = _device(arguments.device)
    folder: Path = arguments.checkpoint
    if not folder.is_dir():
        raise UserError(f"--checkpoint: got {folder}, expected a folder with config.json and safetensors")
    with _mistakes_of_the_user():
        config = load_model_config(folder)
        tokenizer = load_tokenizer(folder)
        stop_tokens = load_stop_tokens(folder)
    _check_processes(arguments, config)
    with _mistakes_of_the_user("--shards: "):
        shards = split_layers(folder.name, config.num_layers, arguments.shards)
    prompts = tuple(_tokens(tokenizer, prompt, config) for prompt in _texts(arguments.prompt))
    max_tokens = _max_tokens(arguments.max_tokens, max(map(len, prompts)), config)
    backend, mode = _compiler(arguments, device)
    with _mistakes_of_the_user():
        num_parameters = sum(check_checkpoint(folder, shard) for shard in shards)
    return Request(
        folder=folder,
        config=config,
        num_parameters=num_parameters,
        tokenizer=tokenizer,
        stop_tokens=stop_tokens,
        prompts=prompts,
        max_tokens=max_tokens,
        sampling=Sampling(arguments.temperature, arguments.top_k),
        seed=arguments.seed,
        device=device,
        dtype=config.torch_dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        backend=backend,
        mode=mode,
        shards=tuple(shards),
        tensor_parallel=arguments.tp,
    )


@contextmanager
def _mistakes_of_the_user(prefix: str = "") -> Iterator[None]:
    """What the libraries find wrong with a folder becomes one line."""
    try:
        yield
    except CheckpointMismatch as error:
        raise UserError(error.one_line()) from error
    except (ValueError, NotImplementedError, OSError) as error:
        raise UserError(prefix + " ".join(str(error).split())) from error


def _device(name: str | None) -> torch.device:
    """Each process of torchrun has a GPU of its own, the one of its number on this machine."""
    available = torch.cuda.device_count() if torch.cuda.is_available() and torch.version.hip is None else 0
    name = name or ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: got {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    needed = max(local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, device.index or 0) + 1
    if needed > available:
        expected = f"{needed} NVIDIA GPU{'s' * (needed > 1)} that torch {torch.__version__} can use"
        raise UserError(f"--device: got {name}, expected {expected}, there are {available}")
    return torch.device("cuda", local if device.index is None else device.index)


def _check_processes(arguments: argparse.Namespace, config: ModelConfig) -> None:
    world_size, tp = int(os.environ.get("WORLD_SIZE", "1")), arguments.tp
    if tp > 1:
        sizes = {
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.intermediate_dim,
        }
        wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
        if wrong:
            raise UserError(f"--tp: got {tp}, expected a divisor of the model's {', '.join(wrong)}")
    if world_size == 1 and tp > 1:
        processes = arguments.shards * tp
        command = f"torchrun --nproc-per-node {processes} -m infuse generate --shards {arguments.shards} --tp {tp} ..."
        raise UserError(f"--tp: got {tp} in one process, expected {processes}: {command}")
    if world_size > 1 and arguments.shards * tp != world_size:
        got = f"got {arguments.shards} x {tp} under torchrun with {world_size} processes"
        raise UserError(f"--shards, --tp: {got}, expected two numbers whose product is {world_size}")


def _texts(prompts: Sequence[str]) -> Iterator[str]:
    if prompts.count("-") > 1:
        raise UserError("--prompt: got - more than once, expected at most one prompt from the input")
    for prompt in prompts:
        yield sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def _tokens(tokenizer: Any, prompt: str, config: ModelConfig) -> list[int]:
    tokens: list[int] = tokenizer.encode(prompt).ids
    if not tokens:
        raise UserError(f"--prompt: got {prompt!r}, which is no token, expected some text")
    if max(tokens) >= config.vocab_size:
        expected = f"expected less than vocab_size, {config.vocab_size}, as in this model's own tokenizer.json"
        raise UserError(f"--prompt: got token {max(tokens)} from tokenizer.json, {expected}")
    return tokens


def _max_tokens(asked: int | None, longest: int, config: ModelConfig) -> int:
    room = config.max_seq_len + 1 - longest  # the last token is not read again
    if room < 1 or (asked or 1) > room:
        got = f"got {longest} tokens" + (f" and --max-tokens {asked}" if asked else "")
        raise UserError(f"--prompt: {got}, expected no more than max_position_embeddings, {config.max_seq_len}")
    return asked or min(DEFAULT_TOKENS, room)


def _compiler(arguments: argparse.Namespace, device: torch.device) -> tuple[str | None, str | None]:
    """(backend, mode) for torch.compile; (None, None) for eager."""
    # Compiling for a CPU takes 12 s for the demo's decoder and then saves 2 ms a token: 6,000 tokens to make up for it.
    backend = arguments.compile or ("infuse" if device.type == "cuda" else "eager")
    if backend == "eager":
        if arguments.mode:
            raise UserError(f"--mode: got {arguments.mode} with --compile eager, expected --compile infuse or inductor")
        return None, None
    if reason := why_inductor_cannot_compile():
        raise UserError(f"--compile {backend}: {reason}; --compile eager runs without")
    return backend, arguments.mode or ("reduce-overhead" if device.type == "cuda" else "default")
