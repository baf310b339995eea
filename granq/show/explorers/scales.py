"""Where scales differ: activations by image and channel, weights by filter and kernel."""

from typing import Any

import altair as alt
from pandas import DataFrame

from granq.measure.running import DEAD
from granq.show.explorers.base import TEXT, WIDTH, color, finish, menu, pack, short, slider
from granq.show.style import role, short_layer


def scale_explorer(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_scale_maps`` or ``measure_weight_scales``: a map for each granularity, and one row of them.

    It opens where the steps differ most: the layer, and the row of its finest map.
    """
    one, finest = "filter" if "filter" in data else "image", data.granularity.iloc[-1]
    names = {name: role(name).label.replace("_", " ") for name in data.granularity.unique()}
    live = data[data.scale > DEAD].assign(shown=data.granularity.map(names))  # constant channels stay empty
    spread = live[live.granularity == finest].groupby(["layer", one]).scale.agg(lambda v: v.max() / v.min())
    layer, row = spread.idxmax()
    layers = data.layer.unique()
    choice = menu("layer", layers, value=layer, labels=[short_layer(name) for name in layers])
    rows_of = slider("row", int(row), 0, int(data[one].max()), label=one)
    rows = short(live, ["scale"]).drop(columns=["bits", "granularity"])
    step = f"step at {data.bits.iloc[0]} bits"
    packed = pack(rows, ["layer", "shown", one], ["channel", "scale"])
    chosen = alt.Chart(packed).transform_filter("datum.layer == layer").transform_flatten(["channel", "scale"])
    hover = ["shown:N", f"{one}:O", "channel:O", alt.Tooltip("scale:Q", title="step", format=".3~g")]
    shades = alt.Scale(type="log", scheme="viridis")
    colors = alt.Color("scale:Q", title="step", scale=shades, legend=alt.Legend(format="~g"))
    axis = alt.Axis(labelOverlap=True, labelAngle=0, labelSeparation=8, ticks=False, grid=False)
    across, down = alt.X("channel:O", axis=axis), alt.Y(f"{one}:O", axis=axis)

    def panel(name: str) -> Any:
        own = chosen.transform_filter(alt.datum.shown == name)
        mark = own.transform_filter(f"datum.{one} == row").transform_aggregate(groupby=[one])
        mark = mark.mark_point(shape="triangle-left", filled=True, size=60, opacity=1, color=TEXT)
        cells = own.mark_rect().encode(across, down, colors, tooltip=hover)
        both = alt.layer(cells, mark.encode(down, x=alt.value(200)))
        return both.properties(width=192, height=128, title=name)  # whole pixels for 16, 32 and 64 channels

    maps = alt.concat(*map(panel, names.values()), columns=2)
    looks = alt.Scale(domain=list(names.values()), range=[color(name) for name in names])
    points = chosen.transform_filter(f"datum.{one} == row").mark_point(filled=True, size=30, opacity=1).encode(
        alt.X("channel:Q", title=f"channel of this {one}", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
        alt.Y("scale:Q", title=step, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~g", tickCount=5)),
        alt.Color("shown:N", title=None, scale=looks, legend=alt.Legend(orient="top", columns=2, labelLimit=250)),
        alt.Shape("shown:N", title=None, scale=alt.Scale(domain=looks.domain)), tooltip=hover)  # fmt: skip
    fixed = chosen.mark_point(opacity=0, aria=False).encode(x="channel:Q", y="scale:Q")  # axes stay for every row
    line = alt.layer(fixed, points).properties(width=WIDTH, height=150)
    chart = alt.vconcat(maps, line).resolve_scale(color="independent", shape="independent")
    told = f"Maps of the quantization step of every {one} and channel for each granularity, and the steps of one {one}."
    return finish(chart, f"Which channels share a step, and which {one} needs its own?", told, choice, rows_of)
