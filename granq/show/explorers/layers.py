"""Which layer is guilty: the error of every layer under every scheme, and of the channels inside one."""

from typing import Any

import altair as alt
from pandas import DataFrame

from granq.show.explorers.base import TEXT, WIDTH, color, finish, layer_axis, menu, pack, pick_layer, short
from granq.show.explorers.network import network_panel
from granq.show.layers import METRIC_LABELS, SENSITIVITY_LABELS, SQNR_CEILING
from granq.show.style import select

KEYS, METRICS, LOOSE = ["layer", "scheme", "mode"], [*METRIC_LABELS], alt.Scale(nice=False, zero=False, padding=8)
LABELS = METRIC_LABELS | {"kl": SENSITIVITY_LABELS["kl"] + ", this layer alone"}
ABOVE = f"{LABELS}[metric] + (metric == 'kl' ? '' : ', ' + mode)"  # titles; KL has no mode, and no channels
INSIDE = f"{LABELS}[metric == 'kl' ? 'sqnr_db' : metric] + ', ' + mode"


def layer_explorer(data: DataFrame, layout: DataFrame | None = None) -> alt.VConcatChart:
    """Explore ``measure_layer_error``, rows of layers and of channels in one frame: all layers, and inside one.

    A click chooses a layer, so does the list. One scheme is compared with another or with all. A column ``kl`` of
    ``measure_sensitivity`` is one metric more, of layers only; with a ``network_layout`` the network is drawn too.
    """
    data = select(data.astype({"layer": str}), weight_bits=None, act_bits=None)
    data["sqnr_db"] = data.sqnr_db.clip(upper=SQNR_CEILING)
    schemes = data.scheme.unique().tolist()
    metrics = [*METRICS, *data.columns.intersection(["kl"])]
    controls = [
        menu("metric", metrics, value="sqnr_db", labels=[LABELS[name] for name in metrics]),
        menu("mode", data["mode"].unique().tolist(), "errors"),
        menu("scheme", schemes, value="granq" if "granq" in schemes else schemes[0]),
        menu("pinned", ["all", *(schemes[1:] and schemes)], "compare with"),
        menu("order", ["depth", "rank"], "layers by", labels=["depth", "error, worst first"]),
    ]
    inside = data[data.channel.notna()].dropna(subset="sqnr_db").sort_values("sqnr_db")
    worst = inside.drop_duplicates(KEYS)[[*KEYS, "channel"]].rename(columns={"channel": "worst"})
    rows = data.loc[data.channel.isna(), KEYS + metrics].merge(worst, how="left")
    pick = pick_layer(data.layer, rows.sort_values("sqnr_db").layer.iloc[0])
    looks = alt.Scale(domain=schemes, range=[color(name) for name in schemes])
    scheme = alt.Color("scheme:N", title=None, scale=looks, legend=alt.Legend(orient="top"))

    def panel(chart: Any, x: alt.X, height: int, hover: str, title: str, *below: Any) -> Any:
        y = alt.Y("value:Q", title=None, scale=LOOSE)
        shown = chart.transform_filter("datum.scheme == scheme || pinned == 'all' || datum.scheme == pinned")
        shape, told = alt.Shape("scheme:N", title=None, scale=alt.Scale(domain=schemes)), ["layer:N", "scheme:N", hover]
        dots = shown.mark_point(filled=True, size=40, opacity=1, stroke=TEXT, strokeWidth=0.5)
        dots = dots.encode(x, y, scheme, shape, tooltip=[*told, "value:Q"])
        fixed = chart.mark_point(opacity=0, aria=False).encode(x, y)  # the axes stay when schemes are chosen
        wide = alt.condition("datum.scheme == scheme", alt.value(2.5), alt.value(1))
        lines = shown.mark_line().encode(x, y, scheme, strokeWidth=wide)
        said = alt.Title(alt.expr(title), fontWeight="normal")
        return alt.layer(fixed, lines, *below, dots).properties(width=WIDTH, height=height, title=said)

    every = _placed(rows)
    x = alt.X("place:Q", title=None, axis=layer_axis(rows.layer, "order == 'depth'"), scale=LOOSE)
    here = every.transform_filter(pick).mark_rule(strokeDash=[3, 3], opacity=0.5).encode(x)
    packed = pack(short(inside[[*KEYS, "channel", *METRICS]], METRICS), KEYS, ["channel", *METRICS])
    own = alt.Chart(packed).transform_filter(pick).transform_flatten(["channel", *METRICS])
    own = _values(own, "(metric == 'kl' ? 'sqnr_db' : metric)")
    own = own.transform_window(rank="row_number()", sort=[alt.SortField("bad")], groupby=["scheme"])
    ranks = alt.X("rank:Q", title="output channels of the chosen layer, worst first", scale=LOOSE,
                  axis=alt.Axis(tickMinStep=1, format="d"))  # fmt: skip
    above = panel(every, x, 190, "worst:Q", ABOVE, here.add_params(pick))
    panels = [above, panel(own, ranks, 140, "channel:Q", INSIDE)]
    chart = alt.vconcat(*panels) if layout is None else _under_graph(panels, rows, layout, pick)
    told = "The error of every layer under several schemes, and below it that of the channels of one layer."
    return finish(chart, "Which layer is guilty?", told, *controls)


def _under_graph(panels: list[Any], rows: DataFrame, layout: DataFrame, pick: alt.Parameter) -> alt.VConcatChart:
    """Draw the network above the panels; a click on one of its layers chooses too."""
    drawn = _values(alt.Chart(rows.merge(layout[layout.kind == "layer"]))).transform_filter("datum.scheme == scheme")
    graph = network_panel(drawn.properties(name="network"), layout, ["layer:N", "worst:Q", "value:Q"])
    chart: Any = alt.vconcat(graph, *panels)
    next(param for param in chart.params if param.name == pick.name).views.append(chart.vconcat[0].layer[-1].name)
    return chart


def _values(chart: alt.Chart, metric: str = "metric") -> alt.Chart:
    """Keep the chosen mode; add the chosen metric as ``value``, and ``bad``, which is lowest for the worst."""
    chart = chart.transform_filter("datum.mode == mode").transform_calculate(value=f"datum[{metric}]")
    small = f"indexof(['mse', 'kl'], {metric}) >= 0"
    return chart.transform_calculate(bad=f"{small} ? -log(max(datum.value, 1e-9)) : datum.value")


def _placed(rows: DataFrame) -> alt.Chart:
    """Add the place of every layer: its depth, or its rank within the chosen scheme, for all schemes."""
    every = _values(alt.Chart(rows.assign(depth=rows.layer.factorize()[0] + 1)))
    every = every.transform_calculate(own="datum.scheme == scheme ? datum.bad : null")
    every = every.transform_joinaggregate(key="max(own)", groupby=["layer"])
    every = every.transform_window(rank="dense_rank()", sort=[alt.SortField("key"), alt.SortField("depth")])
    return every.transform_calculate(place="order == 'depth' ? datum.depth : datum.rank")
