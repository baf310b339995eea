"""Ranges of weights and activations of every layer, and how far apart those of its channels are."""

from typing import Any

import altair as alt
from pandas import DataFrame

from granq.measure.running import DEAD
from granq.show.explorers.base import GREY, RED, TEXT, WIDTH, finish, layer_axis, menu, short, slider

ENDS = ["low", "high", "usual_low", "usual_high", "narrowest", "median", "widest", "whole"]


def range_explorer(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_ranges``: the range of every layer, and the steps of its channels at any number of bits."""
    width = data.high - data.low
    groups = data.assign(width=width.where(width > DEAD)).groupby(["part", "layer"], sort=False)  # dead: no step
    rows = groups.agg(
        low=("low", "min"), high=("high", "max"), usual_low=("low", "median"), usual_high=("high", "median"),
        narrowest=("width", "min"), median=("width", "median"), widest=("width", "max"),
    ).reset_index()  # fmt: skip
    rows["place"] = rows.layer.map({name: i for i, name in enumerate(data.layer.unique(), 1)})
    shown: Any = alt.Chart(short(rows.assign(whole=rows.high - rows.low), ENDS)).transform_filter("datum.part == part")
    for name in ENDS[4:]:
        shown = shown.transform_calculate(**{name: f"datum.{name} > 0 ? datum.{name} / (pow(2, bits) - 1) : null"})
    loose = alt.Scale(nice=False, zero=False, padding=8)
    x = alt.X("place:Q", title=None, axis=layer_axis(data.layer), scale=loose)

    def panel(ends: tuple[str, str], inner: Any, title: str, y: alt.Y, **look: Any) -> Any:
        hover = ["layer:N", *(f"{name}:Q" for name in ENDS)]
        outer = shown.mark_rule(**look).encode(x, y, y2=f"{ends[1]}:Q", tooltip=hover)
        layers = [outer, *(mark.encode(x, alt.Y(f"{name}:Q"), tooltip=hover, **more) for mark, name, more in inner)]
        return alt.layer(*layers).properties(width=WIDTH, height=150, title=alt.Title(title, fontWeight="normal"))

    usual = (shown.mark_rule(color=RED, strokeWidth=5), "usual_low", {"y2": "usual_high:Q"})
    point: dict[str, Any] = dict(filled=True, size=35, opacity=1)
    steps: list[Any] = [(shown.mark_point(shape="circle", color=RED, **point), "median", {}),
             (shown.mark_point(shape="diamond", color=TEXT, **point), "whole", {})]  # fmt: skip
    log = alt.Y("narrowest:Q", title=None, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~g"))
    chart = alt.vconcat(
        panel(("low", "high"), [usual], "range of the layer, and in red of its median channel",
              alt.Y("low:Q", title=None, scale=loose), strokeWidth=2),
        panel(("narrowest", "widest"), steps, "steps, from the narrowest to the widest channel; red: the median; "
              "diamond: one for all", log, color=GREY, strokeWidth=3),
    )  # fmt: skip
    told = "The range of every layer with that of its median channel, and below it the steps that its channels need."
    parts = menu("part", sorted(data.part.unique()), "ranges of")
    return finish(chart, "How far apart are the ranges?", told, parts, slider("bits", 3, 2, 8))
