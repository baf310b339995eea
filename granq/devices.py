"""Where a run computes, and what a number must carry to be trusted."""

import platform
import subprocess
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from granq.errors import UserError


def resolve_device(device: str) -> str:
    """Return ``device``; ``auto`` becomes cuda, mps or cpu, whichever is there first. Raises UserError if it is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [name for name, is_there in there.items() if is_there]
    if device not in ("auto", *here):
        raise UserError(f"there is no device {device!r} here, but auto, {', '.join(here)}")
    return here[0] if device == "auto" else device


def own_random_state(device: str) -> AbstractContextManager[None]:
    """Leave the random numbers of the CPU and of ``device`` as they are, whatever is drawn within the block."""
    return torch.random.fork_rng([device] if device.startswith("cuda") else [])


def versions(device: str = "cpu") -> dict[str, str]:
    """Return versions of the software, and the name of the device."""
    import torchvision

    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else name
    found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return found | {"device": f"{device} ({name})"}


def commit() -> str:
    """Return the commit of this checkout, with ``+`` if its sources differ from it; empty outside of a checkout."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        if git(["git", "ls-files", "--error-unmatch", Path(__file__).name]).returncode:
            return ""  # installed within another project
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "diff", "--quiet", "HEAD", "--", "."]).returncode == 1 else "")
    except OSError:  # no git here
        return ""
