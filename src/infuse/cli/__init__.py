"""The command line: `python -m infuse COMMAND ...`, one module a command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from infuse.cli.arguments import Parser, UserError

# Name, module with a `main(argv) -> exit code`, what it does.
COMMANDS = (
    ("demo", "infuse.cli.demo", "rewrite, train and run a Llama with and without Infuse, on a CPU or a GPU"),
    ("generate", "infuse.cli.generate", "continue a text with a Hugging Face Llama, Qwen2 or Mistral folder"),
    ("explain", "infuse.cli.explain", "show what is rewritten in a model, and what not and why"),
    ("lock", "infuse.cli.lock", "compare what is rewritten in a model with a lock file"),
    ("doctor", "infuse.cli.doctor", "check the installation: torch, compilers, GPU, kernels, settings"),
    ("build", "infuse.build", "compile the CUDA kernels with nvcc"),
    ("bench", "infuse.cli.bench", "run the benchmarks of a checkout"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 when it failed, 2 for a user's mistake, 130 when interrupted."""
    try:
        name, rest = _parse(argv)
        module = next(module for command, module, _ in COMMANDS if command == name)
        code: int = importlib.import_module(module).main(rest)
        return code
    except UserError as error:
        print(f"infuse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infuse: interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> tuple[str, list[str]]:
    width = max(len(command) for command, _, _ in COMMANDS)
    listing = "\n".join(f"  {command:<{width}}  {summary}" for command, _, summary in COMMANDS)
    parser = Parser(
        prog="infuse",
        usage="infuse [--version] COMMAND ...",
        description="Fused attention, RMSNorm and SwiGLU for any model that torch.compile can capture.",
        epilog=f"commands:\n{listing}\n\n`infuse COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    names = [command for command, _, _ in COMMANDS]
    if arguments.command not in names:
        raise UserError(f"command: got {arguments.command or 'none'}, expected one of {', '.join(names)}")
    return arguments.command, arguments.rest


def _version() -> str:
    from infuse.version import __version__

    return f"infuse {__version__}"
