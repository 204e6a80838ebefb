"""How `infuse generate` runs: loads weights, compiles the step of one token and warms it up, writes texts."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor, nn

from infuse.cli.arguments import UserError
from infuse.cli.generate import GenerationFailed
from infuse.cli.generate_progress import counting, note, speaks, waiting
from infuse.cli.generate_request import Request
from infuse.history import last_report
from infuse.models.checkpoint import load_sharded_model
from infuse.models.parallel.heartbeat import PeerLostError
from infuse.models.sharded import ShardChain
from infuse.models.writing import Engine, pieces, stream_tokens

# With CUDA graphs the first step warms up, the second records and the third replays.
WARM_UP_STEPS = 3


@dataclass(slots=True)
class Timing:
    """When a text was begun and when each of its tokens was there, in seconds."""

    begin: float = field(default_factory=time.perf_counter)
    tokens: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        return self.tokens[0] - self.begin

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None when there are none."""
        return (len(self.tokens) - 1) / (self.tokens[-1] - self.tokens[0]) if len(self.tokens) > 1 else None


def run(request: Request) -> None:
    """Writes the texts to the output, and what it took to the error output.

    Raises UserError where memory runs out; GenerationFailed where it does in one of several processes, or one is lost.
    """
    try:
        with _without_warnings(), _engine(request) as engine:
            warm_up(request, engine)
            for tokens in request.prompts:
                write(request, engine, tokens)
    except torch.OutOfMemoryError as error:
        remedy = "--shards under torchrun spreads a model over several GPUs"
        reason = f"got {request.device}, expected more memory: {str(error).partition('.')[0]}; {remedy}"
        if _several_processes():  # the others don't know
            raise GenerationFailed(reason) from error
        raise UserError(f"--device: {reason}") from error
    except PeerLostError as error:
        raise GenerationFailed(str(error)) from error


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Leaves out two that no folder can help: about fp32 without TF32, about torchtune's fp32 norms in bf16."""
    with warnings.catch_warnings():
        for message in ("TensorFloat32", "Mismatch dtype between input and weight"):
            warnings.filterwarnings("ignore", message=message)
        yield


@contextlib.contextmanager
def _engine(request: Request) -> Iterator[Engine]:
    if _several_processes():
        from infuse.models.parallel import launch

        processes = launch.open_engine(
            request.folder,
            num_shards=len(request.shards),
            tensor_parallel=request.tensor_parallel,
            device=request.device,
            dtype=request.dtype,
            max_generated_tokens=request.max_generated_tokens,
            compile_with=lambda decoder: compile_decoder(request, decoder),
        )
        with contextlib.ExitStack() as stack:
            try:
                with waiting("loading"):
                    engine = stack.enter_context(processes)
            except (ValueError, OSError) as error:  # such as a folder that is not the same on every machine
                raise GenerationFailed(str(error)) from error
            yield engine
    else:
        with counting("loading", request.num_parameters * request.dtype.itemsize) as advance:
            chain = load_chain(request, lambda tensor: advance(tensor.nbytes))
        yield chain


def load_chain(request: Request, on_tensor: Callable[[Tensor], None] | None = None) -> ShardChain:
    """The shards in one process, to be compiled at their first step. on_tensor: see `load_sharded_model`."""
    models = [
        load_sharded_model(
            request.folder,
            shard,
            device=request.device,
            dtype=request.dtype,
            max_generated_tokens=request.max_generated_tokens,
            on_tensor=on_tensor,
        )
        for shard in request.shards
    ]
    for model in models:
        compile_decoder(request, model.model)
    return ShardChain(models)


def compile_decoder(request: Request, decoder: nn.Module) -> None:
    """Shapes are static: a step takes one token, and the caches have one length for all prompts.

    Prompts stay eager (`stream_tokens`' eager_prompt): on an H200 one of 739 tokens takes a bfloat16 Llama of 1.2B
    parameters 24 ms; after 35 s the compilation for prompts of any length was not at its end.
    """
    if request.backend is not None:
        decoder.compile(backend=request.backend, mode=request.mode, dynamic=False, fullgraph=True)


def warm_up(request: Request, engine: Engine) -> None:
    """`first_steps`, and says how long they took and what was rewritten."""
    what = "warming up" if request.backend is None else f"compiling with {request.backend}, mode {request.mode}"
    with waiting(what):
        first_steps(request, engine)
    if request.backend == "infuse":
        counts = last_report(recompilations=True).rewritten
        note("rewritten: " + (", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())) or "nothing"))


def first_steps(request: Request, engine: Engine) -> None:
    """Makes caches for the longest prompt and compiles the step of one token, so that no text waits for it."""
    tokens = torch.zeros(1, request.longest, dtype=torch.int64)
    with _one_compilation_a_shard(request):
        for _ in stream_tokens(engine, tokens, min(request.max_tokens, 1 + WARM_UP_STEPS), eager_prompt=True):
            pass


def _one_compilation_a_shard(request: Request) -> contextlib.AbstractContextManager[object]:
    """All shards share the decoder's code, which Dynamo would compile for the first few of them only."""
    limit = max(dynamo_config.recompile_limit, 2 * len(request.shards))
    patched: contextlib.AbstractContextManager[object] = dynamo_config.patch(recompile_limit=limit)
    return patched


def write(request: Request, engine: Engine, tokens: list[int]) -> Timing:
    """Continues one prompt, printing the text as it comes, and then how long it took."""
    timing = Timing()
    for piece in pieces(steps(request, engine, tokens, timing), request.tokenizer, request.stop_tokens):
        if speaks():
            print(piece, end="", flush=True)
    if speaks():
        print(flush=True)
    note(_summary(len(tokens), timing))
    return timing


def steps(request: Request, engine: Engine, tokens: list[int], timing: Timing) -> Iterator[Tensor]:
    """The new tokens of one prompt, [1] int64 each, as they come. timing: gets the time of each."""
    chosen_tokens = stream_tokens(
        engine,
        torch.tensor([tokens]),
        request.max_tokens,
        sampling=request.sampling,
        stop_tokens=request.stop_tokens,
        generator=torch.Generator(engine.models[-1].device).manual_seed(request.seed),
        eager_prompt=True,
    )
    for chosen in chosen_tokens:
        timing.tokens.append(time.perf_counter())
        yield chosen


def _summary(prompt_length: int, timing: Timing) -> str:
    first = (
        f"prompt of {prompt_length} token{'s' * (prompt_length > 1)}; first token after {timing.first_token_s:.3f} s"
    )
    speed = timing.tokens_per_s
    return first if speed is None else f"{first}; {len(timing.tokens) - 1} more at {speed:.1f} tokens/s"
