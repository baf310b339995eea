"""Error of every layer, and of every channel of one layer."""

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from granq.show.style import Ax, finish, layer_ticks, role, select, short_layer

METRIC_LABELS = {"mse": "mean square error", "sqnr_db": "SQNR (dB)", "cosine_similarity": "cosine similarity"}
SQNR_CEILING = 60.0  # decibels; beyond it (1x1 kernels with their own scale reach 150) points sit on the upper edge


def _drawn(rows: pd.DataFrame, metric: str) -> pd.Series:
    return rows[metric].clip(upper=SQNR_CEILING if metric == "sqnr_db" else None)


def plot_layer_error(
    data: pd.DataFrame, *, metric: str = "sqnr_db", mode: str = "accumulated", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_layer_error`` over the layers, one line a scheme; rows of single channels are left out.

    ``mode`` is ``"local"`` (clean input of every layer) or ``"accumulated"`` (quantized input).
    """
    ax = ax or plt.gca()
    rows = select(data[data.channel.isna()] if "channel" in data else data, mode=mode)
    layers = list(rows.layer.unique())
    for scheme, part in rows.groupby("scheme", sort=False):
        values, look = _drawn(part.set_index("layer"), metric).reindex(layers), role(str(scheme))
        ax.plot(range(len(layers)), values, label=look.label, **look.line)
    where = "local: clean input" if mode == "local" else "accumulated: quantized input"
    ax.set_title(f"{where}, W{rows.weight_bits.iloc[0]}A{rows.act_bits.iloc[0]}")
    layer_ticks(ax, layers)
    return _finish(ax, metric, legend)


def plot_channel_error(
    data: pd.DataFrame,
    *,
    metric: str = "sqnr_db",
    layer: str = "",
    mode: str = "local",
    legend: bool = True,
    ax: Ax = None,
) -> Axes:
    """Draw ``measure_layer_error(per_channel=True)`` of one layer, worst channel first, one line a scheme.

    ``layer`` is by default the one that holds the channel with the lowest SQNR.
    """
    ax = ax or plt.gca()
    rows = select(data[data.channel.notna()], mode=mode)
    rows = select(rows, layer=layer or rows.sort_values("sqnr_db").layer.iloc[0])
    for scheme, part in rows.groupby("scheme", sort=False):
        values, look = _drawn(part, metric).sort_values(ascending=metric != "mse"), role(str(scheme))
        every = max(1, len(values) // 12)
        ax.plot(range(1, len(values) + 1), values, markevery=every, label=look.label, **look.line)
    ax.set(xlabel="output channel, worst first", title=f"{short_layer(rows.layer.iloc[0])}, {mode}, per channel")
    return _finish(ax, metric, legend)


def _finish(ax: Axes, metric: str, legend: bool) -> Axes:
    ax.set(ylabel=METRIC_LABELS[metric], yscale="log" if metric == "mse" else "linear")
    return finish(ax, legend, ncols=2)
