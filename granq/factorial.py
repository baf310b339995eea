"""The granularity factorial: what does each choice of a scheme cost on its own?

GranQ's gain mixes one scale per channel, fresh scales per image and one weight scale per kernel. Here every weight
granularity meets every activation granularity, with static and with dynamic ranges, at every bit width; one cell is one
accuracy. Codes are clamped and every layer's input is quantized, so that nothing else differs between cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from granq import qat
from granq.calibration import calibrate
from granq.config import QATConfig
from granq.convert import Scheme, frozen_ranges, quantize_model
from granq.files import write_csv
from granq.generator import Generator, kept, synthesize
from granq.models import eval_mode

FULL = "full"
WEIGHTS = (FULL, "per_tensor", "per_out_channel", "per_kernel")
ACTIVATIONS = (FULL, "per_tensor", "per_sample", "per_channel", "per_sample_channel")
#: An image that has not been seen has no range of its own yet: static ranges exist only for these.
STATIC = ("per_tensor", "per_channel")
CONFIDENCE, RESAMPLES = 0.95, 2000


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
        weights, activations = (None if g == FULL else g for g in (self.weights, self.activations))
        return Scheme(weights, activations, tracked=self.ranges == "static")


def factorial_cells(bits: Sequence[int] = (2, 3, 4, 5, 8), epochs: int = 0, seeds: int = 1) -> list[Cell]:
    """All combinations that exist, 28 for each bit width, without training and, if ``epochs``, after it too.

    Left out: static ranges per image, which cannot exist, and further seeds of untrained cells with dynamic ranges, in
    which nothing is drawn.
    """
    ranges = {g: ("dynamic", "static") if g in STATIC else ("dynamic",) for g in ACTIVATIONS} | {FULL: ("none",)}
    cells = []
    for trained, k, weights, activations in itertools.product((0, epochs) if epochs else (0,), bits, WEIGHTS, ranges):
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
    """Accuracy of every cell on the same images, with a bootstrap interval over the images.

    Args:
        model: the full-precision network.
        batches: test images and labels, gone through once a cell (a list or a DataLoader). Dynamic ``per_tensor`` and
            ``per_channel`` ranges belong to a batch: mix the classes, and keep the batch size.
        cells: of ``factorial_cells``.
        calibration: seed -> batches of images that set static ranges, of a generator; never test images.
        config: settings of a training, of which the cell replaces scheme, bits and seed, and its ``epochs`` come after
            the warm-up. Needed only for cells with epochs.
        facts: provenance, repeated in every row.
        out: CSV, replaced atomically after every cell. Cells it already holds are not measured again.

    Returns:
        Columns weights, activations, ranges, bits, epochs, seed, top1 (percent), lost (points below the model on the
        same images), each with the ends ``_low`` and ``_high`` of its 95 % percentile interval (lost: paired by image),
        images, batch_size (largest), and ``facts``. Calibration is the only thing seeds change in untrained cells.

    Raises:
        ValueError: no images, or cells with epochs and no config.
    """
    if config is None and any(cell.epochs for cell in cells):
        raise ValueError("cells with epochs need the config of a training")
    device = next(p.device for p in model.parameters())
    reference, batch_size = _correct(model, batches, device)
    done = pd.read_csv(out) if out and out.is_file() else pd.DataFrame()
    known: dict[str, Any] = {"images": len(reference), "batch_size": batch_size} | (facts or {})
    if len(done) and (missing := {*Cell._fields, *known} - set(done)):
        raise ValueError(f"{out} is no table of a factorial: it lacks {', '.join(sorted(missing))}")
    for name, value in known.items() if len(done) else ():
        old = done[name][0]
        same = old == value if isinstance(value, str) else np.isclose(old, value, rtol=1e-5)
        if not same and name not in ("torch", "device", "commit"):
            raise ValueError(f"{out} was measured with {name} {old}, not {value}; choose another file")
    rows: list[dict[Any, Any]] = done.to_dict("records")
    found = {tuple(row[name] for name in Cell._fields) for row in rows}
    for cell in tqdm([c for c in cells if c not in found], desc="factorial", unit="cell"):
        if cell.epochs and config:
            changes: dict[str, Any] = dict(scheme=cell.scheme, weight_bits=cell.bits, act_bits=cell.bits)
            changes |= dict(seed=cell.seed, epochs=config.warmup_epochs + cell.epochs)
            student = qat.train(model, replace(config, **changes)).student
        else:
            student = quantize_model(model, cell.scheme, cell.bits, cell.bits)
            if cell.ranges == "static":
                calibrate(student, (images.to(device) for images in calibration(cell.seed)))
        with frozen_ranges(student), parametrize.cached():
            correct, _ = _correct(student, batches, device)
        values = _interval("top1", correct) | _interval("lost", reference - correct)
        rows.append(cell._asdict() | values | known)
        if out:
            write_csv(out, pd.DataFrame(rows), float_format="%.6g")
    return pd.DataFrame(rows)


@torch.inference_mode()
def _correct(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[np.ndarray, int]:
    """100 for every image that is classified rightly and 0 for the others, (N,), and the largest batch."""
    with eval_mode(model):
        hits = [(model(images.to(device)).argmax(1).cpu() == labels).numpy() for images, labels in batches]
    if not hits:
        raise ValueError("there is no image to measure: batches is empty")
    return np.concatenate(hits) * 100.0, max(map(len, hits))


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean over images and its percentile bootstrap interval; the same resamples for every cell."""
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", batch=100, rng=0
    ).confidence_interval  # in batches: memory stays small at 10,000 images
    return {name: values.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}


def warm_generator(model: nn.Module, config: QATConfig) -> Generator:
    """A generator after the warm-up epochs of ``config``; the student beside it only plays along."""
    trainer = qat.Trainer(model, replace(config, epochs=max(config.warmup_epochs, 1)))
    for _ in tqdm(range(config.warmup_epochs), desc="generator", unit="epoch"):
        trainer.run_epoch(None)
    return trainer.generator


def generated_batches(generator: Generator, seed: int, count: int = 1024, batch_size: int = 64) -> Iterator[Tensor]:
    """Images as the run saw them, BatchNorm with the batch's statistics; generator and global random state stay."""
    device = str(next(generator.parameters()).device)
    for start in range(0, count, batch_size):
        with torch.random.fork_rng(), torch.no_grad(), kept(generator):
            generator.train()
            torch.manual_seed((1_000_003 * seed + start) % 2**63)  # every batch has its own numbers
            images, _ = synthesize(generator, min(batch_size, count - start), device)
        yield images
