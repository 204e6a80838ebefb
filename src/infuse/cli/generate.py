"""`infuse generate`: continues prompts with the decoder of a Hugging Face folder, token by token as they come."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from infuse.cli.arguments import Parser, UserError, check_settings, natural_number, positive_integer, require

COMPILERS = ("infuse", "inductor", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class GenerationFailed(Exception):
    """What went wrong, by no fault of the user's, after the text had begun."""


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        _run(arguments)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 2  # the first process of this machine got the same arguments, and says it
        raise
    except BrokenPipeError:  # whoever read the text has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except GenerationFailed as failure:
        print(f"infuse generate: FAILED: {failure}", file=sys.stderr)
        return 1
    return 0


def parser() -> Parser:
    """The command's options, which the demo gives as well."""
    made = Parser(
        prog="infuse generate",
        description="Continue a text with any Hugging Face Llama, Qwen2 or Mistral folder (config.json, "
        "tokenizer.json, safetensors). The text goes to the output as it comes, all else to the error output.",
        epilog="Over several processes: torchrun --nproc-per-node 4 -m infuse generate --shards 2 --tp 2 ...",
    )
    made.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="of config.json and weights")
    made.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="what to continue; - reads it from the input (less a newline at its end); may be repeated",
    )
    add = made.add_argument_group("text").add_argument
    add("--max-tokens", type=positive_integer, metavar="N", help="default: 256, or as many as the model has room for")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="0, the default, takes the likeliest token")
    add("--top-k", type=positive_integer, metavar="K", help="draw from the K likeliest (default: all)")
    add("--seed", type=natural_number, default=0, metavar="N", help="default: 0")
    add = made.add_argument_group("how it runs").add_argument
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="of weights and caches (default: auto, what config.json says)")
    add(
        "--compile",
        choices=COMPILERS,
        help="what the step of one token is compiled with; the prompt, which has another length each time, is not "
        "compiled (default: infuse on a GPU, eager on a CPU, where compiling takes longer than most texts)",
    )
    add("--mode", choices=MODES, help="of torch.compile (default: reduce-overhead on a GPU, default on a CPU)")
    add("--shards", type=positive_integer, default=1, metavar="N", help="parts of consecutive layers (default: 1)")
    add("--tp", type=positive_integer, default=1, metavar="N", help="processes that share each layer (default: 1)")
    return made


def _temperature(text: str) -> float:
    """For `type=` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 or a positive number")
    return value


def _run(arguments: argparse.Namespace) -> None:
    require("models", "torchtune", "safetensors", "tokenizers")
    check_settings()
    from infuse.cli import generate_request, generate_run

    generate_run.run(generate_request.check(arguments))
