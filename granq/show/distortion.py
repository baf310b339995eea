"""Activations, full precision against quantized: of a whole layer, and of one channel of one image."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from granq.show.style import Ax, finish, granularity_role, role, select, short_layer

DISTORTION_LABELS = {"distribution": "share of values above", "error": "RMS error"}


def plot_activation_distortion(
    data: pd.DataFrame, *, quantity: str = "distribution", legend: bool = True, ax: Ax = None, **panel: Any
) -> Axes:
    """Draw ``measure_activation_distortion`` at one ``layer`` and ``bits``: every granularity and full precision.

    ``"distribution"`` is the share of values above each activation, in which quantization levels are stairs. It starts
    after the lowest bin, which holds the zeros, and ends where 0.2 % of the values remain; the title holds the SQNR in
    the order of the legend. ``"error"`` is by activation value, where at least 1 value in 100,000 lies.
    """
    ax = ax or plt.gca()
    rows = select(data, **{"layer": None, "bits": None} | panel)
    edges = np.array([*rows.bin_left.unique(), rows.bin_right.max()])
    groups = [(granularity_role(str(name)), part) for name, part in rows.groupby("granularity", sort=False)]
    title = f"{short_layer(rows.layer.iloc[0])}, {rows.bits.iloc[0]} bits"
    ax.set(xlabel="activation", ylabel=DISTORTION_LABELS[quantity])
    if quantity == "distribution":
        above = _share_above(groups[0][1].density_full_precision, edges)
        ax.stairs(above, edges, fill=True, color="#d9d9dc", label="full precision")
        ax.set(xlim=(edges[0], edges[max(1, int((above > 0.002).sum()))]), ylim=(0, 1.15 * above[1] or 1))
        for look, part in groups:
            style = dict(color=look.color, linestyle=look.dash, linewidth=1, label=look.label)
            ax.stairs(_share_above(part.density_quantized, edges), edges, baseline=None, **style)
        title += "\nSQNR " + ", ".join(f"{part.sqnr_db.iloc[0]:.1f}" for _, part in groups) + " dB"
    else:
        for look, part in groups:
            part = part[part.density_full_precision * (part.bin_right - part.bin_left) >= 1e-5]
            ax.plot((part.bin_left + part.bin_right) / 2, part.rms_error, markevery=8, label=look.label, **look.line)
        ax.set_ylim(0)
    ax.set_title(title)
    return finish(ax, legend, fontsize=6)


def _share_above(density: pd.Series, edges: np.ndarray) -> np.ndarray:
    """Return the share of the values in each bin or above it."""
    return (density.to_numpy() * np.diff(edges))[::-1].cumsum()[::-1]


def plot_channel_histogram(data: pd.DataFrame, *, legend: bool = True, ax: Ax = None, **panel: Any) -> Axes:
    """Draw ``measure_channel_histograms`` of one channel of one image, with a tick at every level in reach.

    ``panel`` is one ``layer``, ``bits``, ``granularity``, ``source``, ``image`` and ``rank`` (0: narrowest channel).
    """
    ax = ax or plt.gca()
    rows = select(data, **dict.fromkeys(("layer", "bits", "granularity", "source", "image", "rank")) | panel)
    first, look = rows.iloc[0], granularity_role(rows.granularity.iloc[0])
    edges = [*rows.bin_left, rows.bin_right.iloc[-1]]
    width = edges[-1] - edges[0]
    ax.stairs(rows["count"], edges, fill=True, color="#c9c9cd", label="full precision")
    ax.stairs(rows.count_quantized, edges, color=look.color, linewidth=1.5, label="quantized")
    levels = first.lowest + first.step * np.arange(2**first.bits)
    levels = levels[(levels >= edges[0] - 1e-4 * width) & (levels <= edges[-1] + 1e-4 * width)]
    if len(levels) <= 32:  # more ticks would be a bar
        ax.plot(levels, np.full(len(levels), 0.5), "|", color="black", markersize=9, label="levels")
    ax.set_yscale("symlog", linthresh=1)
    title = f"{role(first.source).label}, {first.bits} bits: {first.sqnr_db:.1f} dB\none scale {look.label}"
    ax.set(xlabel="activation", ylabel="values", title=title, ylim=(0, 12 * rows["count"].max()))
    ax.set_xlim(edges[0] - 0.03 * width, edges[-1] + 0.03 * width)
    return finish(ax, legend, loc="upper right", ncols=3)
