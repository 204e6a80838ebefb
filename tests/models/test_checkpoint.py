"""Weights from and to Hugging Face folders: round trips both ways, and checkpoints that don't fit are refused whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchtune")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from infuse.models.checkpoint import (
    CheckpointMismatch,
    check_checkpoint,
    load_sharded_model,
    load_weights,
    save_checkpoint,
)
from infuse.models.extras import import_extra
from infuse.models.hugging_face_config import load_model_config
from infuse.models.shard import Shard, split_layers, whole_model
from infuse.models.sharded import ShardedGeneralModel
from tests.models.hugging_face import FAMILIES, make_model, reference_logits, save_model

Tensors = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def in_pieces(folder: Path) -> Path:
    """The same checkpoint in several files with an index."""
    return save_model(make_model("llama"), folder.parent / "pieces", max_shard_size="40KB")


def from_transformers(folder: Path) -> nn.Module:
    model: nn.Module = import_extra("transformers").AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )
    return model.eval()


def refusal(folder: Path, shard: Shard | None = None) -> str:
    """The message of what load_weights raises; nothing of the model has changed then."""
    config = load_model_config(folder)
    model = ShardedGeneralModel(config, shard or whole_model("m", config.num_layers))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError) as caught:
        load_weights(model, folder)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before))
    return str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_comes_back_from_us_bit_for_bit(family: str, num_shards: int, tmp_path: Path) -> None:
    oracle = make_model(family)
    theirs = save_model(oracle, tmp_path / "theirs")
    shards = split_layers("m", 3, num_shards)
    save_checkpoint([load_sharded_model(theirs, shard) for shard in shards], tmp_path / "ours")
    again = from_transformers(tmp_path / "ours")
    expected = dict(oracle.named_parameters())
    assert dict(again.named_parameters()).keys() == expected.keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(reference_logits(again, TOKENS), reference_logits(oracle, TOKENS))
    assert load_model_config(tmp_path / "ours") == load_model_config(theirs)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_what_we_saved_comes_back_to_us_bit_for_bit(num_shards: int, folder: Path, tmp_path: Path) -> None:
    config = load_model_config(folder)
    models = [ShardedGeneralModel(config, shard, dtype=torch.bfloat16) for shard in split_layers("m", 3, num_shards)]
    save_checkpoint(models, tmp_path / "ours")
    for model in models:
        again = load_sharded_model(tmp_path / "ours", model.shard)
        assert again.dtype == torch.bfloat16
        for mine, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_files_with_an_index_give_the_same_model(folder: Path) -> None:
    pieces = in_pieces(folder)
    assert len(list(pieces.glob("*.safetensors"))) > 2
    whole, split = load_sharded_model(folder), load_sharded_model(pieces)
    for (name, mine), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_weights_take_the_models_dtype(folder: Path) -> None:
    model = load_sharded_model(folder, dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(model.model.layers[0].mlp.w3.weight, expected)


def test_a_shard_reads_only_the_files_that_hold_its_tensors(folder: Path) -> None:
    pieces = in_pieces(folder)
    index = json.loads((pieces / "model.safetensors.index.json").read_text())["weight_map"]
    last = {index[name] for name in index if name.startswith("model.layers.2.")} | {index["lm_head.weight"]}
    first = {index[name] for name in index if name.startswith(("model.layers.0.", "model.embed"))}
    for file in last - first:
        (pieces / file).unlink()
    load_sharded_model(pieces, Shard("m", 0, 0, 3))
    assert "broken or truncated files" in refusal(pieces, Shard("m", 2, 2, 3))


def test_missing_extra_and_wrongly_shaped_tensors_are_listed_together(folder: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.3.input_layernorm.weight"] = torch.ones(48)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
        tensors[Q] = torch.ones(48, 47)
        tensors["lm_head.weight"] = torch.ones(64, 48, dtype=torch.int8)

    change(folder, edit)
    message = refusal(folder)
    assert message.splitlines()[1:] == [
        "  missing:",
        "    model.layers.0.mlp.up_proj.weight",
        "    model.norm.weight",
        "  not in this model:",
        "    model.layers.0.self_attn.q_proj.bias",
        "    model.layers.3.input_layernorm.weight",
        "  of another shape:",
        f"    {Q}: got [48, 47], expected [48, 48]",
        "  of another dtype:",
        "    lm_head.weight: got I8, expected one of F64, F32, BF16, F16",
    ]


def test_a_shard_misses_only_its_own_tensors(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(Q))
    load_sharded_model(folder, Shard("m", 0, 0, 3))
    assert Q in refusal(folder, Shard("m", 1, 2, 3))


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert "broken or truncated files:\n    model.safetensors: " in message and "missing" not in message


def test_a_truncated_piece_is_named_and_its_tensors_are_not_called_missing(folder: Path) -> None:
    pieces = in_pieces(folder)
    broken = sorted(pieces.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:-8])
    message = refusal(pieces)
    assert f"broken or truncated files:\n    {broken.name}: " in message and "missing" not in message


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(folder: Path) -> None:
    pieces = in_pieces(folder)
    path = pieces / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q] = next(file for file in files if file != index["weight_map"][Q])
    path.write_text(json.dumps(index))
    assert f"missing:\n    {Q}" in refusal(pieces)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "weights.bin", "/model.safetensors"])
def test_an_index_that_leaves_the_folder_or_names_a_pickle_is_refused(folder: Path, file: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: file}}))
    assert "expected names of *.safetensors files" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_can_not_be_read_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "expected a JSON object with weight_map" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_unopened(folder: Path, name: str) -> None:
    class Opened:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "opened",)

    (folder / "model.safetensors").unlink()
    torch.save(Opened(), folder / name)
    message = refusal(folder)
    assert f"got {name}" in message and "refused" in message
    assert not (folder / "opened").exists()


def test_a_folder_without_checkpoint_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or"):
        load_sharded_model(folder)


def test_rotary_frequencies_of_older_checkpoints_are_no_extra_tensors(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    load_sharded_model(folder)


def test_a_head_beside_a_tied_embedding_must_equal_it(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    for shard in (None, Shard("m", 1, 2, 3)):
        assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(folder, shard)
    load_sharded_model(folder, Shard("m", 0, 1, 3))  # it has no head
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    load_sharded_model(folder)


def test_a_checkpoint_is_not_written_over_another(folder: Path) -> None:
    model = load_sharded_model(folder)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="with model.safetensors, expected no checkpoint"):
        save_checkpoint([model], folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_shards_that_are_not_the_whole_model_are_not_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers 2-2 are missing"):
        save_checkpoint([load_sharded_model(folder, Shard("m", 0, 1, 3))], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_shards_of_different_dtypes_are_not_saved(folder: Path, tmp_path: Path) -> None:
    first, last = split_layers("m", 3, 2)
    models = [load_sharded_model(folder, first), load_sharded_model(folder, last, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="different configurations or dtypes"):
        save_checkpoint(models, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_is_checked_before_there_is_memory_for_a_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    whole = ShardedGeneralModel.__init__

    def watch(model: ShardedGeneralModel, *args: Any, **options: Any) -> None:
        whole(model, *args, **options)
        made.append({parameter.device.type for parameter in model.parameters()})

    monkeypatch.setattr(ShardedGeneralModel, "__init__", watch)
    load_sharded_model(folder)
    assert made == [{"meta"}, {"cpu"}]
    change(folder, lambda tensors: tensors.pop(Q))
    with pytest.raises(CheckpointMismatch, match=f"missing:\n    {Q}"):
        load_sharded_model(folder)
    assert made[2:] == [{"meta"}]


def test_loading_draws_no_initial_values_and_shows_every_tensor(folder: Path) -> None:
    state, sizes = torch.get_rng_state(), []
    model = load_sharded_model(folder, on_tensor=lambda tensor: sizes.append(tensor.numel()))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(sizes) == len(list(model.parameters())) and sum(sizes) == check_checkpoint(folder)
    parts = [check_checkpoint(folder, shard) for shard in split_layers("m", 3, 2)]
    assert sum(parts) == sum(sizes) and min(parts) > 0


def test_problems_fit_in_one_line() -> None:
    found = {
        "missing": [f"a{number}" for number in range(5)],
        "contradictory": [],
        "of another shape": ["b: got, expected"],
    }
    assert CheckpointMismatch("folder", found).one_line() == (
        "folder: a checkpoint that does not fit the model: missing: a0, a1, a2, and 2 more; "
        "of another shape: b: got, expected"
    )
