"""The command line, ``granq COMMAND``: what is said, and how it ends. Imports no torch."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial, wraps
from importlib.metadata import version
from typing import Annotated, Any, Union, cast

import tyro
from pydantic import ValidationError, validate_call

from granq.app import commands, jobs
from granq.errors import UserError

DESCRIPTION = "Zero-shot quantization, measured in the open. Every command takes --json: one JSON object as its output."


def parse(argv: Sequence[str]) -> Callable[[], dict[str, Any]]:
    """Return the command that ``argv`` asks for, ready to be called. Shows help and exits where that is asked for."""
    argv = [part for part in argv if part != "--json"]  # which main sees to
    if argv[:1] == ["quantize"]:
        return partial(jobs.execute, jobs.from_arguments(argv[1:]))
    every = {"quantize": _help_alone, **commands.COMMANDS}
    known = [Annotated[Any, tyro.conf.subcommand(name, constructor=_later(f))] for name, f in every.items()]
    say = partial(tyro.cli, cast(Any, Union)[tuple(known)], prog="granq", description=DESCRIPTION, args=argv)
    if argv[:1] != ["sweep"]:
        return say(config=jobs.MARKERS)
    call, rest = say(config=jobs.MARKERS, return_unknown_args=True)  # what it does not know is for granq quantize
    return partial(call, options=tuple(rest))


def _help_alone() -> None:
    """Quantize a teacher without its training data."""  # so that the list of commands has it


def _later(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return what binds the arguments of ``command``, which checks them when it is called."""

    @wraps(command)
    def bind(**options: Any) -> Callable[[], Any]:
        return partial(validate_call(command), **options)

    return bind


def sentence(error: Exception) -> str:
    """Return what was wrong, in one line: of pydantic's list the first, without type and address."""
    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        names = [str(part) for part in first["loc"] if str(part).isidentifier()]
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error" and names:
            text = f"{text.replace('Input', names[-1], 1)}, got {first['input']!r}"
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 0: done; 1: failed on the way; 2: bad input; 130: interrupted."""
    # Before torch starts its threads: waiting threads of GNU OpenMP keep their core busy for so long that next to other
    # work they hold up the one they wait for. A step then took 30 times as long; this way 3 times (docs/speed.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    warnings.formatwarning = lambda message, *_, **__: f"granq: warning: {message}\n"  # without a line of our source
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 still gets the result
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv == ["--version"]:
        print(version("granq"))
        return 0
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries tell there what they download
            result = parse(argv)()
    except (UserError, ValidationError) as error:
        print(f"granq: {sentence(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # no network, a full disk, a folder that may not be written
        print(f"granq: {type(error).__name__}: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("granq: interrupted; what was saved is kept; repeat it, with --resume if it has that", file=sys.stderr)
        return 130
    failed, said = result.pop("failed", ""), result.pop("said", "")
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in result.items()}
    lines = [f"{name}: {value}" for name, value in shown.items() if not isinstance(value, list)]  # tables are printed
    print(json.dumps(result) if as_json else "\n".join([*lines, said]).strip())
    if failed:
        print(f"granq: {failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
