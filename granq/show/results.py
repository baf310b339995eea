"""Where it leads: training, accuracy, true bits and time."""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame, Series

from granq.errors import UserError
from granq.measure.images import decode_pixels
from granq.show.style import DASHES, GREY, Ax, Role, finish, plain_log, role, select, side_by_side

TRAINING_LABELS = {"generator_loss": "generator loss", "student_loss": "student loss", "bn_loss": "BatchNorm distance",
                   "teacher_top1": "teacher on synthetic\nimages (%)", "diversity": "diversity of images",
                   "codes_changed": "codes that differ from\nan epoch before (%)",
                   "test_top1": "student on test\nimages (%)"}  # fmt: skip
CURVES = ("generator_loss", "bn_loss", "teacher_top1", "test_top1")  # of a short run
TRUE_BITS_LABELS = {"true_bits_per_weight": "true bits\nper weight", "weights_low_bit": "weights really\nquantized (%)",
                    "true_bits_per_activation": "true bits\nper activation",
                    "macs_low_bit": "MACs really\nat low bits (%)"}  # fmt: skip
SCALING_LABELS = {"median_ms": "time (ms)", "peak_mb": "peak memory (MB)", "scale_multiplications": "multiplications"}
_PUBLISHED = Role("published, each with\nits own teacher", "#6b6b70", "_")


def plot_training_curves(data: DataFrame, *, quantity: str = "test_top1", legend: bool = True, ax: Ax = None) -> Axes:
    """Draw histories of runs, a line for each scheme, bits, recipe and seed; the generator's warm-up is shaded.

    Of ``student_loss``, whose zero means nothing, the change since the first trained epoch is drawn.
    """
    ax = ax or plt.gca()
    data = DataFrame({"scheme": "student", "seed": 0, quantity: float("nan")}, data.index).assign(**data)
    warmup = data.warmup.astype(bool)
    told = ["scheme", *(key for key in ("bits", "recipe", "generator") if key in data and data[key].nunique() > 1)]
    if "run" in data and data.duplicated([*told, "seed", "epoch"]).any():  # they differ in other settings
        told = ["scheme", "run"]
    # the student's loss is measured in the warm-up too, but not yet trained on
    runs = data[~warmup if quantity == "student_loss" else slice(None)].groupby(told, sort=False, dropna=False)
    for i, (names, rows) in enumerate(runs):
        seeds = rows.pivot(index="epoch", columns="seed", values=quantity)
        seeds = seeds - seeds.bfill().iloc[0] if quantity == "student_loss" else seeds
        look = role(str(names[0]))._replace(label=", ".join(map(str, names)), dash=DASHES[i % 4]).line
        if i and data.scheme.nunique() == 1:  # its color says nothing then
            look |= {"color": sns.color_palette("colorblind")[(i - 1) % 10]}
        if data.epoch.nunique() > 40:  # lines are enough
            look |= {"marker": "", "linewidth": 1.1}
        for seed in seeds:  # what was not measured in an epoch leaves no gap
            ax.plot(seeds[seed].dropna(), **look | {"label": look["label"] if seed == seeds.columns[0] else "_"})
        if quantity == "test_top1" and seeds.shape[1] > 1:
            for row in rows.dropna(subset=quantity).groupby("seed").tail(1).itertuples():
                ax.annotate(f"seed {row.seed}", (row.epoch, row.test_top1), fontsize=5)
    ends = data.epoch.where(warmup, 0).groupby([data[key] for key in (*told, "seed")]).max()
    if ends.max() == ends.min() > 0:  # all runs have one warm-up
        until = ends.max() + 0.5
        ax.axvspan(data.epoch.min() - 0.5, until, color="#ececee", zorder=0, label="warm-up: generator alone")
    ax.set(xlabel="epoch", title=TRAINING_LABELS[quantity] + "\nsince its first epoch" * (quantity == "student_loss"))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if quantity == "test_top1" and "teacher_test_top1" in data:
        ax.axhline(data.teacher_test_top1.iloc[0], color=GREY, linestyle=":", label="teacher", zorder=0)
    ax.ticklabel_format(axis="y", useOffset=False)
    return finish(ax, legend)


def plot_synthetic_images(data: DataFrame, *, ax: Ax = None) -> Axes:
    """Draw ``measure_generated_images``: columns are the first 10 labels, rows samples, and snapshots by ``epoch``.

    Below each image stands the confidence. A column ``name`` names the labels.
    """
    ax = ax or plt.gca()
    keys = [key for key in ("epoch", "sample") if key in data]
    data = data[data.label < 10].sort_values("label")
    groups, names = data.groupby(keys), dict(zip(data.label, data["name" if "name" in data else "label"], strict=True))
    for y, (_, rows) in enumerate(groups):
        for row in rows.to_dict("records"):
            x = [*names].index(row["label"])
            at = (x - 0.47, x + 0.47, 1.3 * y + 0.47, 1.3 * y - 0.47)  # left, right, below, above
            ax.imshow(decode_pixels(row["pixels"], row["size"]), extent=at, interpolation="nearest")
            ax.text(x, 1.3 * y + 0.64, f"{row['confidence']:.0%}", ha="center", va="center", fontsize=6)
    ax.set_xticks(range(len(names)), map(str, names.values()), fontsize=6.5)
    ax.set_yticks([1.3 * y for y in range(len(groups))], [f"{keys[0]} {at[0]}" for at, _ in groups])
    ax.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    ax.set_xlabel("below each image: the teacher's probability of the label that was asked for")
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(1.3 * len(groups) - 0.5, -0.5))
    ax.spines[:].set_visible(False)
    return ax


def split_published(data: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Return measured rows and published ones, which name a source. Raises UserError for runs that pass for one."""
    published = data[data.source.notna()] if "source" in data else data[:0]
    measured = data.drop(published.index)
    teachers = measured.groupby(["dataset", "network"]).teacher_top1
    if (teachers.max() - teachers.min() > 0.5).any():
        raise UserError("runs of one network have different teachers: say in network which")
    keys = ["dataset", "network", "scheme", "bits", "seed"]
    methods = measured.groupby(keys[:-1]).method.nunique() if "method" in measured else pd.Series(dtype=int)
    if measured.duplicated(keys).any() or (methods > 1).any():
        raise UserError(f"several runs have the same {', '.join(keys)}: say in scheme what else tells them apart")
    return measured, published


def plot_accuracy_bits(data: DataFrame, *, ax: Ax = None) -> Axes:
    """Draw rows of ``granq quantize``: every seed a point, open before training, filled after the last epoch.

    Rows with a ``source`` are published results. Raises UserError for several datasets, networks or mixed runs.
    """
    ax = ax or plt.gca()
    measured, published = split_published(data)
    if len(measured[["dataset", "network"]].drop_duplicates()) != 1:
        raise UserError("plot_accuracy_bits needs measured rows, and all of one dataset and network")
    measured, widths = measured.sort_values("bits", kind="stable"), sorted(measured.bits.unique())
    worst_first = measured.scheme.map(measured.groupby("scheme").last_top1.mean()).sort_values(kind="stable").index
    for look, rows, x in side_by_side(measured.loc[worst_first], "scheme", "bits", 0.7 / measured.scheme.nunique()):
        ax.scatter(x - 0.02, rows.ptq_top1, s=16, **look.points | {"facecolors": "none", "label": "_"})
        ax.scatter(x + 0.02, rows.last_top1, s=16, **look.points)
    if len(published := published[published.bits.isin(widths)]):
        x = published.bits.map(widths.index) + 0.43
        ax.scatter(x, published.last_top1, s=40, linewidths=0.8, **_PUBLISHED.points)
    teacher, n = measured.teacher_top1.mean(), _seeds(measured.groupby(["scheme", "bits"]).seed.nunique())
    ax.axhline(teacher, color=GREY, linestyle=":", label=f"teacher, {teacher:.1f} %", zorder=0)
    network = measured.network.iloc[0].rpartition(":")[2]
    ax.set_title(f"{measured.dataset.iloc[0]}, {network}, {n} seeds")
    ax.set(xlim=(-0.6, len(widths) - 0.4), ylabel="test top-1 (%)")
    ax.set_xticks(range(len(widths)), widths)
    return finish(ax, True, loc="upper left", bbox_to_anchor=(1, 1), title="open: before training")


def _seeds(counts: pd.Series) -> str:
    return "n = " + " or ".join(f"{n:.0f}" for n in sorted(counts.unique()))


def results_table(data: DataFrame) -> DataFrame:
    """Return measured and published accuracies side by side: one row per method and bit width, best first.

    Columns: bits, method, kind (measured, published), top1 (percent; mean over seeds, last epoch), std, n (seeds),
    half_width (of the 95 % interval over the test images), teacher_top1, drop (points below the teacher), dataset,
    network, source; empty where a source is silent.
    """
    own, published = split_published(data)
    runs = own.dropna(subset="last_top1").groupby(["dataset", "network", "scheme", "bits"])
    columns = dict(top1=("last_top1", "mean"), std=("last_top1", "std"), n=("seed", "nunique"))
    columns |= dict(teacher_top1=("teacher_top1", "mean"), half_width=("test_images", "mean"))
    measured = runs.agg(**columns).reset_index()
    measured["half_width"] = 1.96 * (measured.top1 * (100 - measured.top1) / measured.half_width) ** 0.5
    measured = measured.assign(kind="measured", source="this repository")
    published = published.rename(columns={"last_top1": "top1"}).assign(kind="published")
    table = pd.concat([measured, published.reindex(columns=measured.columns)], ignore_index=True)
    table = table.rename(columns={"scheme": "method"}).assign(drop=table.teacher_top1 - table.top1)
    table = table.sort_values(["bits", "drop", "top1"], ascending=[True, True, False], ignore_index=True)
    return table["bits method kind top1 std n half_width teacher_top1 drop dataset network source".split()]


def plot_results_table(data: DataFrame, *, bits: str | None = None, ax: Ax = None) -> Axes:
    """Draw ``results_table``: points lost against each method's own teacher, measured filled, published open.

    Methods that differ only in the bits of the image share a line; a number says the least and the most that they
    lose. Bars are 95 % intervals over the test images. Rows whose teacher no source states cannot be placed; the title
    counts them, and says the best.
    """
    ax = ax or plt.gca()
    every = select(data.drop(columns=["dataset", "network"], errors="ignore"), bits=bits)
    rows = every.dropna(subset="drop")
    kinds = rows.method.str.replace(r" \+ image \d bits", "", regex=True)
    kinds = kinds.str.replace(r"auto \S+", "bits by layer", regex=True).str.replace(" + ", ", ")
    lines = {kind: -y for y, kind in enumerate(kinds.unique())}
    for kind, row in zip(kinds, rows.to_dict("records"), strict=True):
        own = row["kind"] == "measured"
        look = (role(row["method"]) if own else _PUBLISHED._replace(marker="o"))._replace(dash="none", label="_").line
        fill = "full" if own else "none"
        ax.errorbar(row["drop"], lines[kind], xerr=row["half_width"], capsize=2, fillstyle=fill, **look)
    ends = (rows["drop"] + rows.half_width.fillna(0)).groupby(kinds).max()
    for kind, lost in rows["drop"].groupby(kinds):
        text = " to ".join(dict.fromkeys(f"{round(value, 1) + 0:.1f}" for value in (lost.min(), lost.max())))
        ax.annotate(text, (ends[kind], lines[kind]), (5, 0), textcoords="offset points", va="center", fontsize=6)
    ax.set_yticks([*lines.values()], [*lines], fontsize=7)
    ax.axvline(0, color=GREY, linestyle=":", linewidth=1)
    ax.margins(x=0.15)  # for the numbers
    ax.set_xlabel("points lost, open: published" if (every.kind == "published").any() else "points lost")
    hidden = every.top1[every["drop"].isna()]
    left = f"\nwithout {len(hidden)} published ones of unknown\nteachers (best: {hidden.max():.1f} %)"
    # in the middle it would leave a narrow panel
    ax.set_title(f"{every.bits.iloc[0]}, measured: {_seeds(every.n.dropna())}{left * bool(len(hidden))}", loc="right")
    return ax


def plot_granularity_factorial(
    data: DataFrame, *, ranges: str = "dynamic", bits: int | None = None, colorbar: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_granularity_factorial``: accuracy, mean over seeds, by weight and activation granularity.

    Ranges "none" (full-precision activations) belong to every map. The title says half of the widest interval.
    """
    ax = ax or plt.gca()
    rows = select(data[data.ranges.isin([ranges, "none"])], bits=bits)
    grid = rows.pivot_table(index="weights", columns="activations", values="top1", sort=False)
    grid = grid.reindex(columns=data.activations.unique())
    lost = (data.top1.max() - grid).clip(lower=1)  # from 4 bits on the cells differ by tenths of what 2 bits cost
    sns.heatmap(
        lost, annot=grid, fmt=".1f", annot_kws={"fontsize": 5}, cmap="cividis_r", norm=LogNorm(1, 100), cbar=colorbar,
        cbar_kws={"label": "points below the best"}, xticklabels=True, yticklabels=True, ax=ax,
    )  # fmt: skip
    ax.tick_params(labelsize=6)
    widest = f"\n95 %: ±{(rows.top1_high - rows.top1_low).max() / 2:.1f} or less" if "top1_high" in rows else ""
    ax.set(xlabel="activations", ylabel="weights", title=f"{rows.bits.iloc[0]} bits, {ranges}{widest}")
    return ax


def plot_true_bits(
    data: DataFrame, *, quantity: str = "true_bits_per_weight", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw the quantities of ``summarize_audit`` by network and scheme; dotted: what the nominal bits promise."""
    ax = ax or plt.gca()
    networks = data.network.unique()
    for look, rows, y in side_by_side(data, "scheme", "network", 0.15):
        ax.scatter(rows[quantity], y, s=20, **look.points)
    nominal = "act_bits" if quantity.endswith("activation") and "act_bits" in data else "weight_bits"
    promised = data[nominal].unique() if quantity.startswith("true_bits") else [100]
    for x in promised:
        ax.axvline(x, color=GREY, linestyle=":", label="what the name says", zorder=0)
    ax.set_yticks(range(len(networks)), networks)
    ax.set(xlim=(0, None), ylim=(len(networks) - 0.5, -0.5), xlabel=TRUE_BITS_LABELS[quantity])
    return finish(ax, legend)


def plot_accuracy_true_bits(
    data: DataFrame, *, dataset: str | None = None, training: str | None = None, legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_budgets``: accuracy over true bits per weight, mean over seeds; allocated filled, uniform open."""
    ax = ax or plt.gca()
    rows = select(data, training=training, **({"dataset": dataset} if "dataset" in data else {}))
    for (scheme, how), line in rows.groupby(["scheme", "how"], sort=False):
        points = line.groupby("average")[["true_bits_per_weight", "top1"]].mean()
        look = role(str(scheme))._replace(label=f"{scheme}, {how}", dash="-" if how == "allocated" else ":").line
        fill = {"fillstyle": "full" if how == "allocated" else "none", "markersize": 5}
        ax.plot(points.true_bits_per_weight, points.top1, **look | fill)
    if "teacher_test_top1" in rows:
        ax.axhline(rows.teacher_test_top1.iloc[0], color=GREY, linestyle="--", label="teacher", zorder=0)
    title = f"{rows.dataset.iloc[0]}, {rows.network.iloc[0]}" if "dataset" in rows else ""
    ax.set(xlabel="true bits per weight", ylabel=f"test top-1 (%)\n{rows.training.iloc[0]}", title=title)
    ax.set_xscale("log", base=2)
    ticks = (2, 4, 8, 16, 32) if rows.true_bits_per_weight.max() > 5 else (2, 3, 4, 5)  # to full precision, or near
    ax.set_xticks(ticks, map(str, ticks))
    return finish(ax, legend)


def plot_quantizer_latency(data: DataFrame, *, ax: Ax = None) -> Axes:
    """Draw ``measure_latency_quantizer``: median and quartiles; the method ``copy`` is the floor, the bytes cloned."""
    ax = ax or plt.gca()
    for look, rows, x in side_by_side(data, "method", "shape", 0.12):
        ax.errorbar(x, rows.median_ms, _quartiles(rows), capsize=2, **look._replace(dash="none").line)
    plain_log(ax)
    shapes = [shape.strip("()").replace(", ", "×") for shape in data["shape"].unique()]
    ax.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    ax.set(xlabel="activation shape (N×C×H×W)", ylabel="time (ms)\nmedian and quartiles")
    return finish(ax, True, loc="upper left", bbox_to_anchor=(1, 1))


def _quartiles(rows: DataFrame) -> tuple[Series, Series]:
    return rows.median_ms - rows.q25_ms, rows.q75_ms - rows.median_ms


def plot_scaling_latency(
    data: DataFrame, *, against: str = "channels", quantity: str = "median_ms", legend: bool = True, ax: Ax = None
) -> Axes:
    """Draw ``measure_latency_scaling`` against ``"channels"`` or ``"batch"``, the other at its most frequent value."""
    ax = ax or plt.gca()
    other = {"channels": "batch", "batch": "channels"}[against]
    rows = data[data[other] == data[other].mode().iloc[0]].sort_values(against)
    for i, (name, part) in enumerate(rows.groupby("execution", sort=False)):
        spread, look = _quartiles(part) if quantity == "median_ms" else None, role(str(name))
        if name == "layer-wise" or "accumulation" in look.label:  # for which torch has no fast kernel on the CPU
            look = look._replace(label=f"{name}, int32")
        wide = {"linewidth": 2.8 - 0.36 * i, "markersize": 7 - 0.8 * i}  # so that lines on each other are seen
        ax.errorbar(part[against], part[quantity], spread, capsize=2, **look.line | wide)
    ax.set_yscale("symlog" if quantity == "scale_multiplications" else "log")  # some executions need none
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel=f"{against} ({other} {rows[other].iloc[0]})", ylabel=SCALING_LABELS[quantity])
    return finish(ax, legend)
