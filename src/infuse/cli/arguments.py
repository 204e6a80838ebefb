"""What the commands share: arguments that answer mistakes in one line, and the optional packages they need."""

from __future__ import annotations

import argparse
import importlib.util
from typing import NoReturn


class UserError(Exception):
    """A mistake in what the user gave: one line, "what: got ..., expected ...", exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")


def positive_integer(text: str) -> int:
    """For `type=` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def natural_number(text: str) -> int:
    """For `type=` of an argument: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 or a positive integer")
    return int(text)


def require(extra: str, *modules: str) -> None:
    """Raises UserError, with the command that helps, unless these modules of an optional extra are installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        found = f"got no {', '.join(missing)}"
        raise UserError(f"{found}, expected the optional extra {extra!r}: pip install 'infuse[{extra}]'")


def check_settings() -> None:
    """Raises UserError when the environment holds a setting that Infuse doesn't know."""
    from infuse.settings import resolve

    try:
        resolve()
    except (ValueError, TypeError) as error:
        raise UserError(str(error).removeprefix("infuse: ")) from error
