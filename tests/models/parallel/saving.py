"""Checkpoints written by two processes are those that one writes, and open over two processes again."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from infuse.models.checkpoint import load_sharded_model
from infuse.models.decoder import ShardTransformerDecoder
from infuse.models.parallel.data_parallel import DecoderWithLoss, shard_data_parallel
from infuse.models.parallel.process_group import Peers
from infuse.models.parallel.saving import save_over_ranks
from infuse.models.parallel.tensor_parallel import parallelize
from infuse.models.shard import split_layers
from tests.models.parallel.engines import assert_refused


def assert_same_weights(path: Path, folder: Path) -> None:
    got, expected = (load_sharded_model(each).model.state_dict() for each in (path, folder))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def check_each_shard_is_written_by_its_process(peers: Peers, folder: Path) -> None:
    path = folder / "saved_by_shards"
    group = dist.group.WORLD
    assert group is not None
    for family in ("llama", "qwen2_tied"):
        model = load_sharded_model(folder / family, split_layers("m", 3, 2)[peers.rank])
        save_over_ranks(model.model, model.config, path / family, peers, shards=group)
        files = sorted(file.name for file in (path / family).iterdir())
        numbered = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
        assert files == ["config.json", *numbered, "model.safetensors.index.json"]
        assert_same_weights(path / family, folder / family)


def check_cut_weights_are_gathered(peers: Peers, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (peers.world_size,))
    for family, name in (("llama_tied", "tensor"), ("llama", "tensor"), ("llama", "fsdp")):
        path = folder / f"saved_{family}_{name}"
        model = load_sharded_model(folder / family)
        decoder = model.model
        assert isinstance(decoder, ShardTransformerDecoder)
        if name == "tensor":
            parallelize(decoder, model.config, mesh)
        else:
            shard_data_parallel(DecoderWithLoss(decoder), mesh)
        save_over_ranks(decoder, model.config, path, peers)
        assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
        assert_same_weights(path, folder / family)


def check_a_folder_with_a_checkpoint_is_refused_everywhere(peers: Peers, folder: Path) -> None:
    model = load_sharded_model(folder / "llama")
    kind = FileExistsError if peers.rank == 0 else ValueError
    assert_refused(
        lambda: save_over_ranks(model.model, model.config, folder / "llama", peers), "expected no checkpoint", kind
    )


def check_shards_with_a_gap_are_refused_everywhere(peers: Peers, folder: Path) -> None:
    group = dist.group.WORLD
    shard = split_layers("m", 3, 3)[2 * peers.rank]
    model = load_sharded_model(folder / "llama", shard)
    save = lambda: save_over_ranks(model.model, model.config, folder / "gap", peers, shards=group)  # noqa: E731
    assert_refused(save, "layers 1-1 are missing")
    assert not (folder / "gap").exists()
