"""What quantization does inside a network: values, scales and errors of layers and of their channels."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from pandas import DataFrame

from granq.measure.running import DEAD
from granq.show.style import DASHES, ROLES, Ax, finish, in_words, plain_log, role, select, short_layer, side_by_side

DISTORTION_LABELS = {"distribution": "share of values above", "error": "RMS error"}
METRIC_LABELS = {"mse": "mean square error", "sqnr_db": "SQNR (dB)", "cosine_similarity": "cosine similarity"}
SENSITIVITY_LABELS = {"kl": "KL to the teacher (nats)", "lost": "accuracy lost (points)", "recovered": "KL recovered"}
SQNR_CEILING = 60.0  # decibels; beyond it (1x1 kernels with their own scale reach 150) points sit on the upper edge
GAP_LABELS = {"ks_distance": "KS distance", "mean": "shift of the mean\n(in std)", "variance": "ratio of variances"}


def plot_activation_distortion(
    data: DataFrame, *, layer: str | None = None, bits: int | None = None, quantity: str = "distribution",
    legend: bool = True, ax: Ax = None,
) -> Axes:  # fmt: skip
    """Draw ``measure_activation_distortion`` at one ``layer`` and ``bits``: every granularity and full precision.

    ``"distribution"`` is the share of values above each activation, in which quantization levels are stairs, without
    the bin of the zeros. ``"error"`` is by activation value, where at least 1 value in 100,000 lies. Both leave out the
    last 0.2 % of the values. The title of the former holds the SQNR in the order of the legend.
    """
    ax = ax or plt.gca()
    rows = select(data, layer=layer, bits=bits).copy()
    edges = np.array([*rows.bin_left.unique(), rows.bin_right.max()])
    title = f"{short_layer(rows.layer.iloc[0])}, {rows.bits.iloc[0]} bits"
    above = rows[["density_full_precision", "density_quantized"]].mul(rows.bin_right - rows.bin_left, axis=0)
    rows[["full", "quantized"]] = above[::-1].groupby(rows.granularity).cumsum()
    groups = [(in_words(str(name)), part) for name, part in rows.groupby("granularity", sort=False)]
    full = groups[0][1].full.to_numpy()
    ax.set_xlim(edges[0], edges[max(1, int((full > 0.002).sum()))])
    if quantity == "error":
        for look, part in groups:
            part = part[part.density_full_precision * (part.bin_right - part.bin_left) >= 1e-5]
            ax.plot((part.bin_left + part.bin_right) / 2, part.rms_error, markevery=8, **look.line)
        ax.set_ylim(0)
    else:
        ax.stairs(full, edges, fill=True, color="#d9d9dc", label="full precision")
        for look, part in groups:
            style = dict(color=look.color, linestyle=look.dash, linewidth=1, label=look.label)
            ax.stairs(part.quantized, edges, baseline=None, **style)
        ax.set_ylim(0, 1.15 * full[1] or 1)
        title += "\nSQNR " + ", ".join(f"{part.sqnr_db.iloc[0]:.1f}" for _, part in groups) + " dB"
    ax.set(xlabel="activation", ylabel=DISTORTION_LABELS[quantity], title=title)
    return finish(ax, legend, fontsize=6)


def plot_layer_error(
    data: DataFrame, *, metric: str = "sqnr_db", mode: str = "accumulated", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_layer_error`` over the layers, one line a scheme; rows of single channels are left out.

    ``mode`` is ``"local"`` (clean input of every layer) or ``"accumulated"`` (quantized input).
    """
    whole = data[data.channel.isna()] if "channel" in data else data
    rows = select(whole, mode=mode, weight_bits=None, act_bits=None)
    where = "local: clean input" if mode == "local" else "accumulated: quantized input"
    known = rows.weight_bits.iloc[0] + rows.act_bits.iloc[0]  # 0 of what was quantized before
    title = where + (f", W{rows.weight_bits.iloc[0]}A{rows.act_bits.iloc[0]}" if known else "")
    ax = _layer_lines(ax, rows.assign(sqnr_db=rows.sqnr_db.clip(upper=SQNR_CEILING)), "scheme", metric, title)
    return finish(ax, legend, ncols=2)


def plot_sensitivity(
    data: DataFrame, *, metric: str = "kl", kind: str | None = None, bits: int | None = None, legend: bool = True,
    ax: Ax = None,
) -> Axes:  # fmt: skip
    """Draw ``measure_sensitivity`` over the layers: one line for weights, one for activations and one for both."""
    kind = kind or next(iter(data.kind[data[metric].notna()]), None)
    rows = select(data, scheme=None, kind=kind, bits=bits)
    where = {"alone": "this layer alone", "all_but": "all but this layer", "patched": "all, clean input here"}
    title = f"{where[rows.kind.iloc[0]]}, {rows.bits.iloc[0]} bits, n = {rows.images.iloc[0]} images"
    return finish(_layer_lines(ax, rows, "part", metric, title), legend)


def _layer_lines(ax: Ax, data: DataFrame, by: str, metric: str, title: str) -> Axes:
    """Draw ``metric`` over the layers, a line for every group ``by``, with its interval where there is one."""
    ax, layers = ax or plt.gca(), list(data.layer.unique())
    for i, (name, rows) in enumerate(data.groupby(by, sort=False)):
        x, y, look = rows.layer.map(layers.index), rows[metric], role(str(name)).line
        look |= {} if name in ROLES else {"linestyle": DASHES[i % 4]}
        if f"{metric}_low" in data:
            ax.errorbar(x, y, (y - rows[f"{metric}_low"], rows[f"{metric}_high"] - y), elinewidth=0.5, **look)
        else:
            ax.plot(x, y, **look)
    ax.set_xticks(range(len(layers)), [*map(short_layer, layers)], rotation=90, fontsize=6)
    labels = METRIC_LABELS | SENSITIVITY_LABELS
    ax.set(title=title, ylabel=labels[metric], yscale="log" if metric == "mse" else "linear")
    if metric == "kl":
        plain_log(ax)
    return ax


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
    ax.set(title=in_words(name).label.replace(" (", "\n("), xlabel="channel", ylabel="image")
    ax.locator_params(integer=True, nbins=4)
    if colorbar:
        plain_log(ax.figure.colorbar(mesh, ax=ax, label="scale (step, in units of the activation)").ax)
    return ax


def plot_data_flow(data: DataFrame, *, ax: Ax = None) -> Axes:
    """Draw ``measure_data_flow`` as the paper's method figure: rows of x, minima and maxima, s and z, rows of x_q."""
    ax = ax or plt.gca()
    vectors = data.groupby("channel", sort=False)[["low", "high", "scale_inv", "zero_point"]].first()
    rows, norm = len(vectors), Normalize(data.x.min(), data.x.max())
    for left, column, title in ((0, "x", "$x$"), (74, "value", "$x_q$")):
        grid = data.pivot(index="channel", columns="pixel", values=column)
        ax.imshow(grid, extent=(left, left + 28, rows, 0), aspect="auto", interpolation="nearest", norm=norm)
        ax.text(left + 14, -0.8, f"{title}, {grid.shape[1]} pixels of each channel", ha="center")
    for left, name, title in zip((34, 40, 61, 67), vectors, ("min", "max", "$s$", "$z$"), strict=True):
        ax.text(left, -0.8, title, ha="center")
        for y, value in enumerate(vectors[name]):
            ax.text(left, y + 0.5, f"{value:.3g}", ha="center", va="center", fontsize=6)
    box = dict(boxstyle="round", facecolor="none", edgecolor="black")
    ax.text(50.5, rows / 2, "scale and\nzero-point\ncalibration", ha="center", va="center", rotation=90, bbox=box)
    for start, end in ((29, 31), (43, 45.5), (55.5, 58), (70.5, 73)):
        ax.annotate("", (end, rows / 2), (start, rows / 2), arrowprops={"arrowstyle": "->"})
    ax.set_yticks([0.5 + y for y in range(rows)], [f"$x^{{{c + 1}}}$" for c in vectors.index], fontsize=6)
    ax.set(xlim=(0, 102), ylim=(rows, -2), xticks=[])
    where = f"{short_layer(data.layer.iloc[0])}, one image, {data.bits.iloc[0]} bits"
    ax.set_title(f"{where}, a scale $s$ = 1 / step for each channel", pad=2)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_channel_scales(data: DataFrame, *, ax: Ax = None) -> Axes:
    """Draw ``measure_channel_scales`` of several sources: the scale of every channel, with a bar at each median."""
    ax, data = ax or plt.gca(), select(data, granularity=None, bits=None)
    _channel_points(ax, data.assign(value=data.scale.where(data.scale > DEAD)), "source")
    plain_log(ax)
    ax.set_ylabel(f"scale at {data.bits.iloc[0]} bits\n(step, in units of the activation)")
    one = f"one scale {in_words(data.granularity.iloc[0]).label}"
    ax.set_title(f"{one}, n = {data.images.min()} images of each source")
    return finish(ax, True)


def plot_synthetic_gap(data: DataFrame, *, quantity: str = "ks_distance", legend: bool = True, ax: Ax = None) -> Axes:
    """Draw ``measure_synthetic_gap``: every channel a point, with a bar at each median, by comparison (``pair``)."""
    ax, data = ax or plt.gca(), data if "pair" in data else data.assign(pair="synthetic against real")
    live = data.variance_real.where(data.variance_real > 0)
    values = {
        "ks_distance": data.ks_distance,
        "mean": (data.mean_synthetic - data.mean_real).abs() / live**0.5,
        "variance": (data.variance_synthetic / live).where(data.variance_synthetic > 0),  # for the log
    }[quantity]
    _channel_points(ax, data.assign(value=values.where(data.variance_real + data.variance_synthetic > 0)), "pair")
    if quantity == "variance":
        plain_log(ax)
    ax.set_ylabel(GAP_LABELS[quantity])
    return finish(ax, legend)


def _channel_points(ax: Axes, data: DataFrame, by: str) -> None:
    """Draw the ``value`` of every channel of every layer, the groups ``by`` side by side, and a bar at each median."""
    for look, rows, place in side_by_side(data, by, "layer", 0.36):
        ax.scatter(place, rows.value, s=7, alpha=0.5, linewidths=0, rasterized=True, **look.points)
        median = rows.value.groupby(place).median()
        ax.hlines(median, median.index - 0.15, median.index + 0.15, color="black", linewidth=1.2)
    layers = data.layer.unique()
    ax.set_xticks(range(len(layers)), [*map(short_layer, layers)], rotation=90, fontsize=6)
