"""Explorers for notebooks: each takes a frame and returns a widget whose controls choose what of it is drawn.

No control runs a network. All are core ipywidgets, so Tab, the arrow keys and the mouse reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from granq.data import DataSpec
from granq.errors import UserError
from granq.measure.images import measure_generated_images
from granq.measure.running import ACTIVATION_GRANULARITIES, DEAD
from granq.runs import RunFolder, load_generator
from granq.show.distortion import plot_channel_histogram
from granq.show.layer_error import METRIC_LABELS, plot_channel_error, plot_layer_error
from granq.show.scales import live
from granq.show.style import STYLE, granularity_role, plain_log, role, select, short_layer
from granq.show.training import TRAINING_LABELS, plot_synthetic_images, plot_training_curves

_LABELS = {name: granularity_role(name).label for name in ACTIVATION_GRANULARITIES}
_LABELS |= METRIC_LABELS | {name: label.replace("\n", " ") for name, label in TRAINING_LABELS.items()}


def distortion_microscope(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_channel_histograms``: one channel of one image, synthetic next to real, levels as ticks."""

    def draw(figure: Figure, **panel: Any) -> pd.DataFrame:
        sources = [part for _, part in select(data, **panel).groupby("source", sort=False)]
        for ax, part in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
            plot_channel_histogram(part, legend=part is sources[-1], ax=ax)
        rows = pd.concat([part.head(1) for part in sources])
        return rows[["source", "channel", "sqnr_db", "step", "levels_in_use", "bits"]]

    labels = {"rank": "channel, narrow to wide", "granularity": "one scale"}
    columns = ("layer", "rank", "image", "bits", "granularity")
    return _explorer("distortion microscope", draw, {c: _choose(labels.get(c, c), data[c]) for c in columns})


def scale_explorer(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_scale_maps``: the steps of a layer's channels, of one image among all, the widest named."""
    constant = data.groupby(["layer", "channel", "granularity"]).scale.max() <= DEAD
    dead = constant.groupby(["layer", "channel"]).any().groupby("layer").sum()  # per_tensor alone does not tell

    def draw(figure: Figure, layer: str, granularity: str, image: int) -> pd.DataFrame:
        every, look, ax = (
            live(select(data, layer=layer, granularity=granularity)),
            granularity_role(granularity),
            figure.subplots(),
        )
        shown = every[every.image == image]
        ax.scatter(every.channel, every.scale, s=6, color="#c9c9cd", label="all images")
        ax.scatter(shown.channel, shown.scale, s=9, color=look.color, marker=look.marker, label=f"image {image}")
        ax.set(yscale="log", xlabel="channel", ylabel="step (units of the activation)", title=short_layer(layer))
        plain_log(ax.yaxis)
        ax.legend(ncols=2)
        widest = ", ".join(f"{row.channel} ({row.scale:.3g})" for row in shown.nlargest(5, "scale").itertuples())
        values = {"different scales": shown.scale.nunique(), "median step": shown.scale.median()}
        return pd.DataFrame([values | {"widest channels": widest, "dead channels": dead[layer]}])

    labels = {"layer": "layer", "granularity": "one scale", "image": "image"}
    return _explorer("scale explorer", draw, {c: _choose(label, data[c]) for c, label in labels.items()})


def layer_error_explorer(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_layer_error``, rows of layers and of channels in one frame: the layers from the worst."""
    inside = data[data.channel.notna()]

    def draw(figure: Figure, metric: str, mode: str, rank: int) -> pd.DataFrame:
        rows, upwards = select(inside, mode=mode), metric != "mse"  # a large error is bad, a large ratio good
        layer = rows.groupby("layer")[metric].mean().sort_values(ascending=upwards).index[rank - 1]
        left, right = figure.subplots(1, 2)
        plot_layer_error(data, metric=metric, mode=mode, legend=False, ax=left)
        left.axvline(list(data.layer.unique()).index(layer), color="black", linewidth=0.6)
        plot_channel_error(data, metric=metric, mode=mode, layer=layer, ax=right)
        worst = select(rows, layer=layer).sort_values(metric, ascending=upwards)
        return worst[["layer", "scheme", "channel", metric]].head(5)

    controls = {"metric": _choose("metric", METRIC_LABELS), "mode": _choose("input", data["mode"])}
    controls["rank"] = _choose("layer, 1 = worst", range(1, inside.layer.nunique() + 1))
    return _explorer("layer error explorer", draw, controls, height=3.2)


def speed_lab(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_latency_quantizer`` or ``..._scaling``: times and counts, next to a copy of the same bytes."""
    if "execution" in data:
        data = data.assign(size=[f"{c} channels, {n} images" for c, n in zip(data.channels, data.batch, strict=True)])
    else:
        data = data.assign(execution=data.method, size=data["shape"])

    def draw(figure: Figure, size: str, execution: str) -> pd.DataFrame:
        rows, ax = select(data, size=size).set_index("execution", drop=False), figure.subplots()
        bars = rows.drop("copy", errors="ignore")
        spread = [bars.median_ms - bars.q25_ms, bars.q75_ms - bars.median_ms]
        colors = [role("granq").color if name == execution else "#c9c9cd" for name in bars.index]
        ax.barh(bars.index, bars.median_ms, color=colors, xerr=spread, capsize=3)
        for floor in rows.median_ms[rows.index == "copy"]:
            ax.axvline(floor, color="black", linestyle=":")
        ax.set(xscale="log", xlabel="time (ms), median and quartiles; dotted: a copy of the same bytes")
        plain_log(ax.xaxis)
        return select(rows, execution=execution).drop(columns=["torch", "device", "method", "size"], errors="ignore")

    names = [name for name in data.execution if name != "copy"]
    controls = {"size": _choose("size", data["size"]), "execution": _choose("execution", names)}
    return _explorer("speed lab", draw, controls)


def training_monitor(
    run: str | Path, teacher: nn.Module | None = None, spec: DataSpec | None = None, interval: float = 2.0
) -> widgets.VBox:
    """Watch the folder of a run while another process writes it: its curves up to an epoch, and generated images.

    Play rereads the folder, which need not exist yet, every ``interval`` seconds. Images need ``teacher`` and ``spec``.
    """
    folder, drawn = RunFolder(run), {0: pd.DataFrame()}
    epoch = widgets.IntSlider(0, 0, 0, description="up to epoch", continuous_update=False, **_LOOK)
    play = widgets.Play(interval=round(1000 * interval), min=0, max=100_000, tooltip="reread the run folder")

    def reread(_: Any = None) -> None:
        if folder.history.is_file():
            last, follow = int(pd.read_csv(folder.history).epoch.max()), epoch.value == epoch.max
            if teacher is not None and spec is not None and last not in drawn:
                drawn[last] = measure_generated_images(load_generator(run).train(), teacher, spec)
            epoch.max = last
            epoch.value = last if follow else epoch.value

    def draw(figure: Figure, quantity: str, epoch: int) -> pd.DataFrame:
        if not epoch:
            raise UserError("epoch 0: no epoch is finished yet")
        rows, images = pd.read_csv(folder.history), drawn[max(e for e in drawn if e <= epoch)]
        axes = figure.subplots(1, 1 if images.empty else 2, squeeze=False)[0]
        plot_training_curves(rows[rows.epoch <= epoch], quantity=quantity, legend=False, ax=axes[0])
        if not images.empty:
            plot_synthetic_images(images, ax=axes[1])
        return rows.loc[rows.epoch == epoch, ["epoch", "test_top1", "teacher_top1"]]

    reread()
    play.observe(reread, "value")
    monitor = _explorer("training monitor", draw, {"quantity": _choose("curve", TRAINING_LABELS), "epoch": epoch})
    monitor.children[1].children += (play,)
    return monitor


_LOOK: dict[str, Any] = {"style": {"description_width": "140px"}, "layout": {"width": "375px"}}


def _choose(label: str, values: Iterable[Any]) -> widgets.Widget:
    """Return a list of known names, or a slider, which draws when it is let go."""
    options = {_LABELS.get(value) or short_layer(str(value)): value for value in dict.fromkeys(values)}
    if set(options) <= set(_LABELS.values()):
        return widgets.Dropdown(options=options, description=label, **_LOOK)
    return widgets.SelectionSlider(options=list(options.items()), description=label, continuous_update=False, **_LOOK)


def _explorer(
    title: str, draw: Callable[..., pd.DataFrame], controls: dict[str, Any], height: float = 2.8
) -> widgets.VBox:
    """Put controls above a picture and its numbers: ``draw(figure, **values)`` draws the one and returns the other."""
    picture = widgets.Image(format="png", layout={"width": "700px", "height": f"{round(100 * height)}px"})
    numbers = widgets.HTML(layout={"height": "120px", "overflow": "auto"})

    def update(**values: Any) -> None:
        figure, buffer = Figure(figsize=(7, height), layout="constrained"), BytesIO()
        with plt.style.context(STYLE):
            try:
                table = draw(figure, **values)
            except UserError as error:
                table = pd.DataFrame({"nothing to show": [str(error)]})
            figure.savefig(buffer, dpi=100)
        picture.value, numbers.value = (
            buffer.getvalue(),
            table.to_html(index=False, border=0, float_format="{:.4g}".format),
        )

    errors = widgets.interactive_output(update, controls)  # shows what a callback raises
    box = widgets.GridBox([*controls.values()], layout={"grid_template_columns": "repeat(2, 385px)"})
    return widgets.VBox([widgets.HTML(f"<b>{title}</b>"), box, picture, numbers, errors])
