"""The method figure, alive: the data flow of GranQ, drawn from a real layer."""

from typing import Any

import altair as alt
from pandas import DataFrame

from granq.show.explorers.base import RED, TEXT, finish, pack, quantized, slider
from granq.show.style import short_layer


def method_figure(data: DataFrame) -> alt.HConcatChart:
    """Explore ``measure_data_flow``: rows of x, vectors of minima and maxima, s and z, rows of x_q, for any bits."""
    packed = pack(data[["channel", "pixel", "x", "low", "high"]], ["channel"], ["pixel", "x"])
    values = quantized(alt.Chart(packed).transform_flatten(["pixel", "x"]), "datum.low", "datum.high")
    ends = [float(end) for end in (data.x.min(), data.x.max())]
    tall = 15 * len(packed)
    names = alt.Axis(title=None, labelExpr="'channel ' + datum.value", ticks=False, domain=False)

    def grid(field: str, title: str, axis: Any = None) -> alt.Chart:
        colors = alt.Color(f"{field}:Q", scale=alt.Scale(scheme="viridis", domain=ends), legend=None)
        hover = ["channel:O", "pixel:O", *(alt.Tooltip(f"{name}:Q", format=".4~g") for name in ("x", "code", "value"))]
        cells = values.mark_rect().encode(
            alt.X("pixel:O", axis=None), alt.Y("channel:O", axis=axis), colors, tooltip=hover
        )
        return cells.properties(width=128, height=tall, title=alt.Title(title, anchor="middle"))

    def vectors(first: str, second: str, titles: dict[str, str]) -> alt.Chart:
        one = values.transform_aggregate(low="min(low)", high="max(high)", s="max(s)", z="max(z)", groupby=["channel"])
        one = one.transform_fold([first, second], ["name", "number"])
        head = alt.Axis(title=None, orient="top", labelExpr=f"{titles}[datum.value]", ticks=False, domain=False,
                        labelAngle=0, labelFontSize=12)  # fmt: skip
        x = alt.X("name:N", sort=[first, second], axis=head)
        text = one.mark_text(fontSize=10, color=RED if first == "s" else TEXT).encode(
            x, alt.Y("channel:O", axis=None), alt.Text("number:Q", format=".3~g"),
            tooltip=["channel:O", "name:N", "number:Q"])  # fmt: skip
        return text.properties(width=84, height=tall)

    still = alt.Chart(DataFrame({"said": ["scale and zero-point calibration"]}))
    sides = {"x": 0, "x2": 24, "y": 0, "y2": tall}
    frame = still.mark_rect(stroke=TEXT, fillOpacity=0, cornerRadius=6)
    frame = frame.encode(**{name: alt.value(at) for name, at in sides.items()})
    said = still.mark_text(angle=270, fontSize=12).encode(text="said:N", x=alt.value(12), y=alt.value(tall / 2))
    box = alt.layer(frame, said).properties(width=24, height=tall)
    arrow = alt.Chart(DataFrame({"to": ["→"]})).mark_text(fontSize=18).properties(width=12, height=tall)
    arrow = arrow.encode(text="to:N", x=alt.value(6), y=alt.value(tall / 2))
    parts = [grid("x", "x", names), vectors("low", "high", {"low": "min", "high": "max"}), box,
             vectors("s", "z", {"s": "s", "z": "z"}), grid("value", "x_q")]  # fmt: skip
    row = [parts[0], *(chart for part in parts[1:] for chart in (arrow, part))]
    told = "Channels as rows of x; vectors of minima and maxima; one calibration; vectors s and z; rows of x_q."
    where = f"How are all channels of {short_layer(data.layer.iloc[0])} quantized at once?"
    chart = alt.hconcat(*row, spacing=4).resolve_scale(y="shared", color="independent")
    return finish(chart, where, told, slider("bits", int(data.bits.iloc[0]), 2, 8))
