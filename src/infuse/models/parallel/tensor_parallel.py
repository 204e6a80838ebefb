"""Tensor parallel: how the weights of a decoder's shard are cut over the ranks of a mesh, as plans for DTensor.

q, k, v, gate and up are cut by rows of their weights, so that a rank holds whole heads and whole hidden units; the
projections behind attention and MLP by columns, whose products are summed over the ranks; embedding and head by
vocabulary. The residual stream and the norms are whole on every rank. With the sequence cut instead ("sequence
parallel") a norm would see a DTensor where the sum before it is a tensor, and the two would no longer be one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)

from infuse.models.config import ModelConfig
from infuse.models.cut_parameters import held
from infuse.models.decoder import ShardTransformerDecoder
from infuse.models.shard import Shard
from infuse.models.sharded import ShardedGeneralModel

_BY_ROWS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3")
_BY_COLUMNS = ("attn.output_proj", "mlp.w2")


def check_ways(config: ModelConfig, ways: int) -> None:
    """Raises ValueError unless that many ranks can share the heads and the hidden units evenly."""
    for name in ("num_heads", "num_kv_heads", "intermediate_dim"):
        if ways < 1 or getattr(config, name) % ways:
            got = f"got {ways} ranks and {name}={getattr(config, name)}"
            raise ValueError(f"tensor parallel: {got}, expected the ranks to share them evenly; take fewer ranks")


def tensor_parallel_plan(decoder: ShardTransformerDecoder) -> dict[str, ParallelStyle]:
    """Module name -> how it is cut, for the modules that this shard has. A tied head is none, see `parallelize`."""
    plan: dict[str, ParallelStyle] = {f"layers.*.{name}": ColwiseParallel() for name in _BY_ROWS}
    plan |= {f"layers.*.{name}": RowwiseParallel() for name in _BY_COLUMNS}
    if decoder.tok_embeddings is not None:
        plan["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate())
    if isinstance(decoder.output, nn.Module):
        plan["output"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def parallelize(decoder: ShardTransformerDecoder, config: ModelConfig, mesh: DeviceMesh) -> None:
    """Cuts the weights of a decoder, in place, over a mesh of one dimension: they become DTensors.

    Each rank keeps its part of the values that it has. Inputs and outputs are whole tensors, the same on every rank.
    Attention and its caches have the rank's own heads from then on. To train with this alone, without FSDP2 on top,
    give the optimiser `foreach=False`: it finds DTensors and, for the norms, tensors.
    Raises ValueError, before anything is changed, when the heads or hidden units don't divide.
    """
    ways = mesh.size()
    check_ways(config, ways)
    parallelize_module(decoder, mesh, tensor_parallel_plan(decoder), src_data_rank=None)
    if decoder.output is not None and not isinstance(decoder.output, nn.Module):
        parallelize_module(decoder.output.linear, mesh, _tied_head())
    for layer in decoder.layers:
        layer.attn.num_heads //= ways
        layer.attn.num_kv_heads //= ways


def _tied_head() -> ParallelStyle:
    """torchtune's tied head is a call (x, weight), whose weight is the embedding's and cut already."""
    return PrepareModuleInputOutput(
        input_layouts=(Replicate(), None),
        desired_input_layouts=(Replicate(), None),
        use_local_input=False,
        output_layouts=Cut(-1),
        desired_output_layouts=Replicate(),
    )


def parallel_model(
    config: ModelConfig, shard: Shard, mesh: DeviceMesh, device: torch.device, **options: Any
) -> ShardedGeneralModel:
    """A `ShardedGeneralModel` cut over a mesh, of which this rank never holds more than its part.

    Its weights are not initialised: they are to be loaded. options: dtype, use_cache, max_generated_tokens.
    Raises ValueError when the heads or hidden units don't divide.
    """
    check_ways(config, mesh.size())
    model = ShardedGeneralModel(config, shard, "meta", **options)
    parallelize(model.model, config, mesh)
    model.model.to_empty(device=device)
    model.device = device
    with device:
        for module in model.model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()  # its tables are computed, no checkpoint has them
    return model


def keep_local_weights(decoder: ShardTransformerDecoder, mesh: DeviceMesh) -> None:
    """Turns the cut weights of layers and head into plain tensors, for inference: what is left to DTensor are the sums
    over ranks, the gathering of logits, and the embedding.

    A compiler sees linears of the rank's own sizes then, which it may fuse with what is around them as in one process;
    a linear of DTensors it leaves alone. Training, saving and loading need the DTensors: do those before.
    """
    if decoder.output is not None:
        tied = not isinstance(decoder.output, nn.Module)
        weight = decoder.tok_embeddings.weight if tied else decoder.output.weight
        decoder.output = _GatheredLinear(weight, mesh)
    for layer in decoder.layers:
        for name in _BY_ROWS:
            linear = layer.get_submodule(name)
            layer.set_submodule(name, _plain(linear.weight, linear.bias))
        for name in _BY_COLUMNS:
            linear = layer.get_submodule(name)
            layer.set_submodule(name, _SummedLinear(linear, mesh))


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear of this rank's part of the weight, sharing its memory."""
    local = held(weight).detach()
    linear = nn.Linear(local.shape[1], local.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(local, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(held(bias).detach(), requires_grad=False)
    return linear


class _SummedLinear(nn.Module):
    """A linear cut by columns: the sum of all ranks' products, and then the bias, which each rank has whole."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.linear = _plain(linear.weight, None)
        self.bias = None if linear.bias is None else nn.Parameter(held(linear.bias).detach(), requires_grad=False)
        self._mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        part = DTensor.from_local(self.linear(x), self._mesh, [Partial()], run_check=False)
        total: Tensor = part.redistribute(placements=[Replicate()]).to_local()
        return total if self.bias is None else total + self.bias


class _GatheredLinear(nn.Module):
    """A head cut by rows, of all ranks' rows: each computes its own logits and gets the others'."""

    def __init__(self, weight: Tensor, mesh: DeviceMesh) -> None:
        super().__init__()
        self.linear = _plain(weight, None)
        self._rows = weight.shape[0]
        self._mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, _ = x.shape
        shape = torch.Size((batch_size, length, self._rows))
        stride = (length * self._rows, self._rows, 1)  # the rows may not divide: the last rank has fewer then
        part = DTensor.from_local(self.linear(x), self._mesh, [Cut(2)], run_check=False, shape=shape, stride=stride)
        logits: Tensor = part.redistribute(placements=[Replicate()]).to_local()
        return logits
