"""What the benchmarks share: one command line, one table, one CSV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import tyro

from granq.devices import resolve_device
from granq.files import write_csv


def run(measure: Callable[..., pd.DataFrame], repetitions: int = 30) -> None:
    """Call ``measure(repetitions=..., device=...)`` as the command line says, and write the rows to ``--out``."""

    def main(*, out: Path, repetitions: int = repetitions, device: str = "cpu") -> None:
        frame = measure(repetitions=repetitions, device=resolve_device(device))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(out, frame)
        print(frame.to_string())

    tyro.cli(main, description=measure.__doc__)
