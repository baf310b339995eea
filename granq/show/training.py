"""How a run goes, epoch by epoch, and what its generator draws."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from granq.measure.images import decode_pixels
from granq.show.style import Ax, finish, role

TRAINING_LABELS = {
    "generator_loss": "generator loss",
    "student_loss": "student loss",
    "bn_loss": "BatchNorm distance",
    "teacher_top1": "teacher on synthetic\nimages (%)",
    "test_top1": "student on test\nimages (%)",
}
SHOWN_LABELS = 10  # more would be too small to be seen


def plot_training_curves(
    data: pd.DataFrame, *, quantity: str = "test_top1", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw histories of runs, a line for each; the warm-up (generator alone) is shaded.

    Columns: epoch, warmup, the quantities; scheme, bits, recipe and seed tell several runs apart.
    """
    ax = ax or plt.gca()
    data = data if "scheme" in data else data.assign(scheme="student")
    data = data if "seed" in data else data.assign(seed=0)
    run = data.scheme.map(lambda scheme: role(scheme).label)
    for key in ("bits", "recipe"):
        if key in data and data[key].nunique() > 1:
            run = run + " " + data[key].astype(str)
    warmup, lines = data.warmup.astype(bool), list[Any]()
    # the student's loss is measured in the warm-up too, but not yet trained on
    rows = data.assign(run=run)[~warmup if quantity == "student_loss" else slice(None)]
    for (scheme, name), part in rows.groupby(["scheme", "run"], sort=False):
        look = role(str(scheme))
        dashes = [look.dash, *(dash for dash in ("-", "--", ":", "-.") if dash != look.dash)]
        look = look._replace(dash=dashes[lines.count(scheme) % len(dashes)])
        lines.append(scheme)
        seeds = part.pivot(index="epoch", columns="seed", values=quantity)
        ax.plot(seeds.index, seeds, label=[name, *["_"] * (seeds.shape[1] - 1)], **look.line)
    start, end = data.epoch.min() - 0.5, data.epoch.max() + 0.5
    if warmup.any():
        until = data.epoch[warmup].max() + 0.5
        ax.axvspan(start, until, color="#ececee", zorder=0, linewidth=0, label="warm-up: generator alone")
    ax.set(xlabel="epoch", title=TRAINING_LABELS[quantity], xlim=(start, end))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.ticklabel_format(axis="y", useOffset=False)
    return finish(ax, legend)


def plot_synthetic_images(data: pd.DataFrame, *, ax: Ax = None) -> Axes:
    """Draw ``measure_generated_images``, a column for every label, a row for every sample, the confidence below.

    A column ``epoch`` stacks snapshots, a column ``name`` names the labels; of these the first 10 are drawn.
    """
    ax = ax or plt.gca()
    every = sorted(data.label.unique())
    data = data[data.label.isin(every[:SHOWN_LABELS])].sort_values("label")
    keys = [key for key in ("epoch", "sample") if key in data]
    groups = data.groupby(keys)
    size, classes = int(data["size"].iloc[0]), data.label.nunique()
    cell, line = round(size * 1.06), round(size * 1.36)  # a gap next to each image and a line of text below
    canvas = np.full((line * len(groups), cell * classes, 3), 255, np.uint8)
    words = []
    for y, (_, rows) in enumerate(groups):
        for x, row in enumerate(rows.itertuples()):
            canvas[y * line : y * line + size, x * cell : x * cell + size] = decode_pixels(str(row.pixels), size)
            at = x * cell + size / 2, y * line + size * 1.2
            ax.text(*at, f"{row.confidence:.0%}", ha="center", va="center", fontsize=6)
        words.append("\n".join(f"{k} {rows[k].iloc[0]}" for k in keys if k == "epoch" or data[k].nunique() > 1))
    ax.imshow(canvas, interpolation="nearest")
    labels = rows["name" if "name" in data else "label"].astype(str)
    ax.set_xticks([x * cell + size / 2 for x in range(classes)], labels, fontsize=6.5)
    ax.set_yticks([y * line + size / 2 for y in range(len(groups))], words)
    ax.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    first = f"the first {SHOWN_LABELS} of {len(every)} labels; " if len(every) > SHOWN_LABELS else ""
    ax.set_xlabel(f"{first}below each image: the teacher's probability of the label that was asked for")
    ax.spines[:].set_visible(False)
    return ax
