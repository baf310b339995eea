"""Ranges of weights and activations of every layer, and how far apart those of its channels are."""

from typing import Any

import altair as alt
from pandas import DataFrame

from granq.measure.running import DEAD
from granq.show.explorers.base import GREY, RED, TEXT, WIDTH, finish, layer_axis, menu, short, slider

ENDS = ["low", "high", "usual_low", "usual_high", "narrowest", "median", "widest", "whole"]


def range_explorer(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_ranges``: the range of every layer, and the steps of its channels at any number of bits."""
    width = (data.high - data.low).where(data.high - data.low > DEAD)  # a constant channel has no step
    rows = data.assign(width=width).groupby(["part", "layer"], sort=False)
    rows = rows.agg(low=("low", "min"), high=("high", "max"), usual_low=("low", "median"), usual_high=("high", "median"),
                    narrowest=("width", "min"), median=("width", "median"), widest=("width", "max"),
                    channels=("width", "size"), live=("width", "count")).reset_index()  # fmt: skip
    rows = rows.assign(whole=rows.high - rows.low, constant=rows.channels - rows.live)
    rows["number"] = rows.layer.map({name: i for i, name in enumerate(data.layer.unique(), 1)})
    shown = alt.Chart(short(rows, ENDS)).transform_filter("datum.part == part")
    for name in ENDS[4:]:
        shown = shown.transform_calculate(**{name: f"datum.{name} / (pow(2, bits) - 1)"})
    loose, names = alt.Scale(nice=False, zero=False, padding=8), layer_axis(data.layer)
    x, hover = alt.X("number:Q", title=None, axis=names, scale=loose), ["layer:N", "channels:Q", "constant:Q"]
    bare = x.axis(alt.Axis(labels=False, ticks=False, grid=False))

    def span(low: str, high: str, across: alt.X, y: alt.Y, **look: Any) -> alt.Chart:
        return shown.mark_rule(**look).encode(across, y, y2=f"{high}:Q", tooltip=[*hover, f"{low}:Q", f"{high}:Q"])

    value = alt.Y("low:Q", title="value", scale=loose)
    usual = span("usual_low", "usual_high", bare, alt.Y("usual_low:Q"), color=RED, strokeWidth=5)
    ranges = alt.layer(span("low", "high", bare, value, strokeWidth=2), usual)
    step = alt.Y("narrowest:Q", title="step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~g"))
    marks = [span("narrowest", "widest", x, step, color=GREY, strokeWidth=3)]
    for name, look in (("median", dict(shape="circle", color=RED)), ("whole", dict(shape="diamond", color=TEXT))):
        point = shown.mark_point(filled=True, size=35, opacity=1, **look)
        marks.append(point.encode(x, alt.Y(f"{name}:Q"), tooltip=[*hover, f"{name}:Q"]))
    above = ranges.properties(width=WIDTH, height=150, title="whole layer, and in red its median channel")
    below = alt.layer(*marks).properties(width=WIDTH, height=150, title=(
        "steps: narrowest to widest channel, red the median, diamond one step for all"))  # fmt: skip
    told = "The range of every layer with that of its median channel, and below it the steps that its channels need."
    parts = menu("part", sorted(data.part.unique()), "ranges of")
    return finish(alt.vconcat(above, below), "How far apart are the ranges?", told, parts, slider("bits", 3, 2, 8))
