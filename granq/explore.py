"""Explorers for notebooks: each function takes precomputed frames and returns one widget.

No callback runs a network: moving a control selects rows of a frame and redraws one picture of fixed height, with its
numbers as text beneath. All controls are core ipywidgets, so Tab, the arrow keys and the mouse reach them. This is the
only file that imports ipywidgets.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from granq.analysis import ACTIVATION_GRANULARITIES, measure_generated_images
from granq.data import DataSpec
from granq.generator import build_generator
from granq.runs import RunFolder

_DPI = 100
_DEAD = 1e-7  # a channel of zeros has the smallest step there is, 1e-8 / (2^k - 1)
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
        "layer": _choice("layer", data.layer, figures.short_layer),
        "rank": _slider("channel, narrow to wide", data["rank"]),
        "image": _slider("image", data.image),
        "bits": _choice("bits", sorted(set(data.bits)), str),
        "granularity": _dropdown("one scale", data.granularity, _NAMES),
    }

    def draw(figure: Figure, layer: str, rank: int, image: int, bits: int, granularity: str) -> str:
        rows = []
        for ax, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
            part = groups.get((layer, bits, granularity, image, rank, source))
            if part is None:  # a layer with fewer live channels
                rows.append([source, "no such channel", "", ""])
                continue
            figures.plot_channel_histogram(part, image=image, rank=rank, legend=source == sources[-1], ax=ax)
            first = part.iloc[0]
            used = (part.count_quantized > 0).sum()
            rows.append([source, first.channel, f"{first.sqnr_db:.1f}", f"{first.step:.4g}", f"{used} of {2**bits}"])
        return _table(["images", "channel", "SQNR (dB)", "step (units of the activation)", "levels in use"], rows)

    return _explorer("distortion microscope", controls, draw, height=2.8, top=0.84)


def scale_explorer(data: pd.DataFrame) -> widgets.Widget:
    """Quantization steps of the channels of a layer, of all images or one, the widest channels named.

    Args:
        data: of ``measure_scale_maps``, of one or several layers.
    """
    live = data[data.scale > _DEAD]
    groups = {key: rows for key, rows in live.groupby(["layer", "granularity"], sort=False)}
    limits = live.groupby("layer").scale.agg(["min", "max"])
    dead = data.groupby("layer").channel.nunique() - live.groupby("layer").channel.nunique()
    controls = {
        "layer": _choice("layer", data.layer, figures.short_layer),
        "granularity": _dropdown("one scale", data.granularity, _NAMES),
        "image": _selection("image", [("all (pooled)", -1), *((str(i), i) for i in sorted(set(data.image)))]),
    }

    def draw(figure: Figure, layer: str, granularity: str, image: int) -> str:
        every, look = groups[layer, granularity], figures.granularity_role(granularity)
        shown = every if image < 0 else every[every.image == image]
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        left.scatter(every.channel, every.scale, s=6, color="#c9c9cd", label="all images")
        left.scatter(shown.channel, shown.scale, s=9, color=look.color, marker=look.marker,
                     label="pooled" if image < 0 else f"image {image}")  # fmt: skip
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
        ratio = shown.scale.max() / shown.scale.min()
        row = [shown.scale.nunique(), f"{shown.scale.median():.3g}", f"{ratio:.1f}", worst, dead[layer]]
        return _table(["different scales", "median step", "widest / narrowest", "channels with the widest steps",
                       "dead channels"], [row])  # fmt: skip

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
        "scheme": _dropdown("scheme", data.scheme, {}),
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
        chosen = order.iloc[min(rank, len(order)) - 1]
        inside = ranked(channels[channels.layer == chosen.layer])
        left, right = figure.subplots(1, 2)
        left.plot(order.value, range(len(order)), look.marker, color=look.color, markersize=3)
        left.plot(chosen.value, order.layer.tolist().index(chosen.layer), "o", markersize=9, color="black",
                  fillstyle="none")  # fmt: skip
        left.set_yticks(range(len(order)), [figures.short_layer(n) for n in order.layer], fontsize=5.5)
        left.invert_yaxis()
        left.set(xlabel=figures.METRIC_LABELS[metric], title="layers, worst first")
        right.plot(range(1, len(inside) + 1), inside.value, color=look.color, marker=look.marker, markersize=3)
        right.set(xlabel="output channel, worst first", title=figures.short_layer(chosen.layer))
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        if metric == "mse":
            left.set_xscale("log")
            right.set_yscale("log")
            figures.plain_log(left.xaxis)
            figures.plain_log(right.yaxis)
        worst = ", ".join(f"{c:.0f} ({v:.3g})" for c, v in inside[["channel", "value"]].head(5).to_numpy())
        return _table(["rank", "layer", figures.METRIC_LABELS[metric], "worst channels"],
                      [[rank, chosen.layer, f"{chosen.value:.4g}", worst]])  # fmt: skip

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
        "size": _choice("size of an image", data["size"], str),
        "batch": _choice("images", sorted(set(data.batch)), str),
        "execution": _choice("execution", names, str),
    }
    controls["batch"].value = data.batch.mode().iloc[0]  # most sizes were measured with it

    def draw(figure: Figure, size: str, batch: int, execution: str) -> str:
        rows = groups.get((size, batch))
        if rows is None:
            known = ", ".join(str(n) for s, n in groups if s == size)
            figure.text(0.5, 0.5, f"not measured with {batch} images; measured: {known}", ha="center")
            return _table(["execution", "time (ms)"], [[execution, "not measured"]])
        ax = figure.subplots()
        for y, name in enumerate(names):
            row = rows.loc[name]
            spread = [[row.median_ms - row.q25_ms], [row.q75_ms - row.median_ms]]
            color = figures.ROLES["release"].color if name == execution else "#c9c9cd"
            ax.barh(y, row.median_ms, color=color, xerr=spread, capsize=3)
        ax.set_yticks(range(len(names)), names)
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
        return _table(list(cells), [list(cells.values())])

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
    epoch = _slider("up to epoch", [0, 0])
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
            generator = build_generator(spec.classes, spec.image_size)
            generator.load_state_dict(state["generator"])
            drawn[int(state["epoch"])] = measure_generated_images(generator.train(), teacher, spec)
        epoch.max = last
        if follow:
            epoch.value = last

    def draw(figure: Figure, quantity: str, epoch: int) -> str:
        rows = history[history.epoch <= epoch] if epoch else history
        if rows.empty:
            figure.text(0.5, 0.5, "no epoch is finished yet", ha="center")
            return _table(["run", "epochs"], [[folder.path, 0]])
        images = drawn.get(max((e for e in drawn if e <= epoch), default=0))
        axes = figure.subplots(1, 1 if images is None else 2, squeeze=False)[0]
        figures.plot_training_curves(rows, quantity=quantity, legend=False, ax=axes[0])
        axes[0].set_xlim(0.5, history.epoch.max() + 0.5)
        if images is not None:
            figures.plot_synthetic_images(images, ax=axes[1])
        last, planned = rows.iloc[-1], folder.read_config()["config"]["epochs"]
        return _table(["epoch", "of", "student on test images (%)", "teacher on synthetic images (%)"],
                      [[int(last.epoch), planned, f"{last.test_top1:.2f}", f"{last.teacher_top1:.1f}"]])  # fmt: skip

    reread()
    play.observe(reread, "value")
    monitor = _explorer("training monitor", {"quantity": quantity, "epoch": epoch}, draw)
    monitor.children[1].children += (play,)
    return monitor


def controls_of(explorer: widgets.Widget) -> dict[str, widgets.Widget]:
    """The controls of an explorer by their label."""
    return {c.description: c for c in explorer.children[1].children if not isinstance(c, widgets.Play)}


def measure_reaction(explorer: widgets.Widget, moves: int = 50, seed: int = 0) -> pd.DataFrame:
    """Time from a control's new value to the new picture and numbers, over random moves of random controls.

    It is the kernel's share of a reaction; the browser still receives a picture of some ten kilobytes.

    Args:
        explorer: of any function above; its controls are left where the last move put them.
        moves: how many, each to a value other than the present one.
        seed: of the moves.

    Returns:
        One row per move that changed anything: control (its label), reaction_ms.
    """
    rng, rows = np.random.default_rng(seed), []
    shown = 0.0

    def note(_: Any) -> None:
        nonlocal shown
        shown = time.perf_counter()

    for output in explorer.children[2:4]:  # picture, numbers
        output.observe(note, "value")
    every = [(label, c, _values(c)) for label, c in controls_of(explorer).items() if len(_values(c)) > 1]
    for _ in range(moves):
        label, control, values = every[rng.integers(len(every))]
        value = [v for v in values if v != control.value][rng.integers(len(values) - 1)]
        start = time.perf_counter()
        control.value = value
        if shown > start:  # some moves lead to the same picture, which is not sent again
            rows.append({"control": label, "reaction_ms": 1000 * (shown - start)})
    for output in explorer.children[2:4]:
        output.unobserve(note, "value")
    return pd.DataFrame(rows, columns=["control", "reaction_ms"])


def _values(control: widgets.Widget) -> list[Any]:
    if isinstance(control, widgets.IntSlider):
        return list(range(control.min, control.max + 1))
    return [value for _, value in control.options]


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

    def update(**values: Any) -> None:
        with _later_collection(), matplotlib.rc_context(_STYLE):
            figure.clear()
            text = draw(figure, **values)
            figure.subplots_adjust(
                **{"left": 0.09, "right": 0.985, "bottom": 0.17, "top": 0.9, "wspace": 0.2} | margins
            )
            buffer = BytesIO()
            canvas.print_png(buffer)
            picture.value, numbers.value = buffer.getvalue(), text

    box = widgets.GridBox([*controls.values()], layout=widgets.Layout(grid_template_columns="repeat(2, 385px)"))
    errors = widgets.interactive_output(update, dict(controls))  # shows what a callback raises
    return widgets.VBox([widgets.HTML(f"<b>{escape(title)}</b>"), box, picture, numbers, errors])


_WIDE: dict[str, Any] = {"style": {"description_width": "140px"}, "continuous_update": False}


def _layout() -> widgets.Layout:
    return widgets.Layout(width="375px")


def _slider(label: str, values: Iterable[Any]) -> widgets.IntSlider:
    low, high = min(values), max(values)
    return widgets.IntSlider(int(low), int(low), int(high), description=label, layout=_layout(), **_WIDE)


def _selection(label: str, options: Sequence[tuple[str, Any]]) -> widgets.SelectionSlider:
    return widgets.SelectionSlider(options=options, description=label, layout=_layout(), **_WIDE)


def _choice(label: str, values: Iterable[Any], name: Callable[[Any], str]) -> widgets.SelectionSlider:
    return _selection(label, [(name(v), v) for v in dict.fromkeys(values)])


def _dropdown(label: str, values: Iterable[str], names: Mapping[str, str]) -> widgets.Dropdown:
    options = [(names.get(v, v), v) for v in dict.fromkeys(values)]
    return widgets.Dropdown(options=options, description=label, layout=_layout(), style=_WIDE["style"])


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    style = "text-align:left;padding:0 12px 0 0;white-space:nowrap"
    cells = ["".join(f"<{tag} style='{style}'>{escape(str(v))}</{tag}>" for v in row)
             for tag, row in [("th", heads), *(("td", row) for row in rows)]]  # fmt: skip
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
