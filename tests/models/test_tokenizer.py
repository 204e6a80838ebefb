"""tokenizer.json and the tokens that end a text, from a folder; text that comes in whole characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infuse.models.tokenizer import TextStream, load_stop_tokens, load_tokenizer


def bytes_tokenizer() -> Tokenizer:
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_saved_tokenizer_is_read(tmp_path: Path) -> None:
    bytes_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a word").ids) == "a word"


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = bytes_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode("aé€b").ids]
    assert pieces == ["a", "", "é", "", "", "€", "b"] and stream.finish() == ""
    for token in tokenizer.encode("€").ids[:2]:
        assert stream.add(token) == ""
    assert "�" in stream.finish() and stream.finish() == ""


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [3, 4]}, {"eos_token_id": 2}, (3, 4)), ({}, {"eos_token_id": 2}, (2,)), (None, {}, ())],
)
def test_stop_tokens_come_from_either_file(
    tmp_path: Path, generation: dict[str, object] | None, config: dict[str, object], expected: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_stop_tokens(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_wrong_stop_tokens_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_stop_tokens(tmp_path)
