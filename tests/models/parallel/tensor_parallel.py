"""Tensor parallel over two processes: equal to one, from the same folders, with the same sites fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from infuse.models.checkpoint import load_sharded_model, load_weights, save_checkpoint
from infuse.models.checkpoint_files import CheckpointFiles
from infuse.models.cut_parameters import held
from infuse.models.hugging_face_config import load_model_config
from infuse.models.masks import attention_mask
from infuse.models.parallel.pipeline import PipelineEngine
from infuse.models.parallel.process_group import Peers
from infuse.models.parallel.tensor_parallel import keep_local_weights, parallel_model
from infuse.models.shard import split_layers, whole_model
from infuse.models.sharded import ShardedGeneralModel
from infuse.testing import assert_rewrites
from tests.models.configs import CONFIG
from tests.models.parallel.engines import PADDING, STEPS, assert_refused, assert_same_logits, logits_of
from tests.models.test_sharded_rewrites import sites

FAMILIES = ("llama", "llama_tied", "llama3_scaled", "llama_biases_gelu", "qwen2", "mistral_window")
CPU = torch.device("cpu")


def mesh_of(peers: Peers) -> DeviceMesh:
    return init_device_mesh("cpu", (1, peers.world_size), mesh_dim_names=("shard", "tensor"))


def cut(folder: Path, mesh: DeviceMesh, *, local: bool) -> ShardedGeneralModel:
    config = load_model_config(folder)
    model = parallel_model(config, whole_model("m", config.num_layers), mesh["tensor"], CPU, max_generated_tokens=STEPS)
    load_weights(model, folder)
    if local:
        keep_local_weights(model.model, mesh["tensor"])
    return model


def check_parts_equal_one_process(peers: Peers, folder: Path) -> None:
    mesh = mesh_of(peers)
    for family in FAMILIES:
        for local in (False, True):
            engine = PipelineEngine(cut(folder / family, mesh, local=local), mesh.get_group("shard"))
            padding = PADDING if "window" in family or local else None
            assert_same_logits(logits_of(engine, padding), folder / family, padding)


def check_a_vocabulary_that_does_not_divide(peers: Peers, folder: Path) -> None:
    path = folder / "odd"
    if peers.rank == 0:
        config = dataclasses.replace(CONFIG, vocab_size=65, model_type="llama")
        save_checkpoint([ShardedGeneralModel(config, whole_model("m", 3))], path)
    dist.barrier()
    mesh = mesh_of(peers)
    engine = PipelineEngine(cut(path, mesh, local=True), mesh.get_group("shard"))
    assert_same_logits(logits_of(engine, None), path)


def check_a_rank_reads_and_holds_its_part_only(peers: Peers, folder: Path) -> None:
    whole = load_sharded_model(folder / "llama").model
    norms = sum(part.numel() for part in whole.parameters() if part.dim() == 1)
    half = norms + sum(part.numel() for part in whole.parameters() if part.dim() == 2) // 2
    for local in (False, True):
        sizes: list[int] = []
        with mock.patch.object(CheckpointFiles, "read", counting(CheckpointFiles.read, sizes)):
            model = cut(folder / "llama", mesh_of(peers), local=local)
        assert sum(sizes) == half
        assert sum(held(part).numel() for part in model.parameters()) == half
        model.generate(torch.zeros(1, 2, dtype=torch.int64))
        assert model.model.layers[0].attn.kv_cache.k_cache.shape[1] == 1  # of the two heads


def counting(read: Callable[..., Tensor], sizes: list[int]) -> Callable[..., Tensor]:
    def counted(*args: Any) -> Tensor:
        tensor = read(*args)
        sizes.append(tensor.numel())
        return tensor

    return counted


def check_heads_that_do_not_divide_are_refused(peers: Peers, folder: Path) -> None:
    mesh = mesh_of(peers)["tensor"]
    for name, value in (("num_kv_heads", 1), ("intermediate_dim", 95)):
        config = dataclasses.replace(CONFIG, **{name: value})
        shard = split_layers("m", 3, 1)[0]
        assert_refused(lambda: parallel_model(config, shard, mesh, CPU), f"got 2 ranks and {name}={value}")  # noqa: B023


def check_the_same_sites_are_fused(peers: Peers, folder: Path) -> None:
    for local in (False, True):
        model = cut(folder / "llama", mesh_of(peers), local=local)
        with torch.no_grad():
            model.generate(torch.zeros(2, 5, dtype=torch.int64))
            step = {"mask": attention_mask(5, 1, 5 + STEPS), "input_pos": torch.tensor([[5]])}
            token = torch.zeros(2, 1, dtype=torch.int64)
            assert_rewrites(model.model, (token,), kwargs=step, expect=sites(3, last=True), refused={})
