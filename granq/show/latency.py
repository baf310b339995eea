"""Times of the quantizer and of the executions of a convolution."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from granq.show.style import BLACK, ROLES, Ax, Role, dodge, finish, plain_log

SCALING_LABELS = {
    "median_ms": "time (ms)",
    "peak_mb": "peak memory (MB)",
    "scale_multiplications": "scale multiplications",
}
_ROLE_OF = {"copy": "full precision", "layerwise": "layerwise", "layer-wise": "layerwise", "granq": "granq",
            "pre-scaled": "granq", "channel loop": "per_channel", "accumulation-time, loop": "per_channel",
            "textbook": "strict", "accumulation-time, grouped": "strict", "folded": "foldable"}  # fmt: skip


def _look(name: str) -> Role:
    """Return the look of a method: that of the scheme it belongs to, else black; a star for another memory layout."""
    base = name.removesuffix(", NHWC")
    look = ROLES[_ROLE_OF[base]] if base in _ROLE_OF else Role(name, BLACK, "X", (0, (2, 1)))
    look = look._replace(label="copy of the same bytes" if name == "copy" else name)
    return look if name == base else look._replace(marker="*")


def _medians(ax: Axes, x: Any, rows: pd.DataFrame, look: Role) -> None:
    spread = [rows.median_ms - rows.q25_ms, rows.q75_ms - rows.median_ms]
    ax.errorbar(x, rows.median_ms, yerr=spread, capsize=2, label=look.label, **(look.line | {"markersize": 4}))


def plot_quantizer_latency(data: pd.DataFrame, *, ax: Ax = None) -> Axes:
    """Draw ``measure_latency_quantizer``: median and quartiles; the method ``copy`` is the floor, the bytes cloned."""
    ax = ax or plt.gca()
    shapes, methods = list(data["shape"].unique()), list(data.method.unique())
    for method, offset in zip(methods, dodge(len(methods), 0.12), strict=True):
        rows = data[data.method == method]
        _medians(ax, rows["shape"].map(shapes.index) + offset, rows, _look(method)._replace(dash="none"))
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    ax.set_xticks(range(len(shapes)), [v.strip("()").replace(", ", "×") for v in shapes], rotation=30, ha="right")
    ax.set(xlabel="activation shape (N×C×H×W)", ylabel="time (ms)\nmedian and quartiles")
    return finish(ax, True, loc="upper left", bbox_to_anchor=(1, 1))


def plot_scaling_latency(
    data: pd.DataFrame, *, against: str = "channels", quantity: str = "median_ms", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_latency_scaling`` against ``"channels"`` or ``"batch"``, the other at its most frequent value."""
    ax = ax or plt.gca()
    other = {"channels": "batch", "batch": "channels"}[against]
    rows = data[data[other] == data[other].mode().iloc[0]]
    for execution, part in rows.groupby("execution", sort=False):
        look, part = _look(str(execution)), part.sort_values(against)
        if quantity == "median_ms":
            _medians(ax, part[against], part, look)
        else:
            ax.plot(part[against], part[quantity], label=look.label, **look.line)
    ax.set_xscale("log", base=2)
    positive = rows[quantity][rows[quantity] > 0]
    if len(positive) == len(rows):
        ax.set_yscale("log")
    elif len(positive):  # executions that need none lie on the axis, a decade below the fewest of the others
        powers = 10.0 ** np.arange(np.floor(np.log10(positive.min())), np.ceil(np.log10(positive.max())) + 1)
        ax.set_yscale("symlog", linthresh=powers[0])
        ax.set(yticks=[0, *powers], ylim=(0, powers[-1]))  # no tick between 0 and the first power: there is no room
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set(xlabel=f"{against} ({other} {rows[other].iloc[0]})", ylabel=SCALING_LABELS[quantity])
    return finish(ax, legend)
