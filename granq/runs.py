"""A run folder: claimed by one process, checkpointed after every epoch, read again whatever interrupted it.

``config.json`` says what the run is, ``checkpoint.pt`` and ``checkpoint.previous.pt`` hold its last two epochs,
``history.csv`` its rows. Nothing in it is ever executed: configurations are JSON, checkpoints load with
``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import fx, nn

from granq.checks import typed
from granq.config import QATConfig
from granq.convert import freeze_ranges
from granq.data import DataSpec
from granq.files import hold, read_checkpoint, save_atomically, write_checkpoint, write_csv
from granq.generator import Generator, build_generator
from granq.models import build_network

_TORN = re.compile(r"(checkpoint|config|history|result)\..*\.tmp")  # of a process killed while writing


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint, self.previous = self.path / "checkpoint.pt", self.path / "checkpoint.previous.pt"
        self.config = self.path / "config.json"

    def check_free(self, resume: bool = False, *, resumable: bool = True) -> None:
        """Raise ValueError if what is started here would overwrite something, or if there is no run to resume."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; --out takes a folder")
        found = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        begun = self.path.is_dir() and all(name == ".lock" or _TORN.fullmatch(name) for name in found)
        if begun:
            return  # killed before it had written anything: a start and a continuation are the same
        if resume and not self.config.is_file():
            raise ValueError(f"{self.path} holds no run to resume")
        if not resume and found:
            continued = " or pass --resume to continue it" if resumable else ""
            raise ValueError(f"{self.path} already holds files; choose another --out{continued}")

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
            for torn in [path for path in self.path.iterdir() if _TORN.fullmatch(path.name)]:
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
            facts["config"]["image_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
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


def fingerprint(config: dict[str, Any], *networks: nn.Module) -> str:
    """SHA-256 of settings and weights (teacher, generator): two runs that share it are the same run."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in (item for network in networks for item in network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SavedRun(NamedTuple):
    """What ``load_run`` reads: the student, and where it comes from."""

    student: fx.GraphModule  #: in eval mode, its ranges frozen
    config: QATConfig
    spec: DataSpec  #: the data that measured it, and the normalization of its images
    facts: dict[str, Any]  #: ``config.json``: network, data, teacher, its accuracy, versions
    epoch: int  #: finished epochs


@typed
def load_run(run: str | Path, device: str = "cpu") -> SavedRun:
    """The student of a folder that ``granq quantize`` or ``granq sweep`` wrote.

    Args:
        run: the folder.
        device: where to put the student.

    Raises:
        ValueError: it holds no run with a finished epoch, or one of ``train`` alone, which does not know the network,
            or its ``config.json`` is damaged.
    """
    state, facts = _read_run(run, "cpu")
    if missing := {"network", "spec", "data", "teacher_top1"} - facts.keys():
        raise ValueError(f"{run}/config.json lacks {', '.join(sorted(missing))}; it is not of granq quantize")
    config, saved = QATConfig.from_dict(facts["config"]), facts["spec"]
    try:
        spec = DataSpec(**(saved | {"mean": tuple(saved["mean"]), "std": tuple(saved["std"])}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}/config.json has a damaged spec ({error}); the run cannot be read") from error
    student = config.quantized(build_network(facts["network"], spec.classes))
    student.load_state_dict(state["student"])
    freeze_ranges(student)
    return SavedRun(student.to(device), config, spec, facts, state["epoch"])


def _read_run(run: str | Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Newest checkpoint and ``config.json`` of a run folder."""
    folder = RunFolder(run)
    state = folder.load(device=device) if folder.config.is_file() else None
    if state is None:
        raise ValueError(f"{run} holds no run with a finished epoch; make one with granq quantize --out {run}")
    return state, folder.read_config()


@typed
def load_generator(run: str | Path, device: str = "cpu") -> Generator:
    """The generator of a run folder. Raises ValueError if it holds no finished epoch."""
    state, facts = _read_run(run, device)
    size = facts["config"]["image_size"]
    classes = next(len(v) for k, v in state["generator"].items() if "embedding" in k or k == "norm0.weight.weight")
    generator = build_generator(classes, size).to(device)
    generator.load_state_dict(state["generator"])
    return generator


def versions(device: str = "cpu") -> dict[str, str]:
    """What a number must carry to be trusted: software versions and the device's name."""
    import torchvision

    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": f"{device} ({name})",
    }
