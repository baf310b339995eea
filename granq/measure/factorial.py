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
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from granq.config import QATConfig
from granq.convert import calibrate, frozen_ranges, quantize_model
from granq.errors import UserError
from granq.files import write_csv
from granq.hooks import Batch
from granq.measure import running
from granq.runs import train
from granq.schemes import Scheme

WEIGHTS = ("full", "per_tensor", "per_out_channel", "per_kernel")
ACTIVATIONS = ("full", "per_tensor", "per_sample", "per_channel", "per_sample_channel")
STATIC = ("per_tensor", "per_channel")  # an image that has not been seen has no range of its own yet


class Cell(NamedTuple):
    """One combination; ``ranges`` is ``none`` with full-precision activations, ``epochs`` 0 without training."""

    weights: str
    activations: str
    ranges: str
    bits: int
    epochs: int
    seed: int

    @property
    def scheme(self) -> Scheme:
        """The scheme that quantizes what the cell says and nothing else."""
        weights, activations = (None if g == "full" else g for g in (self.weights, self.activations))
        return Scheme.model_validate(dict(weights=weights, activations=activations, tracked=self.ranges == "static"))


def factorial_cells(bits: Sequence[int] = (2, 3, 4, 5, 8), epochs: int = 0, seeds: int = 1) -> list[Cell]:
    """Return all combinations that exist, 28 for each bit width, without training and, if ``epochs``, after it too.

    Only trained cells and those with static ranges have several seeds: in the others nothing is drawn.
    """
    ranges = {g: ("dynamic", "static") if g in STATIC else ("dynamic",) for g in ACTIVATIONS} | {"full": ("none",)}
    cells = []
    for trained, k, weights, activations in product((0, epochs) if epochs else (0,), bits, WEIGHTS, ranges):
        for kind in ranges[activations]:
            drawn = trained or kind == "static"
            cells += [Cell(weights, activations, kind, k, trained, s) for s in range(seeds if drawn else 1)]
    return cells


def measure_granularity_factorial(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    cells: Sequence[Cell],
    calibration: Callable[[int], Iterable[Tensor]],
    *,
    config: QATConfig | None = None,
    facts: dict[str, Any] | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Measure the accuracy of every cell on the same images, with a bootstrap interval over the images.

    Args:
        model: the full-precision network.
        batches: test images and labels, gone through once a cell. Dynamic ``per_tensor`` and ``per_channel`` ranges
            belong to a batch: mix the classes, and keep the batch size.
        cells: of ``factorial_cells``.
        calibration: seed -> batches of images that set static ranges, of a generator; never test images.
        config: of a training, for cells with epochs, which come after its warm-up.
        facts: provenance, repeated in every row.
        out: CSV, replaced after every cell. Cells it already holds are not measured again.

    Returns:
        Columns weights, activations, ranges, bits, epochs, seed, top1 (percent), lost (points below the model on the
        same images), each with the ends ``_low`` and ``_high`` of its 95 % percentile interval (lost: paired by image),
        images, batch_size (largest), and ``facts``. Calibration is the only thing seeds change in untrained cells.
    """
    if config is None and any(cell.epochs for cell in cells):
        raise UserError("cells with epochs need the config of a training")
    hits = _hits(model, batches)
    reference, known = np.concatenate(hits), {"images": sum(map(len, hits)), "batch_size": max(map(len, hits))}
    known |= facts or {}
    rows = pd.read_csv(out).to_dict("records") if out and out.is_file() else []
    for name, value in known.items() if rows else ():
        old = rows[0][name]
        same = old == value if isinstance(value, str) else np.isclose(old, value, rtol=1e-5)
        if not same and name not in ("torch", "device", "commit"):
            raise UserError(f"{out} was measured with {name} {old}, not {value}; choose another file")
    found = {tuple(row[name] for name in Cell._fields) for row in rows}
    for cell in tqdm([c for c in cells if c not in found], desc="factorial", unit="cell"):
        student = _student(model, cell, calibration, config)
        with frozen_ranges(student), parametrize.cached():
            correct = np.concatenate(_hits(student, batches))
        rows.append(cell._asdict() | _interval("top1", correct) | _interval("lost", reference - correct) | known)
        if out:
            write_csv(out, pd.DataFrame(rows), float_format="%.6g")
    return pd.DataFrame(rows)


def _student(
    model: nn.Module, cell: Cell, calibration: Callable[[int], Iterable[Tensor]], config: QATConfig | None
) -> nn.Module:
    if cell.epochs and config:
        changes: dict[str, Any] = dict(scheme=cell.scheme, weight_bits=cell.bits, act_bits=cell.bits, seed=cell.seed)
        return train(model, config.change(epochs=config.warmup_epochs + cell.epochs, **changes)).student
    student = quantize_model(model, cell.scheme, cell.bits, cell.bits)
    if cell.ranges == "static":
        device = next(model.parameters()).device
        calibrate(student, (images.to(device) for images in calibration(cell.seed)))
    return student


def _hits(model: nn.Module, batches: Iterable[Batch]) -> list[np.ndarray]:
    """Return, batch by batch, 100 for every image that is classified rightly and 0 for the others."""
    hits: list[Tensor] = []
    running.run(model, batches, "accuracy", after=lambda batch, logits: hits.append(logits.argmax(1).cpu() == batch[1]))
    return [100.0 * hit.numpy() for hit in hits]


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the mean over images and its 95 % bootstrap interval; the same resamples for every cell."""
    resamples: dict[str, Any] = dict(n_resamples=2000, batch=100, rng=0)  # in batches: less memory at 10,000 images
    interval = stats.bootstrap((values,), np.mean, method="percentile", **resamples).confidence_interval
    return {name: values.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}


def warm_generator(model: nn.Module, config: QATConfig) -> nn.Module:
    """Return a generator after the warm-up epochs of ``config``."""
    return train(model, config.change(epochs=config.warmup_epochs)).generator
