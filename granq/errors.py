"""What a user got wrong, in one sentence."""

from collections.abc import Iterable
from importlib.util import find_spec


class UserError(ValueError):
    """Wrong input. The command line prints its sentence and exits with code 2; every other error is a bug."""


def one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Raise UserError unless ``value`` is one of the ``known`` names of a ``what``."""
    if value not in (names := list(known)):
        raise UserError(f"unknown {what} {value!r}; known: {', '.join(names)}")


def require(module: str, extra: str) -> None:
    """Raise UserError that names the command, unless ``module`` is installed, which comes with an extra of granq."""
    if find_spec(module) is None:
        raise UserError(f"{module} is not installed; this installs it: pip install 'granq[{extra}]'")
