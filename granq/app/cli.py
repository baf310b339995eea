"""The command line, ``granq COMMAND``: what is said, and how it ends. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial, wraps
from typing import Annotated, Any, Union

import tyro
from pydantic import ValidationError, validate_call

from granq.app import commands, jobs
from granq.errors import UserError

DESCRIPTION = "Zero-shot quantization, measured in the open. Every command takes --json: one JSON object as its output."


def parse(argv: Sequence[str]) -> Callable[[], dict[str, Any]]:
    """Return the command that ``argv`` asks for, ready to be called. Shows help and exits where that is asked for."""
    argv = [part for part in argv if part != "--json"]  # which main sees to
    quantize = jobs.options(argv[1:] if argv[:1] == ["quantize"] else [])
    quantize.__doc__ = "Quantize a teacher without its training data."
    constructors = {"quantize": quantize} | {name: _later(command) for name, command in commands.COMMANDS.items()}
    known = tuple(Annotated[Any, tyro.conf.subcommand(k, constructor=v)] for k, v in constructors.items())
    union = Union[known]  # noqa: UP007 (made at run time)
    say = partial(tyro.cli, union, prog="granq", description=DESCRIPTION, args=argv, config=jobs.MARKERS)
    if argv[:1] == ["sweep"]:  # what it does not know is for granq quantize
        call, rest = say(return_unknown_args=True)
        return partial(call, options=tuple(rest))
    chosen = say()
    return jobs.checked(chosen).run if isinstance(chosen, quantize) else chosen


def _later(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return what binds the arguments of ``command``, which checks them when it is called."""

    @wraps(command)
    def bind(*args: Any, **options: Any) -> Callable[[], Any]:
        return partial(validate_call(command), *args, **options)

    return bind


def sentence(error: UserError | ValidationError) -> str:
    """Return what was wrong, in one line: of pydantic's list the first, without type and address."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if str(part).isidentifier()]
    if first["type"] == "value_error" or not names:
        return " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{first['msg'].replace('Input', names[-1], 1)}, got {first['input']!r}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 0: done; 1: failed on the way; 2: bad input; 130: interrupted."""
    # Before torch starts its threads: waiting threads of GNU OpenMP keep their core busy for so long that next to other
    # work they hold up the one they wait for. A step then took 30 times as long; this way 3 times (docs/speed.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries tell there what they download
            result = parse(argv)()
    except (UserError, ValidationError) as error:
        print(f"granq: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("granq: interrupted; the last checkpoint is kept, --resume continues", file=sys.stderr)
        return 130
    failed = result.pop("failed", "")
    print(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    if failed:
        print(f"granq: {failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
