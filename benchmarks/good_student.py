"""Minutes that a whole ``granq quantize`` takes, Python's start and accuracies included, and the student at its end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from granq.files import write_csv

COLUMNS = (
    "command wall_minutes dataset network scheme bits auto_bits image_bits recipe refined_images epochs iterations "
    "batch_size bf16 seed teacher_top1 ptq_top1 last_top1 best_top1 test_images generator_iterations trials "
    "device torch python commit"
).split()


def main(table: Path, options: list[str]) -> pd.DataFrame:
    """Run ``granq quantize`` with ``options`` once, and add a row to ``table``.

    Columns as a results table has them, besides wall_minutes, trials (1) and generator_iterations, those of the warm-up
    that ``--bits auto`` makes a run of its own; NaN without one.
    """
    start = time.perf_counter()
    command = "from granq.app.cli import main; raise SystemExit(main())"
    said = subprocess.run([sys.executable, "-c", command, "quantize", *options, "--json"], check=True, stdout=-1)
    row = json.loads(said.stdout) | {"wall_minutes": round((time.perf_counter() - start) / 60, 2)}
    row |= {"command": "granq quantize", "trials": 1}
    if (warm := Path(row["out"], "warmup", "config.json")).is_file():
        own = json.loads(warm.read_text())["config"]
        row["generator_iterations"] = own["epochs"] * own["iterations"]
    old = pd.read_csv(table) if table.is_file() else pd.DataFrame()
    frame = pd.concat([old, pd.DataFrame([row]).reindex(columns=COLUMNS)], ignore_index=True)
    write_csv(table, frame)
    return frame


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2:]).iloc[-1].to_string())
