"""Where a run computes, and what a number must carry to be trusted."""

import platform
import subprocess
import warnings
from functools import partial
from pathlib import Path

import torch

from granq.errors import UserError


def resolve_device(device: str) -> str:
    """Return ``device``; ``auto`` becomes cuda, mps or cpu, whichever is there first. Raises UserError if it is not."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    known = ["cpu", *["mps"] * mps, *["cuda"] * cuda, *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in known:
        raise UserError(f"there is no device {device!r} here; known are auto, cpu, cuda and mps")
    return device


def has_bfloat16(device: str) -> bool:
    """Say whether ``device`` computes in bfloat16: GPUs do, and x86 processors with AVX512."""
    return not device.startswith("cpu") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def expect_bfloat16(device: str) -> None:
    """Warn where bfloat16 costs time instead of saving it; 7 times as long was measured (docs/speed.md)."""
    if not has_bfloat16(device):
        warnings.warn("this processor cannot compute in bfloat16: without bf16 it will be faster", stacklevel=3)


def versions(device: str = "cpu") -> dict[str, str]:
    """Return versions of the software, and the name of the device."""
    import torchvision

    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return found | {"device": f"{device} ({name})"}


def commit() -> str:
    """Return the commit of this checkout, with ``+`` if its sources differ from it; empty outside of a checkout."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "diff", "--quiet", "HEAD", "--", "."]).returncode == 1 else "")
    except OSError:  # no git here
        return ""
