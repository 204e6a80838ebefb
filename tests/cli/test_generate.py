"""`infuse generate` end to end: the text is transformers' own, whatever compiles it and however it is cut in shards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("torchtune")
pytest.importorskip("transformers")

from infuse.cli import generate_request, generate_run, main
from infuse.models.checkpoint import load_sharded_model
from infuse.models.extras import import_extra
from infuse.models.parallel import launch
from infuse.models.parallel.heartbeat import PeerLostError
from infuse.models.shard import split_layers
from infuse.models.sharded import ShardChain
from infuse.models.writing import Engine
from tests.models.hugging_face import make_model, save_model
from tests.models.trained import SCALE, save_trained

PROMPTS = ["class Queue:\n    def __init__(self", "import os"]
TOKENS = 40
CPU = ("--device", "cpu")


@pytest.fixture(scope="session")
def expected(trained: Path) -> list[str]:
    """What transformers' own greedy generation writes after each prompt."""
    transformers = import_extra("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(trained)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
        tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        texts.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
    return texts


Write = Callable[..., tuple[str, str]]


@pytest.fixture
def write(trained: Path, capsys: pytest.CaptureFixture[str]) -> Write:
    """Runs the command and returns what it wrote to the output and to the error output."""

    def run(*options: str, folder: Path = trained, prompts: list[str] = PROMPTS[:1]) -> tuple[str, str]:
        asked = [word for prompt in prompts for word in ("--prompt", prompt)]
        limit = [] if "--max-tokens" in options else ["--max-tokens", str(TOKENS)]
        assert main(["generate", "--checkpoint", str(folder), "--device", "cpu", *limit, *asked, *options]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_the_checkpoint_has_learned_something(tmp_path: Path) -> None:
    first, last = save_trained(tmp_path, steps=20)
    assert first == pytest.approx(SCALE, rel=0.05) and last < 0.9 * first


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_text_is_that_of_transformers(write: Write, expected: list[str], shards: int) -> None:
    out, err = write("--shards", str(shards), prompts=PROMPTS)
    assert out == "".join(text + "\n" for text in expected) and len(set(expected[0])) > 5
    lines = err.splitlines()
    assert re.fullmatch(r"loading: 0\.00 GB in \d+\.\d s", lines[0]) and lines[1].startswith("warming up: ")
    assert [re.sub(r"\d+\.\d+", "N", line) for line in lines[2:]] == [
        "prompt of 19 tokens; first token after N s; 39 more at N tokens/s",
        "prompt of 6 tokens; first token after N s; 39 more at N tokens/s",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["infuse", "inductor"])
def test_compiled_it_writes_the_same(write: Write, expected: list[str], backend: str) -> None:
    out, err = write("--compile", backend, prompts=PROMPTS)
    assert out == "".join(text + "\n" for text in expected)
    assert f"compiling with {backend}, mode default: " in err
    # Once, for both prompts: counts would be a multiple of these.
    once = "rewritten: add_rms_norm 6, attention 3, rms_norm 1, rope 6, swiglu 3\n"
    assert (once in err) == (backend == "infuse")


def test_every_shard_is_compiled_once_and_prompts_are_not(
    write: Write, monkeypatch: pytest.MonkeyPatch, expected: list[str]
) -> None:
    shapes = []

    def spy(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes = [node.meta["example_value"].shape for node in graph.graph.find_nodes(op="placeholder")]
        shapes.append([list(size) for size in sizes if len(size) > 1 and size[:2] == (1, 1)])
        return graph.forward

    def compile_decoder(request: object, decoder: torch.nn.Module) -> None:
        decoder.compile(backend=spy, dynamic=False, fullgraph=True)

    monkeypatch.setattr(generate_run, "compile_decoder", compile_decoder)
    out, _ = write("--shards", "3", prompts=PROMPTS)
    assert out == "".join(text + "\n" for text in expected)
    # The token or hidden state, the mask over caches of a round length, the position.
    assert [sorted(map(len, each)) for each in shapes] == [[2, 2, 3], [2, 3, 3], [2, 3, 3]]
    assert all([1, 1, 128] in each for each in shapes)


@pytest.mark.parametrize("family", ["llama3_scaled", "qwen2_tied", "mistral_window"])
def test_other_families_write_what_transformers_writes(write: Write, tmp_path: Path, family: str) -> None:
    """Stop tokens included: theirs is 2, and may come."""
    model: Any = make_model(family)
    save_model(model, tmp_path)
    tokenizers = import_extra("tokenizers")
    letters = {
        letter: index for index, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:64])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = torch.tensor([tokenizer.encode("HELLO").ids])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
    ids = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, 5:].tolist()
    expected = tokenizer.decode(ids[: ids.index(2)] if 2 in ids else ids)
    assert len(ids) > 5 and write("--shards", "2", folder=tmp_path, prompts=["HELLO"])[0] == expected + "\n"


def test_drawn_text_follows_from_the_seed(write: Write) -> None:
    options = ("--temperature", "1.5", "--top-k", "20")
    texts = [write(*options, "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_may_come_from_the_input(write: Write, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[1] + "\n"))
    assert write(prompts=["-"])[0] == expected[1] + "\n"


def test_a_stop_token_ends_the_text(write: Write, trained: Path, expected: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    tokenizer = import_extra("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(expected[0]).ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[8]]}))
    out, err = write(folder=folder)
    assert out == tokenizer.decode(ids[: ids.index(ids[8])]) + "\n"
    assert f"; {ids.index(ids[8])} more at " in err


def test_one_token_and_as_many_as_fit(write: Write, expected: list[str]) -> None:
    out, err = write("--max-tokens", "1")
    assert expected[0].startswith(out[:-1]) and "more" not in err
    _, err = write("--max-tokens", "110")  # 19 + 110 - 1 = 128, max_position_embeddings
    assert "109 more at" in err


def test_weights_and_caches_take_the_dtype(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = set()
    warm_up = generate_run.warm_up

    def look(request: generate_request.Request, engine: Engine) -> None:
        warm_up(request, engine)
        for name, tensor in [*engine.models[0].named_parameters(), *engine.models[0].named_buffers()]:
            if name.endswith(("weight", "scale", "k_cache", "v_cache")):
                dtypes.add(tensor.dtype)

    monkeypatch.setattr(generate_run, "warm_up", look)
    write("--dtype", "bfloat16", "--max-tokens", "3")
    assert dtypes == {torch.bfloat16}


def test_under_torchrun_the_engine_of_all_processes_writes_and_the_first_one_prints(
    write: Write, trained: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def open_engine(folder: Path, **options: Any) -> Iterator[ShardChain]:
        asked.append(options)
        limit = options["max_generated_tokens"]
        yield ShardChain(
            [load_sharded_model(folder, each, max_generated_tokens=limit) for each in split_layers("m", 3, 2)]
        )

    monkeypatch.setattr(launch, "open_engine", open_engine)
    for rank, text in (("0", expected[0] + "\n"), ("1", "")):
        for name, value in {"WORLD_SIZE": "4", "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(name, value)
        out, err = write("--shards", "2", "--tp", "2")
        assert out == text and ("tokens/s" in err) == (rank == "0") and (err != "") == (rank == "0")
    assert (asked[0]["num_shards"], asked[0]["tensor_parallel"], asked[0]["device"].type) == (2, 2, "cpu")


def test_text_comes_token_by_token(trained: Path, monkeypatch: pytest.MonkeyPatch, expected: list[str]) -> None:
    class Output(io.StringIO):
        shown: ClassVar[list[str]] = []

        def flush(self) -> None:
            self.shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Output())
    assert (
        main(["generate", "--checkpoint", str(trained), "--prompt", PROMPTS[0], *CPU, "--max-tokens", str(TOKENS)]) == 0
    )
    assert len(Output.shown) > TOKENS / 2 and Output.shown[-1] == expected[0] + "\n"
    assert all(expected[0].startswith(text) for text in Output.shown[:-1])


def test_a_reader_may_leave(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:  # noqa: PTH123  (a descriptor)
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["generate", "--checkpoint", str(trained), "--prompt", PROMPTS[0], *CPU, "--max-tokens", "5"]) == 1
    assert "Error" not in capsys.readouterr().err


def test_a_lost_process_is_one_line_and_exit_code_1(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(request: object, engine: object) -> None:
        raise PeerLostError("rank 0 ends: layers 1-2, process 7 on host is gone")

    monkeypatch.setattr(generate_run, "warm_up", lose)
    assert main(["generate", "--checkpoint", str(trained), "--device", "cpu", "--prompt", "x"]) == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        "infuse generate: FAILED: rank 0 ends: layers 1-2, process 7 on host is gone"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [(), ("--shards", "3"), ("--shards", "2", "--compile", "inductor")], ids=str)
def test_cuda_graphs_of_every_shard_write_the_same(
    trained: Path, expected: list[str], capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["generate", "--checkpoint", str(trained), "--max-tokens", str(TOKENS), *asked, *options]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in expected) and "mode reduce-overhead" in err
