"""The text: which files, which split, the same batches for the same seed, targets one token ahead."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from infuse.models.text import batches, byte_tokenizer, read_sources


def decode(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode().replace("\t", "    ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(12):
        (tmp_path / f"module{index:02}.py").write_text(f"def f{index}():\n    return {index}\n")
    (tmp_path / "notes.txt").write_text("not Python")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "installed.py").write_text("installed = True\n")
    return tmp_path


def test_every_tenth_source_is_held_out_and_packages_are_left_out(folder: Path) -> None:
    text = read_sources(folder)
    assert text.num_files == 12
    assert decode(text.validation) == "def f0():\n    return 0\ndef f10():\n    return 10\n"
    train = decode(text.train)
    assert train.startswith("def f1():\n    return 1\n") and "f10" not in train
    assert "installed" not in train and "not Python" not in train


def test_the_digest_names_the_text(folder: Path) -> None:
    first = read_sources(folder)
    assert read_sources(folder).digest == first.digest
    (folder / "module03.py").write_text("changed = True\n")
    assert read_sources(folder).digest != first.digest


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 0 \*\.py files"):
        read_sources(tmp_path)


@pytest.mark.parametrize(
    "written", ["", "x = 1", "if x:\n    if y:\n      z = '    '\n", "é\n", "a\r\n        b", "     c"]
)
def test_the_tokenizer_gives_the_bytes_that_the_sources_have(tmp_path: Path, written: str) -> None:
    pytest.importorskip("tokenizers")
    for name in ("held_out.py", "train.py"):
        (tmp_path / name).write_text(written, newline="")
    tokens = byte_tokenizer().encode(written).ids
    assert tokens == read_sources(tmp_path).train.tolist()
    assert byte_tokenizer().decode(tokens) == written


def test_every_byte_has_its_token() -> None:
    pytest.importorskip("tokenizers")
    everything = "".join(chr(code) for code in range(1, 0x800)) + "\U0001f600\uffff"
    assert byte_tokenizer().encode(everything).ids == list(everything.encode())


def test_indentation_takes_one_token_a_level() -> None:
    pytest.importorskip("tokenizers")
    assert byte_tokenizer().encode("        x").ids == [9, 9, ord("x")]


def test_batches_follow_from_the_seed_and_targets_are_the_next_tokens() -> None:
    data = torch.arange(200, dtype=torch.uint8)

    def first(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(itertools.islice(batches(data, batch_size=3, seq_len=16, seed=seed), 4))

    for (tokens, targets), (again, targets_again) in zip(first(7), first(7)):
        assert tokens.shape == targets.shape == (3, 16) and tokens.dtype == torch.int64
        assert torch.equal(tokens, again) and torch.equal(targets, targets_again)
        assert torch.equal(targets, tokens + 1)  # the data counts up
    assert not torch.equal(first(7)[0][0], first(8)[0][0])
    assert not torch.equal(first(7)[0][0], first(7)[1][0])


def test_every_window_can_be_drawn() -> None:
    data = torch.arange(6, dtype=torch.uint8)
    starts = {int(tokens[0, 0]) for tokens, _ in itertools.islice(batches(data, batch_size=1, seq_len=4, seed=0), 40)}
    assert starts == {0, 1}


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="got 16 bytes of text, expected more than seq_len=16"):
        batches(torch.zeros(16, dtype=torch.uint8), batch_size=1, seq_len=16, seed=0)
