"""Put finished runs into a table of results: python benchmarks/results.py figures/results_cifar10.csv runs/a runs/b"""

import json
from pathlib import Path

import pandas as pd
import tyro
from tyro.conf import Positional

KEYS = ["dataset", "network", "method", "bits", "seed"]


def main(table: Positional[Path], runs: Positional[tuple[Path, ...]]) -> None:
    """Add the rows of ``runs`` to ``table``; a row of the same method, width and seed is replaced."""
    rows = [json.loads((run / "result.json").read_text()) for run in runs]
    new = pd.DataFrame(rows).drop(columns=["out", "row_last_top1", "difference"], errors="ignore")
    frames = [pd.read_csv(table), new] if table.exists() else [new]
    frame = pd.concat(frames, ignore_index=True).drop_duplicates(KEYS, keep="last")
    first = [*KEYS, "teacher_top1", "ptq_top1", "last_top1", "best_top1"]
    frame = frame.sort_values(KEYS)[[*first, *frame.columns.drop(first)]]
    frame.to_csv(table, index=False, float_format="%.6g")
    print(frame[first].to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
