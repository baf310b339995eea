"""The granularity factorial: what does each choice of a scheme cost on its own?

Every weight granularity meets every activation granularity, with static and with dynamic ranges, at every bit width;
one cell is one accuracy. Codes are clamped and every layer's input is quantized, so that nothing else differs.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm.auto import tqdm

from granq.convert import calibrate, check_copy, quantize_model
from granq.files import write_csv
from granq.hooks import images_of
from granq.measure import running
from granq.models import right
from granq.schemes import Scheme

WEIGHTS = ("full", "per_tensor", "per_out_channel", "per_kernel")
ACTIVATIONS = ("full", "per_tensor", "per_sample", "per_channel", "per_sample_channel")
STATIC = ("per_tensor", "per_channel")  # an image that has not been seen has no range of its own yet


class Cell(NamedTuple):
    """One combination; ``ranges`` is static, dynamic or, with full-precision activations, none."""

    weights: str
    activations: str
    ranges: str
    bits: int
    seed: int = 0  #: of the calibration: with static ranges there may be several


def factorial_cells(bits: Sequence[int] = (2, 3, 4, 5, 8), seeds: int = 1) -> list[Cell]:
    """Return all combinations that exist, 28 for each bit width; those with static ranges once for each seed."""
    cells = []
    for k, weights, activations in product(bits, WEIGHTS, ACTIVATIONS):
        cells.append(Cell(weights, activations, "none" if activations == "full" else "dynamic", k))
        if activations in STATIC:
            cells += [Cell(weights, activations, "static", k, seed) for seed in range(seeds)]
    return cells


def measure_granularity_factorial(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], cells: Sequence[Cell],
    calibration: Callable[[int], Iterable[Tensor]], *, facts: dict[str, Any] | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Measure the accuracy of every cell on the same images, with a bootstrap interval over the images.

    Args:
        batches: a list of test images and labels. Dynamic ``per_tensor`` and ``per_channel`` ranges belong to a batch:
            mix the classes, and keep the batch size.
        cells: of ``factorial_cells``.
        calibration: seed -> batches of images that set static ranges; never test images.
        facts: provenance, repeated in every row.
        out: CSV, replaced after every cell. Cells it already holds are not measured again.

    Columns: weights, activations, ranges, bits, seed, top1 (percent), lost (points below the model on the same images),
    each with the ends ``_low`` and ``_high`` of its 95 % percentile interval (lost: paired by image), images,
    batch_size (largest), reference_top1 (of ``model`` on them), and ``facts``.
    """
    batches = list(batches)
    reference = 100.0 * right(model, batches)
    known = {"images": len(reference), "batch_size": max(len(images_of(batch)) for batch in batches)} | (facts or {})
    known |= {"reference_top1": reference.mean()}
    rows = running.kept_rows(out, known)
    found = {tuple(row[name] for name in Cell._fields) for row in rows}
    for cell in tqdm([c for c in cells if c not in found], desc="factorial", unit="cell", leave=False):
        weights, activations = (None if g == "full" else g for g in cell[:2])
        scheme = dict(weights=weights, activations=activations, tracked=cell.ranges == "static")
        student = quantize_model(model, Scheme.model_validate(scheme), cell.bits, cell.bits)
        check_copy(student, model, images_of(batches[0])[:2])
        if cell.ranges == "static":
            calibrate(student, calibration(cell.seed))
        correct = 100.0 * right(student, batches)
        row = cell._asdict() | known
        for name, values in {"top1": correct, "lost": reference - correct}.items():
            row |= running.mean_and_interval(name, *np.unique(values, return_counts=True))
        rows.append(row)
        if out:
            write_csv(out, pd.DataFrame(rows), float_format="%.6g")
    return pd.DataFrame(rows)
