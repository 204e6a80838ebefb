"""Training over two processes: loss and gradients of one process on the same batch, with the same sites fused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from infuse.models.config import ModelConfig
from infuse.models.cut_parameters import gathered
from infuse.models.decoder import GeneralMHA, ShardTransformerDecoder
from infuse.models.parallel.data_parallel import DecoderWithLoss, shard_data_parallel
from infuse.models.parallel.pipeline_training import PipelineTraining, cross_entropy
from infuse.models.parallel.process_group import Peers
from infuse.models.parallel.tensor_parallel import parallelize
from infuse.models.shard import split_layers, whole_model
from tests.models.configs import CONFIG
from tests.models.parallel.engines import assert_refused
from tests.models.parallel.rewriting import Rewriting
from tests.models.test_sharded_rewrites import sites

TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
LARGE = dataclasses.replace(CONFIG, vocab_size=4097)  # a head whose loss is fused, and rows that don't divide
# A layer, which is one graph for all; the last norm, head and loss.
IN_A_LAYER = Counter({"attention": 1, "rope": 2, "swiglu": 1, "rms_norm": 1, "add_rms_norm": 1})
AT_THE_END = Counter({"rms_norm": 1, "linear_cross_entropy": 1})


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (4, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def decoder(config: ModelConfig) -> ShardTransformerDecoder:
    torch.manual_seed(5)
    return GeneralMHA(config, whole_model("m", config.num_layers))


def one_process(config: ModelConfig) -> tuple[float, dict[str, Tensor]]:
    model = decoder(config)
    tokens, targets = batch()
    loss = cross_entropy(model(tokens), targets)
    loss.backward()
    return loss.item(), {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def assert_same_gradients(model: nn.Module, loss: float, expected: tuple[float, dict[str, Tensor]]) -> None:
    """fp32: a gradient is a sum over 32 tokens, which two ranks sum in two parts, of products of rounded sums of up to
    96 terms: 2e-5 of each parameter's largest, some 200 roundings."""
    assert abs(loss - expected[0]) < 1e-5 * expected[0]
    found = {name: gathered(part.grad) for name, part in model.named_parameters()}
    assert found.keys() == expected[1].keys()
    for name, grad in expected[1].items():
        error = (found[name] - grad).abs().max() / grad.abs().max()
        assert error < 2e-5, f"{name}: {error}"


def own_rows(peers: Peers) -> tuple[Tensor, Tensor]:
    tokens, targets = (part.chunk(peers.world_size)[peers.rank] for part in batch())
    return tokens, targets


def mean(loss: Tensor, peers: Peers) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / peers.world_size


def check_fsdp_equals_one_process_and_keeps_its_sites(peers: Peers, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (peers.world_size,))
    for config in (LARGE, dataclasses.replace(LARGE, tie_word_embeddings=True)):
        counts = []
        for is_cut in (False, True):
            torch._dynamo.reset()
            model, rewriting = DecoderWithLoss(decoder(config)), Rewriting()
            if is_cut:
                shard_data_parallel(model, mesh)
            model.compile_pieces(backend=rewriting)
            loss = model(*own_rows(peers))
            counts.append((rewriting.counts, rewriting.graphs))
        loss.backward()
        assert_same_gradients(model.decoder, mean(loss, peers), one_process(config))
        assert counts == [(IN_A_LAYER + AT_THE_END, 2)] * 2, counts


def check_fsdp_in_bfloat16_keeps_the_weights_in_fp32(peers: Peers, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (peers.world_size,))
    model = DecoderWithLoss(decoder(CONFIG))
    shard_data_parallel(model, mesh, precision=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    dtypes = []
    model.decoder.layers[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    loss = model(*own_rows(peers))
    loss.backward()
    assert dtypes == [torch.bfloat16]
    assert {part.grad.dtype for part in model.parameters() if part.grad is not None} == {torch.float32}
    expected = one_process(CONFIG)[0]
    assert abs(mean(loss, peers) - expected) < 2e-2 * expected  # bfloat16 rounds to 1/256


def check_tensor_parallel_under_fsdp_equals_one_process(peers: Peers, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (1, peers.world_size), mesh_dim_names=("data", "tensor"))
    model = DecoderWithLoss(decoder(TIED))
    parallelize(model.decoder, TIED, mesh["tensor"])
    shard_data_parallel(model, mesh["data"])
    loss = model(*batch())
    loss.backward()
    assert_same_gradients(model.decoder, loss.item(), one_process(TIED))


def check_a_shard_has_no_loss(peers: Peers, folder: Path) -> None:
    shard = GeneralMHA(CONFIG, split_layers("m", 3, 2)[0])
    assert_refused(lambda: DecoderWithLoss(shard), "expected a decoder with all layers")


def check_tensor_parallel_trains_with_the_same_sites(peers: Peers, folder: Path) -> None:
    model, rewriting = decoder(CONFIG), Rewriting()
    parallelize(model, CONFIG, init_device_mesh("cpu", (peers.world_size,)))
    model.compile(backend=rewriting)
    tokens, targets = batch()
    loss = cross_entropy(model(tokens), targets)
    loss.backward()
    assert_same_gradients(model, loss.item(), one_process(CONFIG))
    assert rewriting.counts == Counter(sites(3, last=True)) and rewriting.graphs == 1
    torch.optim.AdamW(model.parameters(), foreach=False).step()


def check_a_pipeline_trains_as_one_process(peers: Peers, folder: Path) -> None:
    group = dist.group.WORLD
    assert group is not None
    for schedule, config in (("1f1b", TIED), ("gpipe", CONFIG)):
        torch._dynamo.reset()
        whole, shard = decoder(config), split_layers("m", 3, 2)[peers.rank]
        stage, rewriting = GeneralMHA(config, shard), Rewriting()
        theirs = {rename(name, shard.start_layer): name for name, _ in stage.named_parameters()}
        values = {theirs[name]: part for name, part in whole.state_dict().items() if name in theirs}
        stage.load_state_dict(values, strict=config is not TIED)
        stage.compile(backend=rewriting, fullgraph=True)
        training = PipelineTraining(stage, config, group, num_microbatches=2, schedule=schedule)
        loss = training.step(*batch())
        expected = one_process(config)
        grads = {theirs[name]: grad for name, grad in expected[1].items() if name in theirs}
        if config is TIED and shard.is_last_layer:
            grads["output.weight"] = expected[1]["tok_embeddings.weight"]
        assert_same_gradients(stage, loss, (expected[0], grads))
        assert rewriting.counts == Counter(sites(shard.num_layers, last=shard.is_last_layer))
    assert_refused(lambda: training.step(*(part[:3] for part in batch())), "got 3 rows and num_microbatches=2")
    assert_refused(lambda: PipelineTraining(stage, CONFIG, group, num_microbatches=1), "at least 2")


def rename(name: str, start_layer: int) -> str:
    """A stage's parameter in the whole model."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{start_layer + int(layer)}.{rest}"
