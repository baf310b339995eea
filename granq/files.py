"""Files that are whole or not there, and that can do no harm when they are read."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save

from granq.errors import UserError


def save_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write next to ``path``, whose folder is made, then rename: a reader sees the old file or the new one, whole."""
    (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes never share it
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(str(error).partition("\n")[0]) from error
    finally:
        temporary.unlink(missing_ok=True)  # half a file would keep a full disk full


def to_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON: numbers and arrays of numpy and torch as numbers, paths as text."""
    return json.dumps(value, indent=indent, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))


def write_csv(path: str | Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """Write ``table`` as CSV, atomically."""
    save_atomically(Path(path), lambda temporary: table.to_csv(temporary, index=False, float_format=float_format))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write ``tensors`` as safetensors with ``facts`` as JSON in the header, atomically."""
    own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}  # tied ones, apart
    content = save(own, {"granq": to_json(facts)})  # save_file would let nobody else read it
    save_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file, and the facts in its header, if ``write_tensors`` wrote it."""
    with safe_open(str(path), "pt") as file:
        header = json.loads((file.metadata() or {}).get("granq", "{}"))
        return {key: file.get_tensor(key) for key in file.keys()}, header


def read_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read the tensors and plain values of ``torch.save``. Raises UserError if the file is torn, changed or unsafe."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # checksums: torch itself reads a flipped bit without a word
                raise UserError(f"{path} is damaged at {damaged}")
        return torch.load(path, map_location=device, weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a whole file of tensors and numbers ({str(error).splitlines()[0]})") from None
