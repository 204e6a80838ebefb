"""A training step, forward and backward, of one model whose weights FSDP2 cuts over two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from answers import bounds, check
from implementations import infuse_backend, optional
from model_shapes import Shape
from parallel_models import MODEL_ID, config_of, exact_dtype, fill, tokens_of
from parallel_timing import Measured, take_turns
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

BACKENDS: dict[str, str | None] = {"eager": None, "compile": "inductor", "infuse": "infuse"}


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """One row of `length` tokens a device; weights in fp32, gathered and computed with in the shape's dtype."""

    shape: Shape
    length: int

    @property
    def name(self) -> str:
        return f"{self.shape.name} train {self.length} tokens a device, FSDP2 over 2, compiled by pieces"

    @property
    def impls(self) -> list[str]:
        return list(BACKENDS)

    @property
    def is_alone(self) -> bool:
        return False

    @property
    def bytes(self) -> int:
        return 3 * self.shape.matmul_weights() * self.shape.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of one device."""
        pairs = self.length * self.length // 2
        return 3 * (2 * self.shape.matmul_weights() * self.length + self.shape.attention_flops(pairs))

    def measure(self, peers: Any, rounds: int) -> list[Measured]:
        """Every implementation's times. Raises WrongAnswer for a loss or gradients that rounding does not explain."""
        tokens = tokens_of(self.shape.vocab_size, peers.world_size, self.length + 1, peers.device)[peers.rank][None]
        args = (tokens[:, :-1], tokens[:, 1:])
        expected = _answer(self._step(peers, None, exact_dtype(self.shape.dtype), args))
        steps = {impl: self._step(peers, backend, self.shape.dtype, args) for impl, backend in BACKENDS.items()}
        found = {impl: _answer(step) for impl, step in steps.items()}
        allowed = bounds(found["eager"], expected, self.shape.dtype, 3.0)
        errors = peers.agree(lambda: {impl: check(impl, answer, expected, allowed) for impl, answer in found.items()})
        stats = take_turns(steps, rounds, 1, peers)
        last = {impl: _answer(step) for impl, step in steps.items()}
        peers.agree(lambda: [check(f"{impl}, the last step", last[impl], expected, allowed) for impl in steps])
        note = "the slower rank's time"
        return [Measured(self.name, impl, stats[impl], errors[impl], note) for impl in steps]

    def _step(
        self, peers: Any, backend: str | None, dtype: torch.dtype, args: tuple[Tensor, Tensor]
    ) -> Callable[[], list[Tensor]]:
        parallel = optional("infuse.models.parallel.data_parallel")
        config = config_of(self.shape, self.length)
        shard = optional("infuse.models.shard").whole_model(MODEL_ID, config.num_layers)
        with peers.device:
            decoder = optional("infuse.models.decoder").GeneralMHA(config, shard)
        fill(decoder, config, shard)
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        model = parallel.DecoderWithLoss(decoder)
        parallel.shard_data_parallel(model, init_device_mesh(peers.device.type, (2,)), precision=precision)
        if backend == "infuse":
            infuse_backend()
        if backend is not None:
            model.compile_pieces(backend=backend, dynamic=False)

        def step() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            loss: Tensor = model(*args)
            loss.backward()
            last = decoder.layers[-1]
            chosen = (decoder.norm.scale, decoder.layers[0].sa_norm.scale, last.attn.q_proj.weight, last.mlp.w2.weight)
            return [loss.detach(), *(parameter.grad.to_local() for parameter in chosen)]

        return step


def _answer(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The mean of the ranks' losses and this rank's parts of some gradients."""
    loss, *gradients = step()
    dist.all_reduce(loss)
    return [loss / dist.get_world_size(), *(gradient.clone() for gradient in gradients)]
