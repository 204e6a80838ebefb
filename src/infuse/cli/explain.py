"""`infuse explain`: the report of a known model or of a user's own, on fake tensors: nothing is computed."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infuse.cli.arguments import Parser, UserError, check_settings, require

if TYPE_CHECKING:
    from infuse.report import Report

STANDARD_OUTPUT = Path("-")
Target = tuple[Any, tuple[Any, ...]]  # a model and its example arguments


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="infuse explain", description="Show what Infuse rewrites in a model, and what not and why.")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="torchtune-llama3, hf-llama, or FILE.py:NAME where NAME is a function that returns "
        "a model and a tuple of example arguments",
    )
    parser.add_argument("--training", action="store_true", help="as in training: training mode, with gradients")
    parser.add_argument("--device", default="cpu", help="where the known models are: cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE as well; - is the output")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="likewise, as a table in Markdown")
    arguments = parser.parse_args(argv)
    if arguments.device not in ("cpu", "cuda"):
        raise UserError(f"--device: got {arguments.device!r}, expected cpu or cuda")
    forms = {"--json": arguments.json, "--markdown": arguments.markdown}
    for option, path in forms.items():
        if path and not path.resolve().parent.is_dir():
            raise UserError(f"{option}: got {path}, expected a file in a folder that exists")
    check_settings()
    model, args = load(arguments.model, arguments.device)
    report = explained(arguments.model, model, args, arguments.training)
    if STANDARD_OUTPUT not in forms.values():
        report.print()
    for option, path in forms.items():
        _write(report.to_json() if option == "--json" else report.to_markdown(), path)
    return 0


def _write(text: str, path: Path | None) -> None:
    if path == STANDARD_OUTPUT:
        print(text)
    elif path:
        path.write_text(text + "\n", encoding="utf-8")


def load(name: str, device: str = "cpu") -> Target:
    """The model of that name with example arguments. Raises UserError when there is none."""
    known: dict[str, Callable[[str], Target]] = {"torchtune-llama3": torchtune_llama3, "hf-llama": hugging_face_llama}
    if name in known:
        return known[name](device)
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function:
        raise UserError(f"model: got {name!r}, expected {', '.join(known)} or FILE.py:NAME")
    return _from_file(Path(path), function)


def torchtune_llama3(device: str) -> Target:
    require("models", "torchtune")
    from infuse.models import llama

    return _with_tokens(llama.torchtune_llama3(llama.SMALL), device)


def hugging_face_llama(device: str) -> Target:
    require("models", "transformers")
    from infuse.models import llama

    return _with_tokens(llama.hugging_face_llama(llama.SMALL), device)


def _with_tokens(model: Any, device: str) -> Target:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: got cuda, expected a GPU that torch {torch.__version__} can use")
    return model.to(device), (torch.zeros(2, 128, dtype=torch.int64, device=device),)


def _from_file(path: Path, name: str) -> Target:
    if not path.is_file():
        raise UserError(f"model: got {path}, expected a Python file")
    spec = importlib.util.spec_from_file_location(f"explained_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles in it look their module up
    sys.path.insert(0, str(path.resolve().parent))  # what `python FILE.py` would find beside it
    try:
        _blame(path, spec.loader.exec_module, module)
        factory = getattr(module, name, None)
        if not callable(factory):
            got = "nothing of that name" if factory is None else f"{name} = {factory!r}"
            raise UserError(f"{path}:{name}: got {got}, expected a function that returns a model and its arguments")
        result = _blame(path, factory)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not (
        isinstance(result, tuple) and len(result) == 2 and callable(result[0]) and isinstance(result[1], (tuple, list))
    ):
        raise UserError(f"{path}:{name}(): got {_shape(result)}, expected (model, (argument, ...))")
    return result[0], tuple(result[1])


def explained(name: str, model: Any, args: tuple[Any, ...], training: bool) -> Report:
    """The report; what the user's model raises becomes one line."""
    from infuse.inspection import explain
    from infuse.report import StrictError

    try:
        return explain(model, *args, training=training)
    except StrictError as error:
        raise UserError(str(error)) from error
    except Exception as error:  # whatever the user's model raises while it is traced
        raise UserError(f"{name}: tracing it raised {_first_line(error)}") from error


def _blame(path: Path, call: Callable[..., Any], *args: Any) -> Any:
    """Calls the user's code; what it raises becomes one line with the place in their file."""
    try:
        return call(*args)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        number = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        place = f"{path}:{number}" if number else str(path)
        raise UserError(f"{place}: raised {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _shape(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
