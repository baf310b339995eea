"""Files that are whole or not there, and that can do no harm when they are read."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pandas as pd


def save_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, sync, then rename: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes never share it
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would keep a full disk full


def write_csv(path: Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """``table`` as CSV, replaced atomically; text that a spreadsheet would take for a formula gets a quote in front."""
    table = table.copy()
    for name in table.select_dtypes(include=["object", "string"]):
        column = table[name]
        formula = column.map(lambda v: isinstance(v, str) and v.startswith(("=", "+", "-", "@", "\t", "\r")))
        table[name] = column.where(~formula.astype(bool), "'" + column.astype(str))
    save_atomically(path, lambda p: table.to_csv(p, index=False, float_format=float_format))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write what ``read_checkpoint`` reads, atomically. Raises OSError if it cannot be written."""
    whole = io.BytesIO()  # torch itself would report a full disk as an internal error of its zip writer
    torch.save(state, whole)
    save_atomically(path, lambda temporary: temporary.write_bytes(whole.getbuffer()))


def read_checkpoint(path: Path, keys: Set[str], device: str = "cpu") -> dict[str, Any]:
    """Tensors and plain values from ``path``. Raises ValueError unless it is whole, harmless and has ``keys``."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"damaged at {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it holds something else than tensors and numbers, and was not opened") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"not a whole file ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not keys <= state.keys():
        raise ValueError("not a checkpoint of this program")
    return state


@contextmanager
def hold(path: Path, lock: Path) -> Iterator[None]:
    """Keep other processes from writing ``path``. Raises ValueError if one does already."""
    held = FileLock(lock)
    try:
        held.acquire(timeout=1)  # not 0: ``in_use`` holds it for an instant
    except Timeout:
        raise ValueError(f"{path} is in use by another process; wait for it or choose another --out") from None
    try:
        yield
    finally:
        held.release()
