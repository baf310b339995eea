"""What quantization does inside a network: values, scales and errors of layers and of their channels."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from pandas import DataFrame

from granq.measure.running import DEAD
from granq.show.style import Ax, finish, layer_ticks, plain_log, role, select, short_layer, side_by_side

DISTORTION_LABELS = {"distribution": "share of values above", "error": "RMS error"}
METRIC_LABELS = {"mse": "mean square error", "sqnr_db": "SQNR (dB)", "cosine_similarity": "cosine similarity"}
SQNR_CEILING = 60.0  # decibels; beyond it (1x1 kernels with their own scale reach 150) points sit on the upper edge
GAP_LABELS = {"ks_distance": "KS distance", "mean": "shift of the mean\n(in std)", "variance": "ratio of variances"}


def plot_activation_distortion(
    data: DataFrame, *, quantity: str = "distribution", legend: bool = True, ax: Ax = None, **panel: Any
) -> Axes:
    """Draw ``measure_activation_distortion`` at one ``layer`` and ``bits``: every granularity and full precision.

    ``"distribution"`` is the share of values above each activation, in which quantization levels are stairs, without
    the bin of the zeros and the last 0.2 % of the values. ``"error"`` is by activation value, where at least 1 value
    in 100,000 lies. The title of the former holds the SQNR in the order of the legend.
    """
    ax = ax or plt.gca()
    rows = select(data, **{"layer": None, "bits": None} | panel).copy()
    edges = np.array([*rows.bin_left.unique(), rows.bin_right.max()])
    title = f"{short_layer(rows.layer.iloc[0])}, {rows.bits.iloc[0]} bits"
    above = rows[["density_full_precision", "density_quantized"]].mul(rows.bin_right - rows.bin_left, axis=0)
    rows[["full", "quantized"]] = above[::-1].groupby(rows.granularity).cumsum()
    groups = [(role(str(name)), part) for name, part in rows.groupby("granularity", sort=False)]
    if quantity == "error":
        for look, part in groups:
            part = part[part.density_full_precision * (part.bin_right - part.bin_left) >= 1e-5]
            ax.plot((part.bin_left + part.bin_right) / 2, part.rms_error, markevery=8, **look.line)
        ax.set_ylim(0)
    else:
        full = groups[0][1].full.to_numpy()
        ax.stairs(full, edges, fill=True, color="#d9d9dc", label="full precision")
        for look, part in groups:
            style = dict(color=look.color, linestyle=look.dash, linewidth=1, label=look.label)
            ax.stairs(part.quantized, edges, baseline=None, **style)
        ax.set(xlim=(edges[0], edges[max(1, int((full > 0.002).sum()))]), ylim=(0, 1.15 * full[1] or 1))
        title += "\nSQNR " + ", ".join(f"{part.sqnr_db.iloc[0]:.1f}" for _, part in groups) + " dB"
    ax.set(xlabel="activation", ylabel=DISTORTION_LABELS[quantity], title=title)
    return finish(ax, legend, fontsize=6)


def plot_channel_histogram(data: DataFrame, *, legend: bool = True, ax: Ax = None, **panel: Any) -> Axes:
    """Draw ``measure_channel_histograms`` of one channel of one image, up to 5 bits with a tick at every level.

    ``panel`` is one ``layer``, ``bits``, ``granularity``, ``source``, ``image`` and ``rank`` (0: narrowest channel).
    """
    ax = ax or plt.gca()
    rows = select(data, **dict.fromkeys(("layer", "bits", "granularity", "source", "image", "rank")) | panel)
    first, look = rows.iloc[0], role(rows.granularity.iloc[0])
    edges = [*rows.bin_left, rows.bin_right.iloc[-1]]
    ax.stairs(rows["count"], edges, fill=True, color="#c9c9cd", label="full precision")
    ax.stairs(rows.count_quantized, edges, color=look.color, linewidth=1.5, label="quantized")
    if first.bits <= 5:
        levels = first.lowest + first.step * np.arange(2**first.bits)
        ax.plot(levels, np.full(len(levels), 0.5), "|", color="black", markersize=9, label="levels")
    ax.set_yscale("symlog", linthresh=1)
    title = f"{role(first.source).label}, {first.bits} bits: {first.sqnr_db:.1f} dB\none scale {look.label}"
    margin = 0.03 * (edges[-1] - edges[0])
    ax.set(xlabel="activation", ylabel="values", title=title, ylim=(0, 12 * rows["count"].max()))
    ax.set_xlim(edges[0] - margin, edges[-1] + margin)
    return finish(ax, legend, loc="upper right", ncols=3)


def plot_layer_error(
    data: DataFrame, *, metric: str = "sqnr_db", mode: str = "accumulated", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_layer_error`` over the layers, one line a scheme; rows of single channels are left out.

    ``mode`` is ``"local"`` (clean input of every layer) or ``"accumulated"`` (quantized input).
    """
    ax = ax or plt.gca()
    rows = select(data[data.channel.isna()] if "channel" in data else data, mode=mode)
    rows, layers = rows.assign(sqnr_db=rows.sqnr_db.clip(upper=SQNR_CEILING)), list(rows.layer.unique())
    for scheme, part in rows.groupby("scheme", sort=False):
        ax.plot(part.layer.map(layers.index), part[metric], **role(str(scheme)).line)
    where = "local: clean input" if mode == "local" else "accumulated: quantized input"
    ax.set_title(f"{where}, W{rows.weight_bits.iloc[0]}A{rows.act_bits.iloc[0]}")
    layer_ticks(ax, layers)
    return _finish(ax, metric, legend)


def plot_channel_error(
    data: DataFrame, *, metric: str = "sqnr_db", layer: str | None = None, mode: str = "local", legend: bool = True,
    ax: Ax = None,
) -> Axes:  # fmt: skip
    """Draw ``measure_layer_error(per_channel=True)`` of one layer, worst channel first, one line a scheme.

    ``layer`` is by default the one that holds the channel with the lowest SQNR.
    """
    ax = ax or plt.gca()
    rows = select(data[data.channel.notna()], mode=mode)
    rows = select(rows, layer=rows.sort_values("sqnr_db").layer.iloc[0] if layer is None else layer)
    rows = rows.assign(sqnr_db=rows.sqnr_db.clip(upper=SQNR_CEILING))
    for scheme, part in rows.groupby("scheme", sort=False):
        values = part[metric].sort_values(ascending=metric != "mse")
        ax.plot(range(1, len(values) + 1), values, markevery=max(1, len(values) // 12), **role(str(scheme)).line)
    ax.set(xlabel="output channel, worst first", title=f"{short_layer(rows.layer.iloc[0])}, {mode}, per channel")
    return _finish(ax, metric, legend)


def _finish(ax: Axes, metric: str, legend: bool) -> Axes:
    ax.set(ylabel=METRIC_LABELS[metric], yscale="log" if metric == "mse" else "linear")
    return finish(ax, legend, ncols=2)


def plot_granularity_maps(
    data: DataFrame, *, layer: str | None = None, granularity: str = "", colorbar: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_scale_maps``: the scale of every image and channel in front of a layer; constant ones are grey.

    ``granularity`` is by default the last in the data, the finest. All of them share the limits of the colors.
    """
    ax = ax or plt.gca()
    data = select(data, layer=layer)
    data = data.assign(scale=data.scale.where(data.scale > DEAD))
    name = granularity or data.granularity.iloc[-1]
    grid = select(data, granularity=name).pivot(index="image", columns="channel", values="scale")
    colors, norm = plt.get_cmap("viridis").with_extremes(bad="#d9d9dc"), LogNorm(data.scale.min(), data.scale.max())
    mesh = ax.imshow(grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    ax.set(title=role(name).label.replace(" (", "\n("), xlabel="channel", ylabel="image")
    ax.locator_params(integer=True, nbins=4)
    if colorbar:
        plain_log(ax.figure.colorbar(mesh, ax=ax, label="scale (step, in units of the activation)").ax.yaxis)
    return ax


def plot_channel_scales(
    data: DataFrame, *, granularity: str | None = None, bits: int | None = None, ax: Ax = None
) -> Axes:
    """Draw ``measure_channel_scales`` of several sources: the scale of every channel, with a bar at each median."""
    ax = ax or plt.gca()
    data = select(data, granularity=granularity, bits=bits)
    _channel_points(ax, data.assign(value=data.scale.where(data.scale > DEAD)), "source")
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    ax.set_ylabel(f"scale at {data.bits.iloc[0]} bits\n(step, in units of the activation)")
    one = f"one scale {role(data.granularity.iloc[0]).label}"
    ax.set_title(f"{one}, n = {data.images.min()} images of each source")
    return finish(ax, True)


def plot_synthetic_gap(data: DataFrame, *, quantity: str = "ks_distance", legend: bool = True, ax: Ax = None) -> Axes:
    """Draw ``measure_synthetic_gap``: every channel a point, with a bar at each median.

    A column ``pair`` holds several comparisons, such as real against real: so much of a distance is the sample.
    """
    ax = ax or plt.gca()
    data = data if "pair" in data else data.assign(pair="synthetic against real")
    values = {
        "ks_distance": data.ks_distance,
        "mean": (data.mean_synthetic - data.mean_real).abs() / data.variance_real**0.5,
        "variance": (data.variance_synthetic / data.variance_real).where(data.variance_synthetic > 0),  # for the log
    }[quantity]
    _channel_points(ax, data.assign(value=values.where(data.variance_real > 0)), "pair")
    if quantity == "variance":
        ax.set_yscale("log")
        plain_log(ax.yaxis)
    ax.set_ylabel(GAP_LABELS[quantity])
    return finish(ax, legend)


def _channel_points(ax: Axes, data: DataFrame, by: str) -> None:
    """Draw the ``value`` of every channel of every layer, the groups ``by`` side by side, and a bar at each median."""
    for look, rows, place in side_by_side(data, by, "layer", 0.36):
        ax.scatter(place, rows.value, s=7, alpha=0.5, linewidths=0, rasterized=True, **look.points)
        median = rows.value.groupby(place).median()
        ax.hlines(median, median.index - 0.15, median.index + 0.15, color="black", linewidth=1.2)
    layer_ticks(ax, data.layer.unique())
