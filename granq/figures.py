"""Pictures: every ``plot_*`` takes a data frame and ``ax=None``, draws into that Axes and returns it.

A plot touches no file, model, random number or global style. A frame that holds several panels (layers, bits,
granularities, metrics) is drawn one panel a call, chosen by keyword, by default the first; axis limits and colors come
from the whole frame. Everywhere ``ax`` defaults to the current Axes, and ``legend=False`` or ``colorbar=False`` leaves
these to the caller.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from granq.analysis import DEAD, decode_pixels
from granq.checks import distinct, needs, one_of
from granq.files import write_csv

STYLE = Path(__file__).with_name("granq.mplstyle")


class Role(NamedTuple):
    """How a role looks in every figure: color, marker and dash, so that no meaning hangs on color alone."""

    label: str
    color: str
    marker: str
    dash: Any = "-"

    @property
    def line(self) -> dict[str, Any]:
        """The look as keywords of ``Axes.plot``."""
        return dict(color=self.color, linestyle=self.dash, marker=self.marker, markersize=3, linewidth=1)


#: petroff6 (arXiv 2107.02270), safe for color-vision deficiencies; tests/test_figures.py computes the distances.
_GREY, _BLUE, _ORANGE, _RED, _PLUM, _VIOLET = "#9c9ca1", "#5790fc", "#f89c20", "#e42536", "#964a8b", "#7a21dd"
ROLES = {
    "full precision": Role("full precision", _GREY, "s", ":"),
    "layerwise": Role("layerwise", _BLUE, "o", "--"),
    "per_channel": Role("per_channel", _ORANGE, "^", "-."),
    "release": Role("release (GranQ)", _RED, "D", "-"),
    "strict": Role("strict", _PLUM, "v", (0, (4, 1, 1, 1, 1, 1))),
    "foldable": Role("foldable", _VIOLET, "P", (0, (1, 1))),
    "synthetic": Role("synthetic images", "#222222", "X", "-"),
    "real": Role("real images", _GREY, "s", ":"),
}
_GRANULARITY_ROLES = {
    "per_tensor": ROLES["layerwise"]._replace(label="per tensor (layer-wise)"),
    "per_channel": ROLES["per_channel"]._replace(label="per channel"),
    "per_sample": ROLES["strict"]._replace(label="per image"),
    "per_sample_channel": ROLES["release"]._replace(label="per image and channel (GranQ)"),
}
METRIC_LABELS = {"mse": "mean square error", "sqnr_db": "SQNR (dB)", "cosine_similarity": "cosine similarity"}
SCALING_LABELS = {
    "median_ms": "time (ms)",
    "peak_mb": "peak memory (MB)",
    "scale_multiplications": "scale multiplications",
}
TRAINING_LABELS = {
    "generator_loss": "generator loss",
    "student_loss": "student loss",
    "bn_loss": "BatchNorm distance",
    "teacher_top1": "teacher on synthetic\nimages (%)",
    "test_top1": "student on test\nimages (%)",
}
GAP_LABELS = {
    "ks_distance": "Kolmogorov-Smirnov\ndistance",
    "mean": "shift of the mean\n(standard deviations)",
    "variance": "ratio of variances",
}
TRUE_BITS_LABELS = {
    "bits_per_weight": "true bits per weight (dotted: the label)",
    "quantized_percent": "weights really quantized (%)",
}
LEAST_LOST = 0.7  # points; about the standard error of the accuracy on 2,000 images
SHOWN_LABELS = 10  # of plot_synthetic_images: more are too small to be seen
METHODS_DIFFER = "name what else tells these runs apart in scheme, as registry.method_name does"
SQNR_CEILING = 60.0  # decibels; beyond it (1x1 kernels with their own scale reach 150) points sit on the upper edge


def role(name: str) -> Role:
    """Look of a scheme or image source; "strict + BatchNorm" has the color of strict, an unknown name is black."""
    if (base := name.partition(" + ")[0]) in ROLES:
        return ROLES[name] if name in ROLES else ROLES[base]._replace(label=name, marker="X")
    return Role(name, "#222222", "X")


def granularity_role(name: str) -> Role:
    """Look of a granularity of activations: that of the scheme which is built on it."""
    return _GRANULARITY_ROLES.get(name, Role(name, "#222222", "X"))


@needs("layer channel granularity image scale")
def plot_granularity_maps(
    data: pd.DataFrame,
    *,
    layer: str | None = None,
    granularity: str | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Scales of every image and channel in front of one layer under one granularity, as a map; constant ones are grey.

    Args:
        data: of ``measure_scale_maps``.
        layer: default the first.
        granularity: default the finest, the last in the data. Colors share the limits of all granularities.
    """
    ax = ax or plt.gca()
    data = _select(data, layer=layer)
    data = data.assign(scale=_live(data))
    rows = _select(data, granularity=granularity or data.granularity.iloc[-1])
    grid = rows.pivot(index="image", columns="channel", values="scale")
    norm = LogNorm(data.scale.min(), data.scale.max())
    colors = plt.get_cmap("viridis").with_extremes(bad="#d9d9dc")
    mesh = ax.imshow(grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    label = granularity_role(rows.granularity.iloc[0]).label.replace(" and ", "\nand ").replace(" (layer", "\n(layer")
    image, channel = ("sample" in rows.granularity.iloc[0], "channel" in rows.granularity.iloc[0])
    count = (rows.image.nunique() if image else 1) * (rows.channel.nunique() if channel else 1)
    ax.set(title=f"{label}\n{count} scale{'s' * (count > 1)}", xlabel="channel", ylabel="image")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if colorbar:
        plain_log(ax.figure.colorbar(mesh, ax=ax, label="scale (step, in units of the activation)").ax.yaxis)
    return ax


@needs("layer bits granularity bin_left bin_right density_full_precision density_quantized rms_error sqnr_db")
def plot_activation_distortion(
    data: pd.DataFrame,
    *,
    layer: str | None = None,
    bits: int | None = None,
    quantity: str = "distribution",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Activations of one layer at one bit width, full precision against every granularity.

    Args:
        data: of ``measure_activation_distortion``.
        layer: default the first.
        bits: default the first.
        quantity: ``"distribution"``, the share of values above each activation, in which quantization levels are
            stairs, up to the activation that 0.2 % of the values exceed and without the lowest bin, which holds the
            zeros; the title then holds the SQNR of each granularity, in the order of the legend. Or ``"error"``, root
            mean square by activation value, where at least 1 value in 100,000 lies.
    """
    one_of("quantity", quantity, ("distribution", "error"))
    ax = ax or plt.gca()
    rows = _select(data, layer=layer, bits=bits)
    edges = [*rows.drop_duplicates("bin_left").bin_left, rows.bin_right.max()]
    groups = [(granularity_role(str(name)), part) for name, part in rows.groupby("granularity", sort=False)]
    title = f"{short_layer(rows.layer.iloc[0])}, {rows.bits.iloc[0]} bits"
    if quantity == "distribution":
        above = _share_above(groups[0][1].density_full_precision, edges)
        ax.stairs(above, edges, fill=True, color="#d9d9dc", label="full precision")
        ax.set_xlim(edges[0], edges[max(1, int((above > 0.002).sum()))])
        ax.set_ylim(0, 1.15 * above[1] or 1)
        for look, part in groups:
            above = _share_above(part.density_quantized, edges)
            ax.stairs(above, edges, color=look.color, linestyle=look.dash, linewidth=1, label=look.label, baseline=None)
        title += "\nSQNR " + ", ".join(f"{part.sqnr_db.iloc[0]:.1f}" for _, part in groups) + " dB"
    else:
        for look, part in groups:
            part = part[part.density_full_precision * (part.bin_right - part.bin_left) >= 1e-5]
            ax.plot((part.bin_left + part.bin_right) / 2, part.rms_error, markevery=8, label=look.label, **look.line)
        ax.set_ylim(0)
    ylabel = "share of values above" if quantity == "distribution" else "RMS error"
    ax.set(xlabel="activation", ylabel=ylabel, title=title)
    if legend:
        ax.legend(fontsize=6)
    return ax


@needs("layer bits granularity source image rank bin_left bin_right count count_quantized lowest step sqnr_db")
def plot_channel_histogram(
    data: pd.DataFrame,
    *,
    layer: str | None = None,
    bits: int | None = None,
    granularity: str | None = None,
    source: str | None = None,
    image: int = 0,
    rank: int = 0,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """One channel of one image, full precision and quantized, with a tick at every level in reach.

    Args:
        data: of ``measure_channel_histograms``.
        layer: default the first, as for bits, granularity and source.
        bits: bit width.
        granularity: which values share the scale.
        source: "synthetic" or "real".
        image: its number.
        rank: of the channel, 0 is the narrowest.
    """
    ax = ax or plt.gca()
    rows = _select(data, layer=layer, bits=bits, granularity=granularity, source=source, image=image, rank=rank)
    first = rows.iloc[0]
    look = granularity_role(first.granularity)
    edges = [*rows.bin_left, rows.bin_right.iloc[-1]]
    width = edges[-1] - edges[0]
    ax.stairs(rows["count"], edges, fill=True, color="#c9c9cd", label="full precision")
    ax.stairs(rows.count_quantized, edges, color=look.color, linewidth=1.5, label="quantized")
    levels = first.lowest + first.step * np.arange(2**first.bits)
    levels = levels[(levels >= edges[0] - 1e-4 * width) & (levels <= edges[-1] + 1e-4 * width)]
    if len(levels) <= 32:  # more ticks would be a bar
        ax.plot(levels, np.full(len(levels), 0.5), "|", color="black", markersize=9, label="levels")
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlim=(edges[0] - 0.03 * width, edges[-1] + 0.03 * width), ylim=(0, 12 * rows["count"].max()))
    title = f"{role(first.source).label}, {first.bits} bits: {first.sqnr_db:.1f} dB\none scale {look.label}"
    ax.set(xlabel="activation", ylabel="values", title=title)
    if legend:
        ax.legend(loc="upper right", ncols=3)
    return ax


@needs("layer source granularity bits images scale")
def plot_channel_scales(
    data: pd.DataFrame, *, granularity: str | None = None, bits: int | None = None, ax: Axes | None = None
) -> Axes:
    """Scale of every channel of every layer, sources (synthetic, real) side by side, a bar at each median.

    Args:
        data: of ``measure_channel_scales``, several sources in one frame.
        granularity: default the first.
        bits: default the first.
    """
    ax = ax or plt.gca()
    data = _select(data, granularity=granularity, bits=bits)
    looks = {s: role(s)._replace(label=f"{role(s).label}, n = {n}")
             for s, n in data.drop_duplicates("source")[["source", "images"]].to_numpy()}  # fmt: skip
    _channel_points(ax, data, _live(data), data.source, looks)
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    ax.set_ylabel(f"scale at {data.bits.iloc[0]} bits\n(step, in units of the activation)")
    ax.set_title(f"one scale {granularity_role(data.granularity.iloc[0]).label.split(' (')[0]}", loc="left")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(looks), markerscale=1.5, borderaxespad=0)
    return ax


@needs("layer scheme mode weight_bits act_bits", option="metric")
def plot_layer_error(
    data: pd.DataFrame,
    *,
    metric: str = "sqnr_db",
    mode: str = "accumulated",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Error of every layer's output, one line a scheme; rows of single channels in the frame are left out.

    Args:
        data: of ``measure_layer_error``.
        metric: ``"sqnr_db"``, ``"mse"`` or ``"cosine_similarity"``.
        mode: ``"local"`` (clean input) or ``"accumulated"`` (quantized input).
    """
    one_of("metric", metric, METRIC_LABELS)
    ax = ax or plt.gca()
    whole = data[data.channel.isna()] if "channel" in data else data
    rows = _select(whole, mode=mode)
    distinct(rows, "scheme", "layer")
    layers = list(dict.fromkeys(whole.layer))
    for scheme, part in rows.groupby("scheme", sort=False):
        look = role(str(scheme))
        values = part.set_index("layer")[metric].reindex(layers)
        ax.plot(range(len(layers)), _shown(values, metric), label=look.label, **look.line)
    where = "local: clean input" if mode == "local" else "accumulated: quantized input"
    ax.set_title(f"{where}, W{rows.weight_bits.iloc[0]}A{rows.act_bits.iloc[0]}")
    _layer_ticks(ax, layers)
    return _finish_error(ax, metric, legend)


@needs("layer channel scheme mode sqnr_db", option="metric")
def plot_channel_error(
    data: pd.DataFrame,
    *,
    metric: str = "sqnr_db",
    layer: str | None = None,
    mode: str = "local",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Error of every output channel of one layer, worst first, one line a scheme.

    Args:
        data: of ``measure_layer_error(per_channel=True)``.
        metric: as in ``plot_layer_error``.
        layer: default the layer that holds the channel with the lowest SQNR.
        mode: ``"local"`` or ``"accumulated"``.
    """
    one_of("metric", metric, METRIC_LABELS)
    ax = ax or plt.gca()
    rows = _select(data[data.channel.notna()], mode=mode)
    rows = _select(rows, layer=layer or rows.layer.iloc[np.nanargmin(rows.sqnr_db)])
    for scheme, part in rows.groupby("scheme", sort=False):
        look = role(str(scheme))
        values = np.sort(_shown(part[metric], metric))[:: -1 if metric == "mse" else 1]
        every = max(1, len(values) // 12)
        ax.plot(range(1, len(values) + 1), values, markevery=every, label=look.label, **look.line)
    ax.set(xlabel="output channel, worst first", title=f"{short_layer(rows.layer.iloc[0])}, {mode}, per channel")
    return _finish_error(ax, metric, legend)


def _finish_error(ax: Axes, metric: str, legend: bool) -> Axes:
    ax.set_ylabel(METRIC_LABELS[metric])
    if metric == "mse":
        ax.set_yscale("log")
    if legend:
        ax.legend(ncols=2)
    return ax


@needs("shape method median_ms q25_ms q75_ms")
def plot_quantizer_latency(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Time of one fake quantization per tensor shape and method: median, with the quartiles as a bar.

    Args:
        data: columns method, shape, median_ms, q25_ms, q75_ms. The method ``copy`` is the floor: the same bytes cloned.
    """
    ax = ax or plt.gca()
    shapes = list(dict.fromkeys(data["shape"]))
    looks = _looks(data.method)
    for (method, look), offset in zip(looks.items(), _dodge(len(looks), 0.12), strict=True):
        rows = data[data.method == method]
        _medians(ax, _positions(rows["shape"], shapes) + offset, rows, look._replace(dash="none"))
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    ax.set_xticks(range(len(shapes)), [v.strip("()").replace(", ", "\u00d7") for v in shapes], rotation=30, ha="right")
    ax.set(xlabel="activation shape (N\u00d7C\u00d7H\u00d7W)", ylabel="time (ms)\nmedian and quartiles")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


@needs("execution channels batch q25_ms q75_ms", option="quantity")
def plot_scaling_latency(
    data: pd.DataFrame,
    *,
    against: str = "channels",
    quantity: str = "median_ms",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Time, memory or counts of the executions of one quantized convolution against channels or batch.

    Args:
        data: columns execution, channels, batch, and the quantities in ``SCALING_LABELS``; q25_ms and q75_ms with the
            time. The other one of channels and batch is held at its most frequent value.
        against: ``"channels"`` or ``"batch"``.
        quantity: the column on the vertical axis.
    """
    one_of("against", against, ("channels", "batch"))
    one_of("quantity", quantity, SCALING_LABELS)
    ax = ax or plt.gca()
    other = "batch" if against == "channels" else "channels"
    rows = data[data[other] == data[other].mode().iloc[0]]
    for execution, look in _looks(data.execution).items():
        part = rows[rows.execution == execution].sort_values(against)
        if quantity == "median_ms":
            _medians(ax, part[against], part, look)
        else:
            ax.plot(part[against], part[quantity], label=look.label, **look.line)
    ax.set_xscale("log", base=2)
    if (rows[quantity] > 0).all():
        ax.set_yscale("log")
    elif (rows[quantity] > 0).any():  # executions that need none lie on the axis, a decade below the fewest of others
        low, high = np.log10([rows[quantity][rows[quantity] > 0].min(), rows[quantity].max()])
        powers = 10.0 ** np.arange(np.floor(low), np.ceil(high) + 1)
        ax.set_yscale("symlog", linthresh=powers[0])
        ax.set_yticks([0, *powers])  # no tick between 0 and the first power, where there is no room
        ax.set_ylim(0, powers[-1])
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set(xlabel=f"{against} ({other} {rows[other].iloc[0]})", ylabel=SCALING_LABELS[quantity])
    if legend:
        ax.legend()
    return ax


@needs("dataset network scheme bits seed teacher_top1 ptq_top1 last_top1")
def plot_accuracy_bits(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Test accuracy over bit widths per scheme: every seed a point, open before training, filled after the last epoch.

    Args:
        data: rows of ``granq quantize``: scheme, bits, ptq_top1, last_top1, teacher_top1, seed, dataset, network.
            Rows with a ``source`` are published results, drawn as grey dashes.
    """
    ax = ax or plt.gca()
    published = data[data.source.notna()] if "source" in data else data[:0]
    measured = data.drop(published.index)
    if measured.empty:
        raise ValueError("plot_accuracy_bits got published results only: it needs rows of granq quantize")
    if measured.seed.isna().any():
        raise ValueError("plot_accuracy_bits: a row without a seed is a published result and needs its source")
    if len(measured[["dataset", "network"]].drop_duplicates()) > 1:
        raise ValueError("plot_accuracy_bits: rows of several datasets or networks, which belong to several plots")
    distinct(measured, "scheme", "bits", "seed", hint=METHODS_DIFFER)
    bits = sorted(measured.bits.unique())
    order = {name: i for i, name in enumerate(ROLES)}
    schemes = sorted(set(measured.scheme), key=lambda s: (order.get(s.partition(" + ")[0], len(order)), s))
    width = 0.8 / (len(schemes) + (len(published) > 0))
    for i, scheme in enumerate(schemes):
        look = role(scheme)
        for x, name in enumerate(bits):
            rows = measured[(measured.scheme == scheme) & (measured.bits == name)].sort_values("seed")
            start = x - 0.4 + (i + 0.3) * width + _dodge(len(rows), 0.08 * width)
            style: dict[str, Any] = dict(s=16, marker=look.marker, linewidths=0.8)
            ax.scatter(start, rows.ptq_top1, facecolors="none", edgecolors=look.color, **style)
            label = look.label if x == 0 else None
            ax.scatter(start + 0.4 * width, rows.last_top1, color=look.color, label=label, **style)
    if len(published):
        at = _positions(published.bits, bits) + 0.4 - width / 2
        style = dict(marker="_", s=40, linewidths=0.8, color="#6b6b70")
        ax.scatter(at, published.last_top1, label="published, own teachers", **style)
    teacher = measured.teacher_top1.mean()
    ax.axhline(teacher, color=_GREY, linestyle=":", label=f"teacher, {teacher:.1f} %", zorder=0)
    ax.scatter([], [], s=16, facecolors="none", edgecolors="black", label="open: before training")
    first, counts = measured.iloc[0], measured.groupby(["scheme", "bits"]).seed.nunique()
    seeds = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    ax.set_xticks(range(len(bits)), bits)
    title = f"{dataset_name(first.dataset)}, {first.network}, n = {seeds} seed{'s' if counts.max() > 1 else ''}"
    ax.set(ylabel="test top-1 (%)", title=title, xlim=(-0.5, len(bits) - 0.5))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


@needs("weights activations ranges bits top1")
def plot_granularity_factorial(
    data: pd.DataFrame,
    *,
    bits: int | None = None,
    ranges: str | None = None,
    epochs: int | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy for every weight granularity (rows) and activation granularity (columns), as numbers on a map.

    Args:
        data: columns weights, activations (granularities), ranges (static, dynamic; none with full-precision
            activations, which belong to both), bits, epochs (0 without training; optional), top1; rows that differ in
            nothing else (seeds) are averaged. Colors are points below the best row of the frame; what no row has stays
            empty. With top1_low and top1_high the title says half of the widest interval.
        bits: default the lowest.
        ranges: default the first.
        epochs: default the fewest.
    """
    ax = ax or plt.gca()
    data = data if "epochs" in data else data.assign(epochs=0)
    ranges = ranges or next((v for v in data.ranges if v != "none"), "none")
    rows = _select(
        data[data.ranges.isin([ranges, "none"])],
        bits=data.bits.min() if bits is None else bits,
        epochs=data.epochs.min() if epochs is None else epochs,
    )
    grid = rows.pivot_table(index="weights", columns="activations", values="top1", sort=False)
    grid = grid.reindex(columns=list(dict.fromkeys(data.activations)))  # a column that no cell has stays empty
    best = data.top1.max()
    # points lost, on a logarithmic scale: from 4 bits on the cells differ by tenths of what 2 bits cost
    norm = LogNorm(LEAST_LOST, max(best - data.top1.min(), 10 * LEAST_LOST), clip=True)
    sns.heatmap(
        (best - grid).clip(lower=LEAST_LOST),
        annot=grid, fmt=".1f", annot_kws={"fontsize": 5}, cmap="cividis_r", norm=norm, cbar=False,
        xticklabels=[_plain(v) for v in grid.columns], yticklabels=[_plain(v) for v in grid.index], ax=ax,
    )  # fmt: skip
    ax.tick_params(labelsize=6)
    trained = ", trained" if rows.epochs.iloc[0] else ""
    widest = f"\nat most \u00b1{(rows.top1_high - rows.top1_low).max() / 2:.1f}" if "top1_high" in rows else ""
    ax.set(xlabel="activations", ylabel="weights", title=f"{rows.bits.iloc[0]} bits, {ranges}{trained}{widest}")
    if colorbar:
        plain_log(ax.figure.colorbar(ax.collections[0], ax=ax, label="points below the best").ax.yaxis)
    return ax


@needs("network scheme weight_bits", option="quantity")
def plot_true_bits(
    data: pd.DataFrame, *, quantity: str = "bits_per_weight", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """What a label such as W3A3 comes to: a point for every network and scheme.

    Args:
        data: columns network, scheme, weight_bits, bits_per_weight (scales and zero points counted in) and
            quantized_percent (share of the weights that take at most 2^bits values in a group of several).
        quantity: ``"bits_per_weight"`` or ``"quantized_percent"``.
    """
    one_of("quantity", quantity, TRUE_BITS_LABELS)
    ax = ax or plt.gca()
    networks = list(dict.fromkeys(data.network))
    groups = data.groupby("scheme", sort=False)
    for (scheme, rows), offset in zip(groups, _dodge(len(groups), 0.15), strict=True):
        look, y = role(str(scheme)), _positions(rows.network, networks) + offset
        ax.scatter(rows[quantity], y, color=look.color, marker=look.marker, s=20, label=look.label)
    label = data.weight_bits.iloc[0] if quantity == "bits_per_weight" else 100
    ax.axvline(label, color=_GREY, linestyle=":", zorder=0)
    ax.set_yticks(range(len(networks)), networks)
    ax.set(ylim=(len(networks) - 0.5, -0.5), xlabel=TRUE_BITS_LABELS[quantity])
    if legend:
        ax.legend()
    return ax


@needs("epoch warmup", option="quantity")
def plot_training_curves(
    data: pd.DataFrame, *, quantity: str = "test_top1", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """One quantity over the epochs, a line for every run; the warm-up (generator alone) is shaded.

    Args:
        data: histories of runs: epoch, warmup, and the quantities in ``TRAINING_LABELS``; scheme, bits, recipe and
            seed tell several runs apart.
        quantity: column to draw.
    """
    one_of("quantity", quantity, TRAINING_LABELS)
    ax = ax or plt.gca()
    data = data if "scheme" in data else data.assign(scheme="student")
    several = [key for key in ("bits", "recipe") if key in data and data[key].nunique() > 1]
    runs = [key for key in ("scheme", *several, "seed") if key in data]
    distinct(data, *runs, "epoch")
    warmup = data.warmup.astype(bool)
    # the student's loss is measured in the warm-up too, but not yet trained on
    shown = data[~warmup] if quantity == "student_loss" else data
    dashes: dict[str, dict[str, Any]] = {}  # by scheme and label
    for _, rows in shown.groupby(runs, sort=False, dropna=False):
        look, differs = role(str(rows.scheme.iloc[0])), [str(rows[key].iloc[0]) for key in several]
        label, own = " ".join([look.label, *differs]), dashes.setdefault(look.label, {})
        text = None if label in own else label  # once, not for every seed
        free = [look.dash, *(dash for dash in ("-", "--", ":", "-.") if dash != look.dash)]
        style = look.line | {"linestyle": own.setdefault(label, free[len(own) % len(free)])}
        ax.plot(rows.epoch, rows[quantity], label=text, **style)
    start, end = data.epoch.min() - 0.5, data.epoch.max() + 0.5
    if warmup.any():
        until = data.epoch[warmup].max() + 0.5
        ax.axvspan(start, until, color="#ececee", zorder=0, linewidth=0, label="warm-up: generator alone")
    ax.set(xlabel="epoch", title=TRAINING_LABELS[quantity], xlim=(start, end))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.ticklabel_format(axis="y", useOffset=False)
    if legend:
        ax.legend()
    return ax


@needs("label sample pixels size confidence")
def plot_synthetic_images(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Generated images, a column for every label and a row for every epoch (and sample), teacher's confidence below.

    Args:
        data: of ``measure_generated_images``; a column ``epoch`` stacks several snapshots, a column ``name`` names the
            labels. Of more than 10 labels the first 10 are drawn.
    """
    ax = ax or plt.gca()
    every = sorted(data.label.unique())
    data = data[data.label.isin(every[:SHOWN_LABELS])]
    keys = [key for key in ("epoch", "sample") if key in data]
    distinct(data, *keys, "label")
    groups = [rows.sort_values("label") for _, rows in data.groupby(keys)]
    size, classes = int(data["size"].iloc[0]), data.label.nunique()
    cell, line = round(size * 1.06), round(size * 1.36)  # a gap beside each image and a line of text below
    canvas = np.full((line * len(groups), cell * classes, 3), 255, np.uint8)
    words = []
    for y, rows in enumerate(groups):
        for x, row in enumerate(rows.itertuples()):
            canvas[y * line : y * line + size, x * cell : x * cell + size] = decode_pixels(str(row.pixels), size)
            at = x * cell + size / 2, y * line + size * 1.2
            ax.text(*at, f"{row.confidence:.0%}", ha="center", va="center", fontsize=6)
        said = [f"epoch {rows['epoch'].iloc[0]}"] if "epoch" in data else []
        if data["sample"].nunique() > 1:
            said.append(f"sample {rows['sample'].iloc[0] + 1}")
        words.append("\n".join(said))
    ax.imshow(canvas, interpolation="nearest")
    labels = groups[0]["name" if "name" in data else "label"].astype(str)
    ax.set_xticks([x * cell + size / 2 for x in range(classes)], labels, fontsize=6.5)
    ax.set_yticks([y * line + size / 2 for y in range(len(groups))], words)
    ax.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    first = f"the first {SHOWN_LABELS} of {len(every)} labels; " if len(every) > SHOWN_LABELS else ""
    ax.set(xlabel=f"{first}below each image: the teacher's probability of the label that was asked for")
    ax.spines[:].set_visible(False)
    return ax


@needs("layer ks_distance mean_real mean_synthetic variance_real variance_synthetic")
def plot_synthetic_gap(
    data: pd.DataFrame, *, quantity: str = "ks_distance", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """Distance of synthetic from real activations, per layer: every channel a point, a bar at each median.

    Args:
        data: of ``measure_synthetic_gap``; a column ``pair`` holds several comparisons, such as real against real,
            which shows how much of a distance is the sample.
        quantity: ``"ks_distance"``, ``"mean"`` or ``"variance"``.
    """
    one_of("quantity", quantity, GAP_LABELS)
    ax = ax or plt.gca()
    data = data if "pair" in data else data.assign(pair="synthetic against real")
    values = {
        "ks_distance": data.ks_distance,
        "mean": (data.mean_synthetic - data.mean_real).abs() / data.variance_real**0.5,
        "variance": data.variance_synthetic / data.variance_real,
    }[quantity]
    live = data.variance_real > 0
    if quantity == "variance":  # of 0 a logarithmic axis has no place
        live &= data.variance_synthetic > 0
    looks = {p: role("real" if i else "synthetic")._replace(label=p) for i, p in enumerate(dict.fromkeys(data.pair))}
    _channel_points(ax, data, values.where(live), data.pair, looks)
    if quantity == "variance":
        ax.set_yscale("log")
        plain_log(ax.yaxis)
        ax.axhline(1, color=_GREY, linewidth=0.6)
    else:
        ax.set_ylim(0)
    ax.set_ylabel(GAP_LABELS[quantity])
    if legend:
        ax.legend(markerscale=2, ncols=2)
    return ax


@needs("dataset network scheme bits seed teacher_top1 last_top1")
def results_table(data: pd.DataFrame) -> pd.DataFrame:
    """Published and measured accuracies side by side: one row per method and bit width, best first.

    Args:
        data: as for ``plot_accuracy_bits``, of one or several datasets and networks.

    Returns:
        Columns bits, method, kind (measured, published), top1 (percent; mean over seeds, last epoch), std, n (seeds),
        teacher_top1, drop (points below the teacher), dataset, network, source. What a source does not state stays
        empty. ``table_text`` writes it as Markdown or LaTeX.
    """
    data = data if "source" in data else data.assign(source=np.nan)
    own = data[data.source.isna() & data.last_top1.notna()]
    distinct(own, "dataset", "network", "scheme", "bits", "seed", hint=METHODS_DIFFER)
    measured = own.groupby(["dataset", "network", "scheme", "bits"], sort=False, as_index=False).agg(
        top1=("last_top1", "mean"),
        std=("last_top1", "std"),
        n=("seed", "nunique"),
        teacher_top1=("teacher_top1", "mean"),
    )
    measured = measured.assign(kind="measured", source="this repository")
    published = data[data.source.notna()].rename(columns={"last_top1": "top1"}).assign(kind="published")
    table = pd.concat([measured, published.reindex(columns=measured.columns)], ignore_index=True)
    table = table.rename(columns={"scheme": "method"}).assign(drop=table.teacher_top1 - table.top1)
    table = table.sort_values(["bits", "drop", "top1"], ascending=[True, True, False], ignore_index=True)
    return table["bits method kind top1 std n teacher_top1 drop dataset network source".split()]


def table_text(table: pd.DataFrame, form: str) -> str:
    """The frame of ``results_table`` as text.

    Args:
        table: rows to print, in their order.
        form: ``"markdown"`` or ``"latex"`` (a booktabs tabular).

    Raises:
        ValueError: unknown form.
    """
    one_of("form", form, ("markdown", "latex"))
    heads = {"bits": "bits", "method": "method", "kind": "kind", "top1": "top-1 (%)", "std": "std", "n": "n",
             "teacher_top1": "teacher (%)", "drop": "drop (points)", "source": "source"}  # fmt: skip
    shown = table.assign(n=table.n.astype("Int64"))[list(heads)].rename(columns=heads).astype(object)
    shown = shown.map(lambda v: "" if pd.isna(v) else f"{v:.2f}" if isinstance(v, float) else str(v))
    if form == "latex":
        return shown.to_latex(index=False, escape=True, column_format="lllrrrrrl")
    lines = [[*heads.values()], ["---"] * len(heads), *shown.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@needs("bits method kind top1 std teacher_top1 drop n")
def plot_results_table(data: pd.DataFrame, *, bits: str | None = None, ax: Axes | None = None) -> Axes:
    """Points lost against each method's own teacher, one line a method: measured filled, published open.

    Args:
        data: of ``results_table``. Rows whose teacher no source states cannot be placed and are counted below.
        bits: default the first.
    """
    ax = ax or plt.gca()
    every = _select(data, bits=bits)
    rows = every[every["drop"].notna()].iloc[::-1].reset_index(drop=True)
    measured = rows[rows.kind == "measured"]
    names, seeds, networks = [], measured.n.unique(), measured.network.nunique()
    for y, row in enumerate(rows.to_dict("records")):
        own = row["kind"] == "measured"
        look = role(row["method"]) if own else Role(row["method"], "#6b6b70", "o")
        said = [look.label] + [str(row["network"])] * (own and networks > 1)
        names.append(", ".join(said + [f"n = {row['n']:.0f}"] * (own and len(seeds) > 1)))
        spread = None if pd.isna(row["std"]) else row["std"]
        style: dict[str, Any] = dict(
            color=look.color, markerfacecolor=look.color if own else "none", markersize=4, linewidth=1
        )
        ax.errorbar(row["drop"], y, xerr=spread, fmt=look.marker, capsize=2, **style)
    ax.set_yticks(range(len(rows)), names, fontsize=6)
    ax.axvline(0, color=_GREY, linestyle=":", linewidth=1)
    left = len(every) - len(rows)
    more = f"\n{left} published without their teacher" if left else ""
    ax.set(xlabel="points lost")
    same = f", n = {seeds[0]:.0f} where measured" if len(seeds) == 1 else ""
    ax.set_title(f"{every.bits.iloc[0]}{same}{more}", loc="right")  # in the middle it would leave a narrow panel
    ax.margins(x=0.12)
    return ax


def short_layer(name: str) -> str:
    """A layer name without the parts that every layer has: ``features.stage2.unit1.body.conv1.conv`` -> s2.u1.conv1."""
    words = [w for w in name.split(".") if w not in ("features", "body", "layers", "model")]
    if len(words) > 1 and words[-1] in ("conv", "0"):
        words.pop()
    words = ["skip" if w in ("identity_conv", "downsample") else w for w in words]
    return ".".join(re.sub(r"^(stage|unit|layer)(\d+)$", lambda m: m[1][0] + m[2], w) for w in words)


def dataset_name(name: str) -> str:
    """``folder:/some/where`` without the path, which means nothing to a reader."""
    return "image folder" if name.startswith("folder:") else name


@dataclass(frozen=True)
class Panels:
    """One plot as a grid of panels: a row for every combination of ``rows``, a column for every one of ``columns``.

    Each is a keyword of the plot with its values; ``None`` stands for all values of that column in the frame.
    """

    plot: Callable[..., Axes]
    rows: Mapping[str, Sequence[Any] | None] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any] | None] = field(default_factory=dict)
    same_y: bool = False  #: the panels of a row share their vertical axis

    def grid(self, data: pd.DataFrame) -> list[list[Callable[..., Axes]]]:
        """Rows of plots with their keywords set; the last of a row draws the color bar, if they have one."""
        rows, columns = (
            [dict(zip(keys, values, strict=True)) for values in itertools.product(
                *(dict.fromkeys(data[k]) if given is None else given for k, given in keys.items()))]
            for keys in (self.rows, self.columns)
        )  # fmt: skip
        bar = "colorbar" in signature(self.plot).parameters
        ends = [{"colorbar": column is columns[-1]} if bar else {} for column in columns]
        return [
            [
                partial(self.plot, **row, **column, **end) if self._measured(data, row | column) else _no_panel
                for column, end in zip(columns, ends, strict=True)
            ]
            for row in rows
        ]

    @staticmethod
    def _measured(data: pd.DataFrame, values: Mapping[str, Any]) -> bool:
        """Whether a row has these values, as far as they are values of columns."""
        own = {key: value for key, value in values.items() if key in data}
        return bool((data[[*own]] == pd.Series(own, dtype=object)).all(axis=1).any())


def save_figure(
    name: str, data: pd.DataFrame, plot: Callable[..., Axes], folder: Path, size: tuple[float, float] = (3.3, 2.4)
) -> None:
    """CSV first, then a picture drawn from that CSV alone, as SVG and PNG without dates: the same bytes every time.

    Args:
        name: file name without its ending.
        data: the frame.
        plot: draws it.
        folder: made if missing; files of this name in it are replaced.
        size: width and height in inches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", data, float_format="%.6g")
    draw_figure(name, folder, size, [Panels(plot)])


def draw_figure(name: str, folder: Path, size: tuple[float, float], panels: Sequence[Panels]) -> None:
    """Draw ``folder/name.csv`` as SVG and PNG: the grids of ``panels``, which have equal columns, below each other."""
    data = pd.read_csv(folder / f"{name}.csv", dtype={"pixels": str})  # black ones would be the number 0
    if data.empty:
        raise ValueError(f"{folder / name}.csv has no rows")
    grids = [part.grid(data) for part in panels]
    same_y = [part.same_y for part, rows in zip(panels, grids, strict=True) for _ in rows]
    grid = list(itertools.chain(*grids))
    with plt.style.context(STYLE):
        figure = Figure(figsize=size)  # not one of pyplot's: it needs no screen, and nobody has to close it
        axes = figure.subplots(len(grid), len(grid[0]), squeeze=False)
        for ax in itertools.chain(*(row[1:] for row, same in zip(axes, same_y, strict=True) if same)):
            ax.sharey(axes[ax.get_subplotspec().rowspan.start, 0])
        for draw, ax in zip(itertools.chain(*grid), axes.flat, strict=True):
            draw(data, ax=ax)
        if axes.size > 1:
            _share_labels(figure, axes)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def _select(data: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Rows with these values; ``None`` means the first that is left. Raises ValueError if there is none."""
    for column, value in values.items():
        data = data[data[column] == (data[column].iloc[0] if value is None else value)]
        if data.empty:
            raise ValueError(f"the data hold no row with {column} = {value!r}")
    return data


def _no_panel(data: pd.DataFrame, *, ax: Axes) -> Axes:
    ax.set_axis_off()
    return ax


def _live(data: pd.DataFrame) -> pd.Series:
    """Scales, those of constant channels left out. Raises ValueError if no other is there."""
    scale = data.scale.where(data.scale > DEAD)
    if scale.isna().all():
        raise ValueError("every channel is constant on these images: there is no scale to show")
    return scale


def _shown(values: pd.Series, metric: str) -> np.ndarray:
    return np.minimum(values.to_numpy(), SQNR_CEILING) if metric == "sqnr_db" else values.to_numpy()


def _positions(values: pd.Series, order: Sequence[Any]) -> np.ndarray:
    """Place of every value in ``order``, as a coordinate."""
    return pd.Index(order).get_indexer(pd.Index(values)).astype(float)


def _dodge(count: int, width: float) -> np.ndarray:
    """Offsets that put ``count`` things side by side around zero."""
    return (np.arange(count) - (count - 1) / 2) * width


def _channel_points(ax: Axes, data: pd.DataFrame, values: pd.Series, by: pd.Series, looks: dict[str, Role]) -> None:
    """A point for every channel of every layer, the groups of ``by`` side by side, and a bar at each median."""
    layers = list(dict.fromkeys(data.layer))
    for (name, look), offset in zip(looks.items(), _dodge(len(looks), 0.36), strict=True):
        chosen = values[(by == name) & values.notna()]
        layer = data.layer[chosen.index]
        style: dict[str, Any] = dict(s=7, alpha=0.5, linewidths=0, color=look.color, marker=look.marker)
        ax.scatter(_positions(layer, layers) + offset, chosen, label=look.label, rasterized=True, **style)
        center = np.arange(len(layers)) + offset
        median = chosen.groupby(layer).median().reindex(layers)
        ax.hlines(median, center - 0.15, center + 0.15, color="black", linewidth=1.2)
    _layer_ticks(ax, layers)


def _looks(names: pd.Series) -> dict[str, Role]:
    """Looks of methods and executions: that of the scheme they belong to, and of a free one for the others.

    The same method in another layout has its color, and a star.
    """
    belongs = {"copy": "full precision", "release": "release", "pre-scaled": "release", "layerwise": "layerwise"}
    belongs |= {"layer-wise": "layerwise", "folded": "foldable", "channel loop": "per_channel", "textbook": "strict"}
    belongs |= {"accumulation-time, loop": "per_channel", "accumulation-time, grouped": "strict"}
    methods = dict.fromkeys(name.removesuffix(", NHWC") for name in names)
    found = {name: ROLES[belongs[name]] for name in methods if name in belongs}
    black = Role("", "#222222", "X", (0, (2, 1)))
    free = itertools.chain([black], itertools.cycle([r for r in ROLES.values() if r not in found.values()] or [black]))
    labels = {"copy": "copy of the same bytes"}
    looks = {n: (found.get(n) or next(free))._replace(label=labels.get(n, n)) for n in methods}
    starred = {n: looks[n.removesuffix(", NHWC")]._replace(label=n, marker="*") for n in names if n.endswith(", NHWC")}
    return {n: (looks | starred)[n] for n in dict.fromkeys(names)}


def _medians(ax: Axes, x: Any, rows: pd.DataFrame, look: Role) -> None:
    spread = [rows.median_ms - rows.q25_ms, rows.q75_ms - rows.median_ms]
    ax.errorbar(x, rows.median_ms, yerr=spread, capsize=2, label=look.label, **(look.line | {"markersize": 4}))


def _plain(name: str) -> str:
    return {"per_sample": "per image", "per_sample_channel": "per image, channel"}.get(name, name.replace("_", " "))


def _share_above(density: pd.Series, edges: Sequence[float]) -> np.ndarray:
    """Share of the values in each bin or above it."""
    return (density.to_numpy() * np.diff(edges))[::-1].cumsum()[::-1]


def plain_log(axis: Any) -> None:
    """Ticks 1, 2, 5 written as numbers: a range below one decade has no power of ten to name."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _layer_ticks(ax: Axes, layers: Sequence[str]) -> None:
    ax.set_xticks(range(len(layers)), [short_layer(n) for n in layers], rotation=90, fontsize=6)
    ax.set_xlim(-0.6, len(layers) - 0.4)


def _share_labels(figure: Figure, axes: np.ndarray) -> None:
    """One legend above all panels, and no title, axis label or tick name that a neighboring panel repeats."""
    found: dict[str, Any] = {}
    for ax in axes.flat:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        ncols = min(len(found), 5 if sum(map(len, found)) < 80 else 3)
        figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=ncols)
    last_first = [*np.ndindex(axes.shape)][::-1]  # so that the neighbor above or to the left still says its own
    for r, c in last_first:
        ax, above, left = axes[r, c], axes[max(r - 1, 0), c], axes[r, max(c - 1, 0)]
        if r and ax.get_title() == above.get_title():
            ax.set_title("")
        if c and ax.get_ylabel() == left.get_ylabel():
            ax.set_ylabel("")
        if c and _named_ticks(ax.yaxis) == _named_ticks(left.yaxis) != []:
            ax.tick_params(labelleft=False)
    for r, c in np.ndindex(len(axes) - 1, axes.shape[1]):
        ax, below = axes[r, c], axes[r + 1, c]
        if ax.get_xlabel() == below.get_xlabel():
            ax.set_xlabel("")
        if _named_ticks(ax.xaxis) == _named_ticks(below.xaxis) != []:
            ax.tick_params(labelbottom=False)


def _named_ticks(axis: Any) -> list[str]:
    """Tick labels that are names, not numbers."""
    return [t.get_text() for t in axis.get_ticklabels()] if isinstance(axis.get_major_locator(), FixedLocator) else []
