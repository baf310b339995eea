"""Files that are whole or not there, and that can do no harm when they are read."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from granq.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def save_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write next to ``path``, then rename: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes never share it
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would keep a full disk full


def to_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON: numbers and arrays of numpy and torch as numbers, paths as text."""
    return json.dumps(value, indent=indent, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))


def write_csv(path: Path, table: "pd.DataFrame", float_format: str | None = None) -> None:
    """Write ``table`` as CSV, atomically."""
    save_atomically(path, lambda temporary: table.to_csv(temporary, index=False, float_format=float_format))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write what ``read_checkpoint`` reads, atomically."""
    whole = io.BytesIO()  # torch itself would report a full disk as an internal error of its zip writer
    torch.save(state, whole)
    save_atomically(path, lambda temporary: temporary.write_bytes(whole.getbuffer()))


def read_checkpoint(path: Path, keys: Set[str], device: str = "cpu") -> dict[str, Any]:
    """Read tensors and plain values from ``path``. Raises UserError unless it is whole, harmless and has ``keys``."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # checksums: torch itself reads a flipped bit without a word
                raise UserError(f"{path} is damaged at {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something else than tensors and numbers, and was not opened") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole file ({error})") from None
    if not isinstance(state, dict) or not keys <= state.keys():
        raise UserError(f"{path} is no checkpoint of this program")
    return state


@contextmanager
def hold(path: Path, lock: Path) -> Iterator[None]:
    """Keep other processes from writing ``path`` until the block or this process ends. Raises UserError if one does."""
    try:
        held = FileLock(lock).acquire(timeout=1)  # not 0: ``in_use`` holds it for an instant
    except Timeout:
        raise UserError(f"{path} is in use by another process; wait for it or choose another --out") from None
    with held:
        yield


def in_use(lock: Path) -> bool:
    """Say whether a process holds ``lock``."""
    try:
        with FileLock(lock, timeout=0) if lock.exists() else nullcontext():
            return False
    except Timeout:
        return True
