"""Explorers for notebooks: each function takes precomputed frames and returns one widget.

No callback runs a network: moving a control selects rows of a frame and redraws one picture of fixed height, with its
numbers as text beneath. All controls are core ipywidgets, so Tab, the arrow keys and the mouse reach them. This is the
only file that imports ipywidgets.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from granq import figures
from granq.analysis import ACTIVATION_GRANULARITIES, DEAD, measure_generated_images
from granq.data import DataSpec
from granq.generator import build_generator
from granq.runs import RunFolder

_DPI = 100
_STYLE = matplotlib.rc_params_from_file(figures.STYLE, use_default_template=False)
_STYLE["figure.constrained_layout.use"] = False  # fixed margins: axes that do not move, drawn in half the time
_NAMES = {name: figures.granularity_role(name).label for name in ACTIVATION_GRANULARITIES}


def distortion_microscope(data: pd.DataFrame) -> widgets.Widget:
    """Full-precision and quantized histogram of one channel of one image, synthetic beside real, levels as ticks.

    Args:
        data: of ``measure_channel_histograms``.
    """
    keys = ["layer", "bits", "granularity", "image", "rank", "source"]
    groups = {key: rows for key, rows in data.groupby(keys, sort=False)}
    sources = list(dict.fromkeys(data.source))
    controls = {
        "layer": _slider("layer", data.layer, figures.short_layer),
        "rank": _slider("channel, narrow to wide", sorted(set(data["rank"]))),
        "image": _slider("image", sorted(set(data.image))),
        "bits": _slider("bits", sorted(set(data.bits))),
        "granularity": _dropdown("one scale", data.granularity, _NAMES),
    }

    def draw(figure: Figure, layer: str, rank: int, image: int, bits: int, granularity: str) -> str:
        rows = []
        for ax, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
            said = dict.fromkeys(
                ["images", "channel", "SQNR (dB)", "step (units of the activation)", "levels in use"], ""
            )
            part = groups.get((layer, bits, granularity, image, rank, source))
            if part is None:  # a layer with fewer live channels
                rows.append(said | {"images": source, "channel": "no such channel"})
                continue
            figures.plot_channel_histogram(part, image=image, rank=rank, legend=source == sources[-1], ax=ax)
            first = part.iloc[0]
            used = f"{first.levels_in_use} of {2**bits}"
            values = [source, first.channel, f"{first.sqnr_db:.1f}", f"{first.step:.4g}", used]
            rows.append(dict(zip(said, values, strict=True)))
        return _table(rows)

    return _explorer("distortion microscope", controls, draw, height=2.8, top=0.84)


def scale_explorer(data: pd.DataFrame) -> widgets.Widget:
    """Quantization steps of the channels of a layer, of all images or one, the widest channels named.

    Args:
        data: of ``measure_scale_maps``, of one or several layers.
    """
    live, keys = data[data.scale > DEAD], ["layer", "granularity"]
    groups = {key: rows for key, rows in live.groupby(keys, sort=False)}
    limits = live.groupby("layer").scale.agg(["min", "max"])
    channels = [rows.groupby(keys).channel.nunique() for rows in (data, live)]
    # as the granularity says that has the most: one scale for all channels is that of the live ones
    dead = channels[0].sub(channels[1], fill_value=0).groupby("layer").max().astype(int)
    controls = {
        "layer": _slider("layer", data.layer, figures.short_layer),
        "granularity": _dropdown("one scale", data.granularity, _NAMES),
        "image": _slider("image", [-1, *sorted(set(data.image))], lambda i: "all (pooled)" if i < 0 else str(i)),
    }

    def draw(figure: Figure, layer: str, granularity: str, image: int) -> str:
        every, look = groups.get((layer, granularity), live[:0]), figures.granularity_role(granularity)
        shown = every if image < 0 else every[every.image == image]
        if shown.empty:
            figure.text(0.5, 0.5, "every channel is constant here: no range, no scale", ha="center")
            return _table([{"different scales": 0, "dead channels": dead[layer]}])
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        left.scatter(every.channel, every.scale, s=6, color="#c9c9cd", label="all images")
        label = "pooled" if image < 0 else f"image {image}"
        left.scatter(shown.channel, shown.scale, s=9, color=look.color, marker=look.marker, label=label)
        channels = shown.groupby("channel").scale.mean().sort_values(ascending=False)
        named = channels.head(5) if channels.nunique() > 1 else channels[:0]
        for channel, scale in named.head(3).items():
            left.annotate(str(channel), (channel, scale), (3, 2), textcoords="offset points", fontsize=7)
        low, high = 0.9 * limits["min"][layer], 1.1 * limits["max"][layer]
        left.set(yscale="log", ylim=(low, high), xlabel="channel", title=figures.short_layer(layer))
        left.set_ylabel(f"step at {every.bits.iloc[0]} bits\n(units of the activation)")
        left.legend(loc="lower right", ncols=2)
        figures.plain_log(left.yaxis)
        right.hist(shown.scale, np.geomspace(low, high, 30), orientation="horizontal", color=look.color)
        right.set_xlabel("scales")
        worst = ", ".join(f"{c} ({v:.3g})" for c, v in named.items()) or "all the same"
        row = {
            "different scales": shown.scale.nunique(),
            "median step": f"{shown.scale.median():.3g}",
            "widest / narrowest": f"{shown.scale.max() / shown.scale.min():.1f}",
            "channels with the widest steps": worst,
            "dead channels": dead[layer],
        }
        return _table([row])

    return _explorer("scale explorer", controls, draw, bottom=0.18)


def layer_error_explorer(data: pd.DataFrame) -> widgets.Widget:
    """Layers ranked from the worst, and the channels of the one selected.

    Args:
        data: of ``measure_layer_error``, rows of layers and of channels (``per_channel=True``) in one frame.
    """
    layers = data[data.channel.isna()]
    channels = data[data.channel.notna()]
    controls = {
        "metric": _dropdown("metric", figures.METRIC_LABELS, figures.METRIC_LABELS),
        "scheme": _dropdown("scheme", data.scheme),
        "mode": _dropdown("input", data["mode"], {"local": "clean (local)", "accumulated": "quantized (accumulated)"}),
        "rank": _slider("layer, 1 = worst", range(1, layers.layer.nunique() + 1)),
    }

    def draw(figure: Figure, metric: str, scheme: str, mode: str, rank: int) -> str:
        look = figures.role(scheme)
        sign = -1 if metric == "mse" else 1  # a large error is bad, a large ratio good

        def ranked(rows: pd.DataFrame) -> pd.DataFrame:
            rows = rows[(rows.scheme == scheme) & (rows["mode"] == mode)]
            values = rows[metric].clip(upper=figures.SQNR_CEILING) if metric == "sqnr_db" else rows[metric]
            return rows.assign(value=values).sort_values("value", ascending=sign > 0, ignore_index=True)

        order = ranked(layers)
        chosen = order.iloc[rank - 1]
        inside = ranked(channels[channels.layer == chosen.layer])
        left, right = figure.subplots(1, 2)
        left.plot(order.value, range(len(order)), look.marker, color=look.color, markersize=3)
        left.plot(chosen.value, rank - 1, "o", markersize=9, color="black", fillstyle="none")
        left.set_yticks(range(len(order)), [figures.short_layer(n) for n in order.layer], fontsize=5.5)
        left.invert_yaxis()
        left.set(xlabel=figures.METRIC_LABELS[metric], title="layers, worst first")
        right.plot(range(1, len(inside) + 1), inside.value, color=look.color, marker=look.marker, markersize=3)
        right.set(xlabel="output channel, worst first", title=figures.short_layer(chosen.layer))
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        if metric == "mse":
            left.set_xscale("log")
            right.set_yscale("log")
            for axis in (left.xaxis, right.yaxis):
                figures.plain_log(axis)
        worst = ", ".join(f"{c:.0f} ({v:.3g})" for c, v in inside[["channel", "value"]].head(5).to_numpy())
        values = {figures.METRIC_LABELS[metric]: f"{chosen.value:.4g}", "worst channels": worst}
        return _table([{"rank": rank, "layer": chosen.layer} | values])

    return _explorer("layer error explorer", controls, draw, height=3.2, left=0.13)


_COUNTS = {"bytes": "bytes", "scale_multiplications": "scale multiplications", "peak_mb": "peak memory (MB)"}


def speed_lab(data: pd.DataFrame) -> widgets.Widget:
    """Measured times of every way to do the same thing, with their spread, the copy floor, and counts beside them.

    Args:
        data: of ``measure_latency_quantizer`` or ``measure_latency_scaling``: median_ms, q25_ms, q75_ms of every
            method or execution at every size, and counts (bytes, scale_multiplications, peak_mb) where it has them.
            Rows named ``copy`` are the floor.
    """
    if "execution" in data:
        data = data.assign(size=[f"{c} channels" for c in data.channels])
    else:
        sides = data["shape"].str.strip("()").str.split(", ")
        data = data.assign(execution=data.method, batch=sides.str[0].astype(int), size=sides.str[1:].str.join(" × "))
    groups = {key: rows.set_index("execution") for key, rows in data.groupby(["size", "batch"], sort=False)}
    names = [name for name in dict.fromkeys(data.execution) if name != "copy"]
    counts = [column for column in _COUNTS if column in data]
    controls = {
        "size": _slider("size of an image", data["size"]),
        "batch": _slider("images", sorted(set(data.batch))),
        "execution": _slider("execution", names),
    }
    controls["batch"].value = data.batch.mode().iloc[0]  # most sizes were measured with it

    def draw(figure: Figure, size: str, batch: int, execution: str) -> str:
        rows = groups.get((size, batch))
        if rows is None or execution not in rows.index:
            known = [str(n) for (s, n), other in groups.items() if s == size and execution in other.index]
            measured = f"measured: {', '.join(known) or 'nothing'}"
            figure.text(0.5, 0.5, f"{execution}: not measured with {batch} images; {measured}", ha="center")
            return _table([{"execution": execution, "time (ms)": "not measured"}])
        ax = figure.subplots()
        bars = rows.loc[[name for name in names if name in rows.index]]
        colors = [figures.ROLES["release"].color if name == execution else "#c9c9cd" for name in bars.index]
        spread = [bars.median_ms - bars.q25_ms, bars.q75_ms - bars.median_ms]
        ax.barh(bars.index, bars.median_ms, color=colors, xerr=spread, capsize=3)
        ax.set(xlabel="time (ms), median and quartiles", xscale="log")
        ax.set_xlim(0.5 * rows.q25_ms.min(), 1.3 * rows.q75_ms.max())
        figures.plain_log(ax.xaxis)
        chosen = rows.loc[execution]
        cells = {"execution": execution}
        cells["time (ms), quartiles"] = f"{chosen.median_ms:.3g} ({chosen.q25_ms:.3g} to {chosen.q75_ms:.3g})"
        if "copy" in rows.index:
            floor = rows.median_ms["copy"]
            ax.axvline(floor, color="black", linestyle=":", label="copy of the same bytes")
            ax.legend(loc="upper right")
            cells["times the copy"] = f"{chosen.median_ms / floor:.1f}"
        cells |= {_COUNTS[c]: f"{chosen[c]:,.0f}" if chosen[c] >= 1000 else f"{chosen[c]:.3g}" for c in counts}
        return _table([cells])

    return _explorer("speed lab", controls, draw, left=0.25)


def training_monitor(
    run: str | Path, teacher: nn.Module | None = None, spec: DataSpec | None = None, interval: float = 2.0
) -> widgets.Widget:
    """Curves and generated images of a run while it is going, read from its folder, which another process writes.

    Play rereads the folder; the slider shows the run up to an epoch. Images are drawn when an epoch arrives, by the
    generator of its checkpoint, and not when a control moves.

    Args:
        run: folder of ``granq quantize`` or ``granq.train(out=...)``; it need not exist yet.
        teacher: judges the images; without it none are shown.
        spec: its data.
        interval: seconds between two looks at the folder.
    """
    folder = RunFolder(run)
    names = {key: text.replace("\n", " ") for key, text in figures.TRAINING_LABELS.items()}
    epoch = widgets.IntSlider(0, 0, 0, description="up to epoch", continuous_update=False, **_look())
    quantity = _dropdown("curve", names, names)
    quantity.value = "test_top1"
    play = widgets.Play(interval=round(1000 * interval), min=0, max=100_000, tooltip="reread the run folder")
    history, drawn = pd.DataFrame(), dict[int, pd.DataFrame]()

    def reread(_: Any = None) -> None:
        nonlocal history
        path = folder.path / "history.csv"
        if not path.is_file():
            return
        history = pd.read_csv(path)  # replaced atomically: never half a file
        last, follow = int(history.epoch.max()), epoch.value == epoch.max
        if teacher is not None and spec is not None and last not in drawn and (state := folder.load()):
            generator = build_generator(spec.classes, folder.read_config()["config"]["image_size"])
            generator.load_state_dict(state["generator"])
            drawn[int(state["epoch"])] = measure_generated_images(generator.train(), teacher, spec)
        epoch.max = last
        if follow:
            epoch.value = last
        epoch.min = 1

    def draw(figure: Figure, quantity: str, epoch: int) -> str:
        rows = history[history.epoch <= epoch] if epoch else history
        if rows.empty:
            figure.text(0.5, 0.5, "no epoch is finished yet", ha="center")
            return _table([{"run": folder.path, "epochs": 0}])
        images = drawn.get(max((e for e in drawn if e <= epoch), default=0))
        axes = figure.subplots(1, 1 if images is None else 2, squeeze=False)[0]
        figures.plot_training_curves(rows, quantity=quantity, legend=False, ax=axes[0])
        axes[0].set_xlim(0.5, history.epoch.max() + 0.5)
        if images is not None:
            figures.plot_synthetic_images(images, ax=axes[1])
        last, planned = rows.iloc[-1], folder.read_config()["config"]["epochs"]
        top1 = {"student on test images (%)": f"{last.test_top1:.2f}"}
        top1 |= {"teacher on synthetic images (%)": f"{last.teacher_top1:.1f}"}
        return _table([{"epoch": int(last.epoch), "of": planned} | top1])

    reread()
    play.observe(reread, "value")
    monitor = _explorer("training monitor", {"quantity": quantity, "epoch": epoch}, draw)
    monitor.children[1].children += (play,)
    return monitor


def _explorer(
    title: str, controls: Mapping[str, Any], draw: Callable[..., str], height: float = 2.6, **margins: float
) -> widgets.VBox:
    """Controls above one picture and one table of numbers; ``draw(figure, **values)`` returns the table as HTML."""
    width = 7.0
    # "none" whatever style the notebook uses; the stubs do not know it
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="none")  # type: ignore[arg-type]
    canvas = FigureCanvasAgg(figure)
    pixels = {"height": f"{round(height * _DPI)}px", "width": f"{round(width * _DPI)}px"}
    picture = widgets.Image(format="png", layout=widgets.Layout(**pixels))
    numbers = widgets.HTML(layout=widgets.Layout(height="90px", width="100%", overflow="auto"))
    margins = {"left": 0.09, "right": 0.985, "bottom": 0.17, "top": 0.9, "wspace": 0.2} | margins

    def update(**values: Any) -> None:
        buffer = BytesIO()
        with _later_collection(), matplotlib.rc_context(_STYLE):
            figure.clear()
            text = draw(figure, **values)
            figure.subplots_adjust(**margins)
            canvas.print_png(buffer)
            picture.value, numbers.value = buffer.getvalue(), text

    box = widgets.GridBox([*controls.values()], layout=widgets.Layout(grid_template_columns="repeat(2, 385px)"))
    errors = widgets.interactive_output(update, dict(controls))  # shows what a callback raises
    return widgets.VBox([widgets.HTML(f"<b>{escape(title)}</b>"), box, picture, numbers, errors])


@contextmanager
def _later_collection() -> Iterator[None]:
    """Garbage waits until the picture is sent: beside torch's many objects one full collection takes 0.2 to 0.4 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _slider(label: str, values: Iterable[Any], name: Callable[[Any], str] = str) -> widgets.SelectionSlider:
    """A slider over different values, which changes the picture when it is let go."""
    options = [(name(v), v) for v in dict.fromkeys(values)]
    return widgets.SelectionSlider(options=options, description=label, continuous_update=False, **_look())


def _dropdown(label: str, values: Iterable[str], names: Mapping[str, str] | None = None) -> widgets.Dropdown:
    options = [((names or {}).get(v, v), v) for v in dict.fromkeys(values)]
    return widgets.Dropdown(options=options, description=label, **_look())


def _look() -> dict[str, Any]:
    return {"style": {"description_width": "140px"}, "layout": widgets.Layout(width="375px")}


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows that say the same things as an HTML table, one column for each key."""
    rows = list(rows)
    style = "text-align:left;padding:0 12px 0 0;white-space:nowrap"
    lines = [("th", list(rows[0])), *(("td", list(row.values())) for row in rows)]
    cells = ("".join(f"<{tag} style='{style}'>{escape(str(v))}</{tag}>" for v in line) for tag, line in lines)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"
