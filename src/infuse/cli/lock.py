"""`infuse lock`: compares what Infuse does in a model with the lock file, or writes it there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infuse.cli.arguments import Parser, UserError, check_settings
from infuse.cli.explain import explained, load


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="infuse lock", description="Compare what Infuse does in a model with a lock file.")
    parser.add_argument("model", metavar="MODEL", help="as for `infuse explain`; also the name in the lock file")
    parser.add_argument("--training", action="store_true", help="as in training: training mode, with gradients")
    parser.add_argument("--path", type=Path, default=Path("infuse.lock"), metavar="FILE", help="default: infuse.lock")
    parser.add_argument("--update", action="store_true", help="write to the lock file instead of comparing")
    arguments = parser.parse_args(argv)
    check_settings()
    model, args = load(arguments.model)
    report = explained(arguments.model, model, args, arguments.training)
    from infuse.lock import LockError, compare

    try:
        compare(
            report, arguments.model + (" (training)" if arguments.training else ""), arguments.path, arguments.update
        )
    except LockError as error:
        print(error)
        return 1
    except ValueError as error:
        raise UserError(str(error).removeprefix("infuse: ")) from error
    print(f"{arguments.path}: {'written' if arguments.update else 'unchanged'}: {report.summary()}")
    return 0
