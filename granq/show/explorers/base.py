"""What the explorers share: the look, controls, the quantizer's formula in Vega's language, the way into a notebook.

An explorer takes a frame and returns an Altair chart. The chart holds data and formulas; the browser computes while a
control moves. Controls are HTML inputs: Tab reaches them, arrow keys move them; in JupyterLab, where arrow keys choose
cells, Page Up, Page Down, Home and End do. ``chart.save("x.html", inline=True)`` writes a page that needs no network.
"""

import base64
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import vl_convert
from pandas import DataFrame, Series

from granq.quantizer import EPS
from granq.show.style import BLACK, GREY, ROLES, role, short_layer

WIDTH = 540  #: pixels of a panel in a picture; in a browser panels take the room that there is
TEXT = "currentColor"  # the color of the text around the chart: dark on a light page, light on a dark one
RED = ROLES["granq"].color
MARKS = {"o": "circle", "^": "triangle-up", "v": "triangle-down", "D": "diamond", "P": "cross"}
_LINES = {"labelColor": TEXT, "titleColor": TEXT, "titleFontWeight": "normal"}
_LOOK: dict[str, Any] = {
    "background": "transparent", "view": {"stroke": None}, "text": {"color": TEXT}, "rule": {"color": TEXT},
    "axis": _LINES | {"domainColor": TEXT, "tickColor": TEXT, "gridColor": GREY, "gridOpacity": 0.3},
    "axisX": {"labelSeparation": 6},
    "legend": _LINES, "header": _LINES, "title": {"color": TEXT, "subtitleColor": TEXT, "anchor": "start"},
}  # fmt: skip


def slider(name: str, value: float, low: float, high: float, step: float = 1, label: str = "") -> alt.Parameter:
    """Return a parameter that a range input moves; the chart is drawn again at every step of the drag."""
    return alt.param(name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=f"{label or name} "))


def menu(name: str, options: Iterable[Any], label: str = "", value: Any = None, **labels: Any) -> alt.Parameter:
    """Return a parameter that a list of choices sets, at first to ``value`` or the first; one is no choice."""
    options = list(options)
    bind: Any = alt.binding_select(options=options, name=f"{label or name} ", **labels)
    bind = bind if len(options) > 1 else alt.Undefined
    return alt.param(name, value=options[0] if value is None else value, bind=bind)


def finish(chart: Any, title: str, description: str, *controls: alt.Parameter) -> Any:
    """Return the chart with its title, a description for screen readers, controls and the common look."""
    actions = {"export": True, "source": False, "compiled": False, "editor": False}  # the editor would need a network
    room = f"max(containerSize()[0] || 640, {500 * isinstance(chart, alt.HConcatChart)})"
    resize = {"events": {"source": "window", "type": "resize"}, "update": room}
    lines = f"width < 420 ? {textwrap.wrap(title, 38)} : {title!r}"
    patch = [  # of the compiled chart: its panels, which share ``width``, take the room
        {"op": "add", "path": "/autosize", "value": {"type": "fit-x", "contains": "padding"}},
        {"op": "add", "path": "/signals/-", "value": {"name": "width", "init": room, "on": [resize]}},
        {"op": "replace", "path": "/title/text", "value": {"signal": lines}},
    ]
    embed = {"renderer": "svg", "actions": actions, "patch": patch}  # SVG follows the page's text color
    chart = chart.properties(title=title, description=description, usermeta={"embedOptions": embed})
    return chart.add_params(*controls).configure(**_LOOK)


def panel(height: float, *layers: Any, title: Any = "") -> Any:
    """Return a panel, as wide as all others; the last layer lies on top."""
    heading = {"title": alt.Title(title, fontWeight="normal")} if title else {}
    return alt.layer(*layers).properties(width=WIDTH, height=height, **heading)


def looks(names: Iterable[str], labels: Sequence[str]) -> tuple[alt.Scale, alt.Scale]:
    """Return the scales that give ``labels`` the colors and the markers which the roles ``names`` have in figures."""
    roles = [role(name) for name in names]
    colors = [TEXT if one.color == BLACK else one.color for one in roles]  # black on paper: the color of the text
    marks = [MARKS.get(one.marker, "square") for one in roles]
    return alt.Scale(domain=labels, range=colors), alt.Scale(domain=labels, range=marks)


def pack(data: DataFrame, by: Sequence[str], lists: Sequence[str]) -> DataFrame:
    """Return one row a group, columns ``lists`` as lists, others constant; ``transform_flatten`` undoes it."""
    how = {name: list if name in lists else "first" for name in data.columns.drop(list(by))}
    return data.groupby(list(by), sort=False, as_index=False).agg(how)


def short(data: DataFrame, columns: Sequence[str]) -> DataFrame:
    """Round columns to four digits, what a picture can show: a chart lives in the notebook, as text."""
    return data.assign(**{name: data[name].map("{:.4g}".format).astype(float) for name in columns})


def pick_layer(layers: Series, value: str) -> alt.Parameter:
    """Return a parameter that a click on a mark with a ``layer`` sets, and a list of all layers as well."""
    names = layers.unique().tolist()
    bind = alt.binding_select(options=names, labels=[short_layer(name) for name in names], name="inside layer ")
    return alt.selection_point(name="inside", fields=["layer"], bind=bind, on="click", clear=False, value=value)


def layer_axis(layers: Series, when: str = "true") -> alt.Axis:
    """Return an axis that names the layers at 1, 2, 3, ..., or shows the numbers where ``when`` is false."""
    names = [short_layer(name) for name in layers.unique()]
    return alt.Axis(labelExpr=f"{when} ? {names}[datum.value - 1] : datum.value", values=[*range(1, len(names) + 1)],
                    labelAngle=-60, labelOverlap=False, labelFontSize=9, grid=False)  # fmt: skip


def half_even(number: str) -> str:
    """Return ``torch.round`` in Vega's language, whose own ``round`` takes halves up."""
    return f"(round({number}) - (abs(({number}) % 1) == 0.5 && round({number}) % 2 != 0 ? 1 : 0))"


def quantized(chart: Any, low: str, high: str, clamped: str = "true") -> Any:
    """Add s, z, code and value of ``datum.x`` to every row, line by line as ``granq.quantizer`` computes them.

    ``low`` and ``high`` are the ends of the range, as expressions; the parameter ``bits`` is the width.
    """
    half = "pow(2, bits - 1)"
    chart = chart.transform_calculate(s=f"(pow(2, bits) - 1) / max(({high}) - ({low}), {EPS})")
    chart = chart.transform_calculate(z=half_even(f"datum.s * ({low})") + f" + {half}")
    chart = chart.transform_calculate(free=half_even("datum.s * datum.x - datum.z"))
    chart = chart.transform_calculate(code=f"{clamped} ? clamp(datum.free, -{half}, {half} - 1) : datum.free")
    return chart.transform_calculate(value="(datum.code + datum.z) / datum.s")


def controls_in_words(spec: dict[str, Any]) -> str:
    """Return how the controls of a chart are set, for its picture, which has none."""
    told = []
    for param in spec["params"]:
        bind, value = param.get("bind", {}), param.get("value")
        value = next(iter(value[0].values())) if isinstance(value, list) else value  # of a selection
        if "labels" in bind:
            value = bind["labels"][bind["options"].index(value)]
        if "name" in bind:
            told.append(f"{bind['name'].strip()}: {value}" if value != "" else "interactive in JupyterLab")
    return " · ".join(told)


def _mimebundle(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a notebook keeps, and its metadata: Vega-Lite for JupyterLab 4, and a picture for GitHub.

    JupyterLab 4 knows the mimetype of version 5 only, and draws version 6 under it. There Vega-Embed's own style would
    make the chart's container as small as the chart.
    """
    title = {"text": spec["title"], "subtitle": textwrap.wrap(controls_in_words(spec), 100)}
    png = vl_convert.vegalite_to_png(spec | {"background": "white", "title": title}, scale=2)
    spec = spec | {"$schema": "https://vega.github.io/schema/vega-lite/v5.json"}
    picture = base64.b64encode(png).decode()
    data = {"application/vnd.vegalite.v5+json": spec, "image/png": picture, "text/plain": spec["description"]}
    options = {"embed_options": {"defaultStyle": False, "i18n": {"PNG_ACTION": ", PNG"}}}
    return data, {"application/vnd.vegalite.v5+json": options}


alt.data_transformers.disable_max_rows()  # the explorers' frames are small enough; 5,000 rows is Altair's caution
alt.renderers.register("granq", _mimebundle)
alt.renderers.enable("granq")
