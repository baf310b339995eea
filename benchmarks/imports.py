"""Whole processes that import: Python, torch, granq, and ``granq --help``."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import common
import pandas as pd

from granq.measure.latency import alternate, quartiles, timings

COMMANDS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import granq": ["-c", "import granq"],
    "import torch, use granq": ["-c", "import torch, granq; granq.quantize_model, granq.train"],
    "granq --help": ["-m", "granq.app.cli", "--help"],
}


def measure_latency_import(*, repetitions: int = 30, device: str = "cpu") -> pd.DataFrame:
    """Time processes that take turns.

    Returns:
        Columns command, median_ms, q25_ms, q75_ms, more_than_torch_ms (median of the differences to ``import torch``
        within a repetition), repetitions, threads, torch, device.
    """
    runs = {
        name: partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        for name, arguments in COMMANDS.items()
    }
    times = alternate(runs, repetitions)
    more = times.sub(times["import torch"], axis=0).median()
    return timings([quartiles(times).assign(more_than_torch_ms=more)], "command", repetitions, device)


if __name__ == "__main__":
    common.run(measure_latency_import)
