"""What is said while loading and compiling: a bar in a terminal, a plain line elsewhere, never on the output."""

from __future__ import annotations

import io
import re
import sys

import pytest

from infuse.cli.generate_progress import counting, note, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("loading", 3_000_000_000) as advance:
        advance(3_000_000_000)
    with waiting("compiling"):
        pass
    note("done")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"loading: 3\.00 GB in \d\.\d s\ncompiling: \d\.\d s\ndone\n", err)


def test_in_a_terminal_there_is_a_bar_that_goes_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with counting("loading", 3_000_000) as advance:
        advance(1_500_000)
    with waiting("compiling"):
        pass
    shown = terminal.getvalue()
    assert "1.5/3.0 MB" in shown and "━" in shown and "compiling" in shown
    assert re.search(r"loading: 0\.00 GB in \d\.\d s\n", shown) and shown.endswith(" s\n")
    assert capsys.readouterr().out == ""
