"""What `infuse generate` refuses: one line and exit code 2, before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtune")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from infuse.cli import generate_request, generate_run, main

Refusal = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs the command and returns the one line that it must print; nothing may be loaded."""

    def run(folder: Path, *options: str) -> str:
        monkeypatch.setattr(generate_run, "run", lambda request: pytest.fail("began to load"))
        given = options if "--prompt" in options else ("--prompt", "import os", *options)
        device = () if "--device" in options else ("--device", "cpu")
        assert main(["generate", "--checkpoint", str(folder), *device, *given]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("infuse: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "99"], "--shards: split_layers: got 99 shards, expected 1 to 3, the model's layers"),
        (["--shards", "0"], "--shards: got '0', expected a positive integer"),
        (["--tp", "3"], "--tp: got 3, expected a divisor of the model's num_attention_heads 4, num_key_value_heads 2"),
        (["--shards", "3", "--tp", "2"], "torchrun --nproc-per-node 6 -m infuse generate --shards 3 --tp 2"),
        (["--prompt", ""], "--prompt: got '', which is no token"),
        (["--prompt", "-", "--prompt", "-"], "--prompt: got - more than once"),
        (["--prompt", "x = 1\n" * 100], "tokens, expected no more than max_position_embeddings, 128"),
        (["--max-tokens", "124"], "--prompt: got 6 tokens and --max-tokens 124, expected no more than"),
        (["--max-tokens", "-1"], "--max-tokens: got '-1', expected a positive integer"),
        (["--temperature", "-0.5"], "--temperature: got '-0.5', expected 0 or a positive number"),
        (["--temperature", "nan"], "--temperature: got 'nan'"),
        (["--temperature", "inf"], "--temperature: got 'inf'"),
        (["--top-k", "0"], "--top-k: got '0'"),
        (["--seed", "-1"], "--seed: "),
        (["--device", "tpu"], "--device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device: got 'meta', expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device: got cuda:99, expected 100 NVIDIA GPUs that torch"),
        (["--dtype", "int8"], "--dtype: "),
        (["--compile", "onnx"], "--compile: "),
        (["--compile", "infuse", "--mode", "fast"], "--mode: "),
        (["--mode", "max-autotune"], "--mode: got max-autotune with --compile eager"),
    ],
)
def test_wrong_options(refusal: Refusal, trained: Path, options: list[str], message: str) -> None:
    assert message in refusal(trained, *options)


def test_what_must_be_given(refusal: Refusal, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, missing in ((["--prompt", "x"], "--checkpoint"), (["--checkpoint", "x"], "--prompt")):
        assert main(["generate", *argv]) == 2
        assert f"required: {missing} (see `infuse generate --help`)" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(refusal: Refusal, trained: Path) -> None:
    assert "--device: got cuda, expected 1 NVIDIA GPU that torch" in refusal(trained, "--device", "cuda")


def test_no_compiler(refusal: Refusal, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_request, "why_inductor_cannot_compile", lambda: "got no C++ compiler, expected g++")
    message = refusal(trained, "--compile", "infuse")
    assert "--compile infuse: got no C++ compiler, expected g++; --compile eager runs without" in message


def test_processes_that_do_not_multiply(refusal: Refusal, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = refusal(trained, "--shards", "3")
    assert (
        "--shards, --tp: got 3 x 1 under torchrun with 4 processes, expected two numbers whose product is 4" in message
    )


def test_only_the_first_process_of_a_machine_says_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["generate", "--checkpoint", str(trained), "--device", "cpu", "--prompt", "x", "--shards", "3"]) == 2
    assert capsys.readouterr() == ("", "")


def test_no_folder(refusal: Refusal, copy: Path) -> None:
    for path in (copy / "none", copy / "config.json"):
        assert f"--checkpoint: got {path}, expected a folder with config.json and safetensors" in refusal(path)


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', expected one of llama, qwen2, mistral"),
        ({"hidden_size": None}, "got no hidden_size; expected a decoder's config.json with these keys"),
        (
            {"num_key_value_heads": 3},
            "config.num_heads, num_kv_heads: got 4 and 3, expected the first to be a multiple",
        ),
        ({"head_dim": 15}, "config.head_dim: got 15, expected an even number"),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "got [1.0, 2.0], expected the same number"),
        ({"vocab_size": 100}, "from tokenizer.json, expected less than vocab_size, 100, as in this model's own"),
        # What contradicts the weights instead of itself:
        ({"num_hidden_layers": 4}, "missing: model.layers.3.self_attn.q_proj.weight, model.layers.3."),
        ({"num_hidden_layers": 2}, "not in this model: model.layers.2.input_layernorm.weight, "),
        ({"intermediate_size": 96}, "model.layers.0.mlp.gate_proj.weight: got [128, 64], expected [96, 64]"),
        ({"attention_bias": True}, "missing: model.layers.0.self_attn."),
    ],
)
def test_a_configuration_that_contradicts_something(
    refusal: Refusal, copy: Path, keys: dict[str, object], message: str
) -> None:
    change_config(copy, **keys)
    assert message in refusal(copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "expected a config.json or a folder that holds one"),
        ("config.json", "{", "config.json, expected JSON"),
        ("tokenizer.json", None, "expected a folder with tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json, expected a tokenizer"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id: got 'x', expected a whole number"),
        ("model.safetensors", None, "got no checkpoint, expected model.safetensors or model.safetensors.index.json"),
        ("model.safetensors", "weights", "broken or truncated files: model.safetensors: "),
    ],
)
def test_files_that_are_missing_or_broken(
    refusal: Refusal, copy: Path, name: str, content: str | None, message: str
) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    assert message in refusal(copy)


def test_pickles_are_refused(refusal: Refusal, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "got pytorch_model.bin, expected model.safetensors or " in refusal(copy)


def test_a_truncated_file(refusal: Refusal, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "broken or truncated files: model.safetensors: " in refusal(copy)


def test_tensors_that_are_missing_extra_or_of_another_shape_or_dtype(refusal: Refusal, copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    for number in range(5):
        tensors[f"model.extra.{number}"] = torch.zeros(1)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, path)
    message = refusal(copy, "--shards", "1")
    assert message.endswith(
        "a checkpoint that does not fit the model: missing: model.norm.weight; "
        "not in this model: model.extra.0, model.extra.1, model.extra.2, and 2 more; "
        "of another shape: model.layers.1.mlp.up_proj.weight: got [3, 5], expected [128, 64]; "
        "of another dtype: model.layers.2.input_layernorm.weight: got I32, expected one of F64, F32, BF16, F16\n"
    )


def test_memory_that_runs_out(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(generate_run, "load_sharded_model", load)
    assert main(["generate", "--checkpoint", str(trained), "--device", "cpu", "--prompt", "x"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("infuse: --device: got cpu, expected more memory: CUDA out of memory; --shards under")
