"""Which run is which method, and what others have published."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

PUBLISHED = Path(__file__).with_name("published_results.csv")


def dataset_name(name: str) -> str:
    """Return ``folder:/some/where`` without the path, which means nothing to a reader."""
    return "image folder" if name.startswith("folder:") else name


def method_name(row: Mapping[Any, Any]) -> str:
    """Return the scheme, and in what else a run differs from the plain recipe: such a run is a method of its own."""
    steps = f"{row['epochs'] * row['iterations']:.0f} steps"
    match, image_bits = row["recipe"] == "match", row.get("image_bits", 0)  # NaN where a table has no such column
    differs = {
        f"match, {steps}" if match else row["recipe"]: row["recipe"] != "adadfq",
        "BatchNorm": row["reestimate_batchnorm"] and not match,  # belongs to that recipe
        "no random shapes": match and row.get("random_shapes") is False,
        f"image {image_bits:.0f} bits": image_bits > 0,
        "pixel range": row.get("pixel_range", 0) > 0 and not image_bits > 0,  # goes with them
        "bfloat16": row.get("bf16") is True and not match,
    }
    return " + ".join([row["scheme"], *(name for name, does in differs.items() if does)])


def published_results(bits: pd.Series) -> pd.DataFrame:
    """Return published results of ResNet-20 on CIFAR-10 at these widths, in the columns of measured rows."""
    table, keys = pd.read_csv(PUBLISHED), ["dataset", "network", "source"]
    teachers = table[table.method == "full precision"].rename(columns={"top1_percent": "teacher_top1"})
    table = table[(table.dataset == "CIFAR-10") & (table.network == "ResNet-20")]
    table = table.assign(bits=[f"W{b}A{b}" for b in table.bits]).merge(teachers[[*keys, "teacher_top1"]], "left", keys)
    table = table[table.bits.isin(bits)].rename(columns={"method": "scheme", "top1_percent": "last_top1"})
    return table[["dataset", "network", "scheme", "bits", "source", "last_top1", "std", "teacher_top1"]]
