"""Pictures: every ``plot_*`` takes a data frame and ``ax=None`` and returns the Axes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

STYLE = Path(__file__).with_name("granq.mplstyle")
#: One color and one marker per role everywhere (petroff6, safe for color-vision deficiencies).
ROLES = {
    "full precision": ("#9c9ca1", "s"),
    "layerwise": ("#5790fc", "o"),
    "per_channel": ("#f89c20", "^"),
    "release": ("#e42536", "D"),
    "strict": ("#964a8b", "v"),
}


def plot_accuracy(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Top-1 by scheme, every seed a point: columns scheme, teacher_top1, ptq_top1, last_top1, seed."""
    ax = ax or plt.gca()
    schemes = list(dict.fromkeys(data.scheme))
    for x, scheme in enumerate(schemes):
        rows = data[data.scheme == scheme]
        color, marker = ROLES.get(scheme, ("black", "o"))
        n = len(rows)
        jitter = [(i - (n - 1) / 2) * 0.06 for i in range(n)]
        ax.scatter(
            [x - 0.18 + j for j in jitter],
            rows.ptq_top1,
            facecolors="none",
            edgecolors=color,
            marker=marker,
            s=24,
        )
        ax.scatter([x + 0.18 + j for j in jitter], rows.last_top1, color=color, marker=marker, s=24)
    teacher = data.teacher_top1.mean()
    ax.axhline(teacher, color=ROLES["full precision"][0], linestyle="--", label=f"teacher {teacher:.1f} %")
    ax.scatter([], [], facecolors="none", edgecolors="black", label="before training")
    ax.scatter([], [], color="black", label="after, last epoch")
    ax.set_xticks(range(len(schemes)), schemes)
    first = data.iloc[0]
    ax.set(
        ylabel="test top-1 (%)",
        title=f"{first.dataset}, {first.network}, {first.bits}, n = {data.seed.nunique()} seeds",
    )
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, columnspacing=0.8, handletextpad=0.3)
    return ax


def plot_activation_distortion(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Worst to best channel SQNR of one layer per granularity: columns granularity, channel, sqnr_db, layer, bits."""
    ax = ax or plt.gca()
    names = {"per_tensor": "layerwise", "per_channel": "per_channel", "per_sample_channel": "release"}
    for granularity, rows in data.groupby("granularity", sort=False):
        color, marker = ROLES[names[str(granularity)]]
        values = rows.sqnr_db.sort_values()
        ax.plot(
            range(1, len(values) + 1),
            values,
            color=color,
            marker=marker,
            markersize=3,
            label=str(granularity),
        )
    ax.axhline(0, color="#9c9ca1", linewidth=0.6)
    ax.set(
        xlabel="channel, worst first",
        ylabel="SQNR (dB)",
        title=f"{data.layer.iloc[0]} at {data.bits.iloc[0]} bits",
    )
    ax.legend()
    return ax


def plot_images(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A grid of generated images: columns image, row, column, red, green, blue in [0, 1], label."""
    ax = ax or plt.gca()
    count, size = data.image.nunique(), data.row.max() + 1
    pixels = data.sort_values(["image", "row", "column"])[["red", "green", "blue"]].to_numpy()
    grid = pixels.reshape(count, size, size, 3).transpose(1, 0, 2, 3).reshape(size, count * size, 3)
    ax.imshow(grid, interpolation="nearest")
    labels = data.drop_duplicates("image").sort_values("image").label
    ax.set_xticks([size * (i + 0.5) for i in range(count)], [str(v) for v in labels])
    ax.set_yticks([])
    ax.set(xlabel="label the generator was asked for", title="Synthetic images")
    return ax


def save_figure(
    name: str, data: pd.DataFrame, plot: Callable[..., Axes], folder: Path, width: float = 3.3, height: float = 2.4
) -> None:
    """CSV first, then a picture drawn from that CSV alone, as SVG and PNG without dates: the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    data.to_csv(folder / f"{name}.csv", index=False)
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    try:
        with plt.style.context(STYLE):
            figure, ax = plt.subplots(figsize=(width, height))
            plot(pd.read_csv(folder / f"{name}.csv"), ax=ax)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
            plt.close(figure)
    finally:
        plt.switch_backend(backend)
