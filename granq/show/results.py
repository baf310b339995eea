"""Accuracy: over bit widths, next to published results, by the choices of a scheme; and what a bit width really is."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from granq.errors import UserError, one_of
from granq.measure.methods import dataset_name
from granq.show.style import GREY, ROLES, Ax, Role, dodge, finish, plain_log, role, select

TRUE_BITS_LABELS = {
    "bits_per_weight": "true bits per weight (dotted: the label)",
    "quantized_percent": "weights really quantized (%)",
}
LEAST_LOST = 0.7  # points; about the standard error of the accuracy on 2,000 images
_PUBLISHED = "#6b6b70"
_HEADS = {"bits": "bits", "method": "method", "kind": "kind", "top1": "top-1 (%)", "std": "std", "n": "n",
          "teacher_top1": "teacher (%)", "drop": "drop (points)", "source": "source"}  # fmt: skip


def split_published(data: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return measured rows and published ones, which name a source. Raises UserError for runs that pass for one."""
    published = data[data.source.notna()] if "source" in data else data[:0]
    measured = data.drop(published.index)
    if measured.duplicated(keys := ["dataset", "network", "scheme", "bits", "seed"]).any():
        raise UserError(f"several runs have the same {', '.join(keys)}: say in scheme what else tells them apart")
    return measured, published


def plot_accuracy_bits(data: pd.DataFrame, *, ax: Ax = None) -> Axes:
    """Draw rows of ``granq quantize``: every seed a point, open before training, filled after the last epoch.

    Rows with a ``source`` are published results, drawn as grey dashes. Raises UserError for several datasets, networks
    or methods that pass for one.
    """
    ax = ax or plt.gca()
    measured, published = split_published(data)
    if len(measured[["dataset", "network"]].drop_duplicates()) != 1:
        raise UserError("plot_accuracy_bits needs measured rows, and all of one dataset and network")
    bits = {name: float(x) for x, name in enumerate(sorted(measured.bits.unique()))}
    order = {scheme: list(ROLES).index(scheme) if scheme in ROLES else 99 for scheme in measured.scheme}
    width = 0.8 / (len(order) + (len(published) > 0))
    for i, scheme in enumerate(sorted(order, key=lambda scheme: (order[scheme], scheme))):
        look, rows = role(scheme), measured[measured.scheme == scheme].sort_values("seed")
        seeds = rows.groupby("bits").seed
        place = seeds.cumcount() - (seeds.transform("size") - 1) / 2  # seeds side by side
        x = rows.bits.map(bits) - 0.4 + (i + 0.3 + 0.08 * place) * width
        style: dict[str, Any] = dict(s=16, marker=look.marker, linewidths=0.8)
        ax.scatter(x, rows.ptq_top1, facecolors="none", edgecolors=look.color, **style)
        ax.scatter(x + 0.4 * width, rows.last_top1, color=look.color, label=look.label, **style)
    if len(published):
        style = dict(marker="_", s=40, linewidths=0.8, color=_PUBLISHED, label="published, own teachers")
        ax.scatter(published.bits.map(bits) + 0.4 - width / 2, published.last_top1, **style)
    teacher, n = measured.teacher_top1.mean(), _from_to(measured.groupby(["scheme", "bits"]).seed.nunique())
    ax.axhline(teacher, color=GREY, linestyle=":", label=f"teacher, {teacher:.1f} %", zorder=0)
    ax.scatter([], [], s=16, facecolors="none", edgecolors="black", label="open: before training")
    ax.set_title(f"{dataset_name(measured.dataset.iloc[0])}, {measured.network.iloc[0]}, n = {n} seeds")
    ax.set_xticks(list(bits.values()), list(bits))
    ax.set(ylabel="test top-1 (%)", xlim=(-0.5, len(bits) - 0.5))
    return finish(ax, True, loc="upper left", bbox_to_anchor=(1, 1))


def _from_to(counts: pd.Series) -> str:
    return " to ".join(f"{count:.0f}" for count in sorted({counts.min(), counts.max()}))


def results_table(data: pd.DataFrame) -> pd.DataFrame:
    """Return measured and published accuracies side by side: one row per method and bit width, best first.

    Args:
        data: as for ``plot_accuracy_bits``, of one or several datasets and networks.

    Returns:
        Columns bits, method, kind (measured, published), top1 (percent; mean over seeds, last epoch), std, n (seeds),
        teacher_top1, drop (points below the teacher), dataset, network, source; empty where a source is silent.
    """
    own, published = split_published(data)
    runs = own.dropna(subset="last_top1").groupby(["dataset", "network", "scheme", "bits"])
    columns = dict(top1=("last_top1", "mean"), std=("last_top1", "std"), n=("seed", "nunique"))
    measured = runs.agg(**columns, teacher_top1=("teacher_top1", "mean")).reset_index()
    measured = measured.assign(kind="measured", source="this repository")
    published = published.rename(columns={"last_top1": "top1"}).assign(kind="published")
    table = pd.concat([measured, published.reindex(columns=measured.columns)], ignore_index=True)
    table = table.rename(columns={"scheme": "method"}).assign(drop=table.teacher_top1 - table.top1)
    table = table.sort_values(["bits", "drop", "top1"], ascending=[True, True, False], ignore_index=True)
    return table["bits method kind top1 std n teacher_top1 drop dataset network source".split()]


def table_text(table: pd.DataFrame, form: str) -> str:
    """Return rows of ``results_table``, in their order, as ``"markdown"`` or as ``"latex"`` (a booktabs tabular)."""
    one_of("form", form, ("markdown", "latex"))
    shown = table.assign(n=table.n.astype("Int64"))[list(_HEADS)].rename(columns=_HEADS)
    shown = shown.astype(object).where(shown.notna(), None)
    if form == "latex":
        return shown.to_latex(index=False, escape=True, na_rep="", float_format="%.2f", column_format="lllrrrrrl")
    return f"{shown.to_markdown(index=False, floatfmt='.2f', missingval='')}\n"


def plot_results_table(data: pd.DataFrame, *, bits: str | None = None, ax: Ax = None) -> Axes:
    """Draw ``results_table``: points lost against each method's own teacher, measured filled, published open.

    Rows whose teacher no source states cannot be placed; the title counts them.
    """
    ax = ax or plt.gca()
    every = select(data, bits=bits)
    rows = every.dropna(subset="drop")[::-1]
    for y, row in enumerate(rows.to_dict("records")):
        own, spread = row["kind"] == "measured", None if pd.isna(row["std"]) else row["std"]
        look = role(row["method"]) if own else Role(row["method"], _PUBLISHED, "o")
        style: dict[str, Any] = dict(color=look.color, markerfacecolor=look.color if own else "none", markersize=4)
        ax.errorbar(row["drop"], y, xerr=spread, fmt=look.marker, capsize=2, linewidth=1, **style)
    ax.set_yticks(range(len(rows)), rows.method, fontsize=6)
    ax.axvline(0, color=GREY, linestyle=":", linewidth=1)
    left = f"\n{len(every) - len(rows)} published without their teacher" if len(every) > len(rows) else ""
    title = f"{every.bits.iloc[0]}, n = {_from_to(every.n)} where measured{left}"
    ax.set_title(title, loc="right")  # in the middle it would leave a narrow panel
    ax.set_xlabel("points lost")
    ax.margins(x=0.12)
    return ax


def plot_granularity_factorial(
    data: pd.DataFrame, *, ranges: str | None = None, colorbar: bool = True, ax: Ax = None, **panel: Any
) -> Axes:
    """Draw ``measure_granularity_factorial``: accuracy by weight (rows) and activation granularity (columns).

    ``panel`` is ``bits`` and ``epochs``, by default the fewest. Ranges "none" (full-precision activations) belong to
    every map; seeds are averaged. The title says half of the widest interval.
    """
    ax = ax or plt.gca()
    data = data if "epochs" in data else data.assign(epochs=0)
    ranges = ranges or next((v for v in data.ranges if v != "none"), "none")
    rows = data[data.ranges.isin([ranges, "none"])].sort_values(["bits", "epochs"], kind="stable")
    rows = select(rows, **{"bits": None, "epochs": None} | panel)
    grid = rows.pivot_table(index="weights", columns="activations", values="top1", sort=False)
    grid = grid.reindex(columns=data.activations.unique()).rename(index=_plain, columns=_plain)
    best = data.top1.max()
    # points lost, on a logarithmic scale: from 4 bits on the cells differ by tenths of what 2 bits cost
    norm = LogNorm(LEAST_LOST, max(best - data.top1.min(), 10 * LEAST_LOST), clip=True)
    style: dict[str, Any] = dict(annot=grid, fmt=".1f", annot_kws={"fontsize": 5}, cmap="cividis_r", cbar=False)
    sns.heatmap((best - grid).clip(lower=LEAST_LOST), norm=norm, xticklabels=True, yticklabels=True, ax=ax, **style)
    ax.tick_params(labelsize=6)
    trained = ", trained" if rows.epochs.iloc[0] else ""
    widest = f"\nat most ±{(rows.top1_high - rows.top1_low).max() / 2:.1f}" if "top1_high" in rows else ""
    ax.set(xlabel="activations", ylabel="weights", title=f"{rows.bits.iloc[0]} bits, {ranges}{trained}{widest}")
    if colorbar:
        plain_log(ax.figure.colorbar(ax.collections[0], ax=ax, label="points below the best").ax.yaxis)
    return ax


def _plain(name: str) -> str:
    return {"per_sample": "per image", "per_sample_channel": "per image, channel"}.get(name, name.replace("_", " "))


def plot_true_bits(
    data: pd.DataFrame, *, quantity: str = "bits_per_weight", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw what W3A3 comes to: columns network, scheme, weight_bits, and those of ``summarize_audit`` in the labels."""
    ax = ax or plt.gca()
    networks, groups = list(data.network.unique()), data.groupby("scheme", sort=False)
    for (scheme, rows), offset in zip(groups, dodge(len(groups), 0.15), strict=True):
        look, y = role(str(scheme)), rows.network.map(networks.index) + offset
        ax.scatter(rows[quantity], y, color=look.color, marker=look.marker, s=20, label=look.label)
    ax.axvline(data.weight_bits.iloc[0] if quantity == "bits_per_weight" else 100, color=GREY, linestyle=":", zorder=0)
    ax.set_yticks(range(len(networks)), networks)
    ax.set(ylim=(len(networks) - 0.5, -0.5), xlabel=TRUE_BITS_LABELS[quantity])
    return finish(ax, legend)
