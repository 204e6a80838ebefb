"""Settings: where they come from, which wins, and what a wrong one says."""

from __future__ import annotations

import dataclasses

import pytest

from infuse.settings import PATTERNS, Settings, override, resolve, split_options


def test_options_win_over_contexts_and_contexts_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_KERNELS", "never")
    assert resolve().kernels == "never"
    with override(kernels="always"):
        assert resolve().kernels == "always"
        with override(numerics="exact"):
            assert resolve({"kernels": "auto"}) == Settings(kernels="auto", numerics="exact")
    assert resolve().kernels == "never"


def test_the_environment_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_STRICT", "1")
    monkeypatch.setenv("INFUSE_PATTERNS", "swiglu, attention")
    assert resolve() == Settings(patterns=("attention", "swiglu"), strict=True)


def test_settings_are_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().strict = True  # type: ignore[misc]
    assert hash(Settings()) == hash(Settings(patterns=PATTERNS))


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"kernel": "auto"}, ValueError, ["'kernel'", "'kernels'", "'patterns'"]),
        ({"kernels": "sometimes"}, ValueError, ["'sometimes'", "'auto'", "'always'", "'never'"]),
        ({"mlp_memory": "all"}, ValueError, ["'all'", "'gate_up'", "'recompute'"]),
        ({"patterns": ["attn"]}, ValueError, ["attn", "'attention'", "'swiglu'"]),
        ({"patterns": 3}, TypeError, ["3", "list of names"]),
        ({"strict": "maybe"}, ValueError, ["'maybe'", "'true'"]),
        ({"strict": 2}, TypeError, ["2", "True or False"]),
    ],
)
def test_a_wrong_setting_names_what_was_got_and_expected(
    values: dict[str, object], kind: type, words: list[str]
) -> None:
    with pytest.raises(kind) as raised:
        resolve(values)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_STRICT", "perhaps")
    with pytest.raises(ValueError, match="INFUSE_STRICT: strict: got 'perhaps'"):
        resolve()


def test_options_are_parted() -> None:
    assert split_options({"infuse.strict": True, "epilogue_fusion": False}) == (
        {"strict": True},
        {"epilogue_fusion": False},
    )
