"""Whole models: the cases' own code is right, and what is recorded beside the time is what it says."""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import costs
import harness
import models
import pytest
import torch
from command import main
from decode_cases import decode
from device import describe_device
from gpt_fast import Transformer
from harness import Case, Options, Session, load
from implementations import Impl, compiled
from model_shapes import TINY
from model_sources import GPT_FAST, HUGGING_FACE_SDPA, TORCHTUNE_LLAMA, Model, Source
from prefill_cases import prefill
from torch import Tensor, nn
from training_cases import Step, train

DEVICE = describe_device("cpu")


def gpt_fast_weights(torchtune: nn.Module) -> dict[str, Tensor]:
    """The weights of a torchtune Llama under the names of the gpt-fast style."""
    found = torchtune.state_dict()
    names = {"attention_norm": "sa_norm.scale", "mlp_norm": "mlp_norm.scale", "wo": "attn.output_proj.weight"}
    names |= {f"w{number}": f"mlp.w{number}.weight" for number in (1, 2, 3)}
    weights = {
        "embedding": found["tok_embeddings.weight"],
        "norm": found["norm.scale"],
        "output": found["output.weight"],
    }
    for layer in range(TINY.layers):
        weights |= {f"layers.{layer}.{own}": found[f"layers.{layer}.{other}"] for own, other in names.items()}
        parts = [found[f"layers.{layer}.attn.{name}_proj.weight"] for name in "qkv"]
        weights[f"layers.{layer}.wqkv"] = torch.cat(parts)
    return {f"{name}.weight": weight for name, weight in weights.items()}


def test_gpt_fast_style_is_the_same_llama() -> None:
    torchtune = Model(TORCHTUNE_LLAMA, TINY, DEVICE, 16)
    same = Transformer(TINY, 16)
    same.load_state_dict(gpt_fast_weights(torchtune.get()), strict=False)
    tokens = torch.randint(TINY.vocab_size, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(same(tokens, torch.arange(16)), torchtune.logits()(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", [TORCHTUNE_LLAMA, GPT_FAST, HUGGING_FACE_SDPA], ids=lambda source: source.name)
def test_steps_into_the_cache_give_the_logits_of_the_whole_sequence(source: Source) -> None:
    length = 8
    torch.manual_seed(0)
    plain = Model(source, TINY, DEVICE, length)
    cached = Model(source, TINY, DEVICE, length, cache_batch=2)
    inner = getattr(cached.get(), "model", cached.get())
    inner.load_state_dict(plain.get().state_dict(), strict=False)
    tokens = torch.randint(TINY.vocab_size, (2, length))
    with torch.no_grad():
        whole = plain.logits()(tokens)
        for position in range(length):
            cached.rewind(position)
            step = cached.step()(*source.step_inputs(tokens[:, position : position + 1], length, position))
            assert isinstance(step, Tensor) and isinstance(whole, Tensor)
            torch.testing.assert_close(step[:, 0], whole[:, position], rtol=1e-4, atol=1e-5)


def test_quick_cases_of_decoders_are_right_in_eager(tmp_path: Path) -> None:
    chosen = ["--impl", "^eager$", "--cases", "llama"]
    arguments = ["--quick", "--device", "cpu", "--output", str(tmp_path), *chosen]
    assert main("models", "", models.cases, arguments) == 0
    rows = [row for row in load(tmp_path / DEVICE.name / "models.jsonl") if not row.case.startswith("ceiling")]
    assert [row.case for row in rows] == [case.name for case in models.small_cases(DEVICE, quick=True)]
    assert all(row.compile_s is None and row.saved_bytes is None for row in rows)


def test_cases_on_a_gpu_have_names_of_their_own() -> None:
    names = [case.name for case in models.cases(dataclasses.replace(DEVICE, type="cuda"), quick=False)]
    assert len(names) == len(set(names))
    assert {name for name in names if "decode, batch 64," in name}


def cold_case(impls: list[Impl]) -> Case:
    return Case(
        name="double 64x64",
        inputs=lambda g: (torch.randn(64, 64, generator=g),),
        eager=double,
        reference=double,
        impls=impls,
        bytes=2 * 64 * 64 * 4,
        flops=64 * 64,
        dtype=torch.float32,
        cold=True,
    )


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_cold_cases_record_compile_time_and_each_starts_with_empty_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    def watched(impl: Impl) -> Impl:
        def prepare() -> Callable[..., Any]:
            folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            assert not list(Path(folders[-1]).iterdir())
            return impl.prepare()

        return dataclasses.replace(impl, prepare=prepare)

    warmed: list[torch.device] = []
    monkeypatch.setattr(costs, "warm_up_compiler", warmed.append)
    impls = [watched(compiled(double, name, backend="eager")) for name in ("compile", "compile-again")]
    session = Session("double", Options(output=None, quick=True), DEVICE)
    rows = session.measure(cold_case([*impls, Impl("eager", lambda: double)]))
    assert len(set(folders)) == 2
    assert len(warmed) == 1
    seconds = [row.compile_s for row in rows]
    assert seconds[0] is not None and 0 < seconds[0] < 60
    assert seconds[1] is not None and seconds[2] is None
    assert all(harness.Row.from_json(row.to_json()) == row for row in rows)


def test_training_step_returns_loss_and_gradients_of_its_own_call() -> None:
    model = Model(TORCHTUNE_LLAMA, TINY, DEVICE, 8)
    tokens, targets = torch.randint(TINY.vocab_size, (2, 1, 8))
    step = Step(model.loss(), model.get())
    first, again = step(tokens, targets), step(tokens, targets)
    assert first[0].shape == ()
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("kind", ["decode", "prefill", "train"])
def test_a_case_that_is_done_holds_no_model(kind: str) -> None:
    model = Model(TORCHTUNE_LLAMA, TINY, DEVICE, 8, cache_batch=int(kind == "decode"))
    case = {
        "decode": lambda: decode(model, ()),
        "prefill": lambda: prefill(model, 8, ()),
        "train": lambda: train(model, 8, ()),
    }[kind]()
    case.reset()
    case.impls[0].prepare()(*case.inputs(torch.Generator().manual_seed(0)))
    alive = weakref.ref(model.get())
    case.release()
    gc.collect()
    assert alive() is None
