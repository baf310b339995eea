"""Scales, as a map and channel by channel; how far synthetic activations are from real ones, channel by channel."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from granq.errors import UserError
from granq.measure.running import DEAD
from granq.show.style import GREY, Ax, Role, dodge, finish, granularity_role, layer_ticks, plain_log, role, select

GAP_LABELS = {
    "ks_distance": "Kolmogorov-Smirnov\ndistance",
    "mean": "shift of the mean\n(standard deviations)",
    "variance": "ratio of variances",
}


def live(data: pd.DataFrame) -> pd.DataFrame:
    """Return the data without the scales of constant channels. Raises UserError if no other is there."""
    if not (data.scale > DEAD).any():
        raise UserError("every channel is constant on these images: there is no scale to show")
    return data.assign(scale=data.scale.where(data.scale > DEAD))


def plot_granularity_maps(
    data: pd.DataFrame, *, layer: str | None = None, granularity: str = "", colorbar: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_scale_maps``: the scale of every image and channel in front of a layer; constant ones are grey.

    ``granularity`` is by default the last in the data, the finest. All of them share the limits of the colors.
    """
    ax = ax or plt.gca()
    data = live(select(data, layer=layer))
    name = granularity or data.granularity.iloc[-1]
    grid = select(data, granularity=name).pivot(index="image", columns="channel", values="scale")
    colors, norm = plt.get_cmap("viridis").with_extremes(bad="#d9d9dc"), LogNorm(data.scale.min(), data.scale.max())
    mesh = ax.imshow(grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    count = (len(grid) if "sample" in name else 1) * (grid.shape[1] if "channel" in name else 1)
    label = granularity_role(name).label.replace(" and ", "\nand ").replace(" (layer", "\n(layer")
    ax.set(title=f"{label}\n{count} scale{'s' * (count > 1)}", xlabel="channel", ylabel="image")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if colorbar:
        plain_log(ax.figure.colorbar(mesh, ax=ax, label="scale (step, in units of the activation)").ax.yaxis)
    return ax


def plot_channel_scales(
    data: pd.DataFrame, *, granularity: str | None = None, bits: int | None = None, ax: Ax = None
) -> Axes:
    """Draw ``measure_channel_scales`` of several sources: the scale of every channel, with a bar at each median."""
    ax = ax or plt.gca()
    data = live(select(data, granularity=granularity, bits=bits))
    counts = data.groupby("source", sort=False).images.first()
    looks = [role(str(s))._replace(label=f"{role(str(s)).label}, n = {n}") for s, n in counts.items()]
    _channel_points(ax, data.assign(value=data.scale), "source", looks)
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    ax.set_ylabel(f"scale at {data.bits.iloc[0]} bits\n(step, in units of the activation)")
    ax.set_title(f"one scale {granularity_role(data.granularity.iloc[0]).label.split(' (')[0]}", loc="left")
    place = dict(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return finish(ax, True, ncols=len(looks), markerscale=1.5, **place)


def plot_synthetic_gap(
    data: pd.DataFrame, *, quantity: str = "ks_distance", legend: bool = True, ax: Ax = None
) -> Axes:
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
    looks = [role("real" if i else "synthetic")._replace(label=p) for i, p in enumerate(data.pair.unique())]
    _channel_points(ax, data.assign(value=values.where(data.variance_real > 0)), "pair", looks)
    if quantity == "variance":
        ax.set_yscale("log")
        plain_log(ax.yaxis)
        ax.axhline(1, color=GREY, linewidth=0.6)
    else:
        ax.set_ylim(0)
    ax.set_ylabel(GAP_LABELS[quantity])
    return finish(ax, legend, markerscale=2, ncols=2)


def _channel_points(ax: Axes, data: pd.DataFrame, by: str, looks: list[Role]) -> None:
    """Draw the ``value`` of every channel of every layer, the groups ``by`` side by side, and a bar at each median."""
    place = {layer: i for i, layer in enumerate(data.layer.unique())}
    groups = data.dropna(subset="value").groupby(by, sort=False)
    for (_, rows), look, offset in zip(groups, looks, dodge(len(looks), 0.36), strict=True):
        style: dict[str, Any] = dict(s=7, alpha=0.5, linewidths=0, color=look.color, marker=look.marker)
        ax.scatter(rows.layer.map(place) + offset, rows.value, label=look.label, rasterized=True, **style)
        center = np.arange(len(place)) + offset
        median = rows.groupby("layer").value.median().reindex(list(place))
        ax.hlines(median, center - 0.15, center + 0.15, color="black", linewidth=1.2)
    layer_ticks(ax, list(place))
