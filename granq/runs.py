"""A run folder: claimed by one process, checkpointed after every epoch, read again whatever interrupted it.

``config.json`` says what the run is, ``checkpoint.pt`` and ``checkpoint.previous.pt`` hold its last two epochs,
``history.csv`` its rows. Nothing in it is ever executed: configurations are JSON, checkpoints load with
``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn

from granq.data import save_atomically, write_csv


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint, self.previous = self.path / "checkpoint.pt", self.path / "checkpoint.previous.pt"
        self.config = self.path / "config.json"

    def check_free(self, resume: bool = False) -> None:
        """Raise ValueError if a run started here would overwrite something, or if there is none to resume."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; --out takes a folder")
        found = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        begun = self.path.is_dir() and all(name == ".lock" or name.endswith(".tmp") for name in found)
        if begun:
            return  # killed before it had written anything: a start and a continuation are the same
        if resume and not self.config.is_file():
            raise ValueError(f"{self.path} holds no run to resume")
        if not resume and found:
            raise ValueError(f"{self.path} already holds files; choose another --out or pass --resume to continue it")

    def in_use(self) -> bool:
        """Whether a process holds the folder."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder; the system frees it when the process ends, however it ends.

        Raises:
            ValueError: another process holds it.
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with hold(self.path, self.path / ".lock"):
            for torn in self.path.glob("*.tmp"):  # of a process killed while writing
                torn.unlink()
            yield

    def write_config(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """``config.json``: the settings and the facts of the run, as data."""
        text = json.dumps({"config": config} | facts, indent=2)
        save_atomically(self.config, lambda path: path.write_text(text))

    def read_config(self) -> dict[str, Any]:
        """What ``write_config`` wrote. Raises ValueError if it is missing or damaged."""
        try:
            facts = json.loads(self.config.read_text())
            facts["config"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config} is missing or damaged ({error}); the run cannot be read") from error
        return facts

    def save(self, state: dict[str, Any], rows: list[dict[str, float]]) -> None:
        """Replace checkpoint and history; the checkpoint before stays as ``checkpoint.previous.pt``."""
        temporary = self.path / "checkpoint.new.tmp"
        kept = "the checkpoint before is kept" if self.checkpoint.exists() else "there is no checkpoint yet"
        try:
            write_checkpoint(temporary, state)  # complete and on disk before anything is moved
            if self.checkpoint.exists():
                os.replace(self.checkpoint, self.previous)
            os.replace(temporary, self.checkpoint)
            write_csv(self.path / "history.csv", pd.DataFrame(rows))
        except OSError as error:
            raise OSError(f"cannot write to {self.path} ({error}); {kept}") from error

    def load(self, fingerprint: str | None = None, device: str = "cpu") -> dict[str, Any] | None:
        """The newest whole checkpoint, or None if no epoch was finished.

        Every record of the file carries a checksum; a torn or foreign file is passed over with a warning.

        Args:
            fingerprint: what the run must belong to; ``None`` accepts any.
            device: where tensors go.

        Raises:
            ValueError: there are checkpoints, and none of them can be used.
        """
        reasons = []
        for path in (self.checkpoint, self.previous):
            if not path.is_file():
                continue
            try:
                state = read_checkpoint(path, {"epoch", "student", "rows"}, device)
                if fingerprint and state.get("fingerprint") != fingerprint:
                    raise ValueError("it belongs to another teacher or other settings")
            except ValueError as error:
                reasons.append(f"{path.name}: {error}")
                continue
            if reasons:
                warnings.warn(f"{self.path}: continuing from {path.name} ({reasons[0]})", stacklevel=2)
            return state
        if reasons:
            raise ValueError(f"{self.path} has no usable checkpoint ({'; '.join(reasons)})")
        return None


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


def fingerprint(config: dict[str, Any], *networks: nn.Module) -> str:
    """SHA-256 of settings and weights (teacher, generator): two runs that share it are the same run."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in (item for network in networks for item in network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
