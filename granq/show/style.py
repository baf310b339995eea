"""How roles look in every figure, and what all plots share.

A ``plot_*`` takes the frame that its docstring names, draws one panel of it into ``ax`` (by default the current Axes)
and returns that. It touches no file, model, random number or global style. Keywords such as ``layer`` or ``bits``
choose the panel, by default the first in the frame; quantities and metrics are keys of the ``*_LABELS`` of the file.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from pandas import DataFrame, Series

from granq.errors import UserError

STYLE = Path(__file__).with_name("granq.mplstyle")
Ax: TypeAlias = Axes | None


class Role(NamedTuple):
    """How a role looks in every figure. Color, marker and dash differ, so that no meaning hangs on color alone."""

    label: str
    color: str
    marker: str
    dash: Any = "-"

    @property
    def line(self) -> dict[str, Any]:
        """Return the look as keywords of ``Axes.plot``."""
        return self.points | dict(linestyle=self.dash, markersize=3, linewidth=1)

    @property
    def points(self) -> dict[str, Any]:
        """Return the look as keywords of ``Axes.scatter``."""
        return dict(label=self.label, color=self.color, marker=self.marker)


#: petroff6 (arXiv 2107.02270), safe for color-vision deficiencies; tests/test_figures.py computes the distances.
GREY, BLACK = "#9c9ca1", "#222222"
DASHES = ("-", "--", ":", "-.")  #: of lines that are no roles
ROLES = {
    "full precision": Role("full precision", GREY, "s", ":"),
    "layerwise": Role("layerwise", "#5790fc", "o", "--"),
    "per_channel": Role("per_channel", "#f89c20", "^", "-."),
    "granq": Role("granq", "#e42536", "D", "-"),
    "strict": Role("strict", "#964a8b", "v", (0, (4, 1, 1, 1, 1, 1))),
    "foldable": Role("foldable", "#7a21dd", "P", (0, (1, 1))),
    "synthetic": Role("synthetic images", BLACK, "X", "-"),
    "real": Role("real images", GREY, "s", ":"),
}
ROLES |= {  # granularities of activations look like the schemes that are built on them
    "per_tensor": ROLES["layerwise"]._replace(label="per tensor (layer-wise)"),
    "per_sample": ROLES["strict"]._replace(label="per image"),
    "per_sample_channel": ROLES["granq"]._replace(label="per image and channel (GranQ)"),
    "per_out_channel": ROLES["per_channel"]._replace(label="per filter"),
    "per_kernel": ROLES["granq"]._replace(label="per kernel (GranQ)"),
}
ROLES |= {  # what is quantized
    "weights": ROLES["layerwise"]._replace(label="weights"),
    "activations": ROLES["per_channel"]._replace(label="activations"),
    "both": Role("both", BLACK, "X", "-"),
}
_TIMED = {"copy": "full precision", "layer-wise": "layerwise", "pre-scaled": "granq", "channel loop": "per_channel",
          "accumulation-time, loop": "per_channel", "textbook": "strict", "accumulation-time, grouped": "strict",
          "folded": "foldable"}  # fmt: skip
ROLES |= {name: ROLES[scheme]._replace(label=name) for name, scheme in _TIMED.items()}
ROLES["granq, NHWC"] = ROLES["granq"]._replace(label="granq, NHWC", marker="*")
ROLES["layer-wise, float32"] = Role("layer-wise, float32", BLACK, "X", (0, (2, 1)))


def role(name: str) -> Role:
    """Return the look of a name in ``ROLES``; "strict + x" has the color of strict, an unknown name is black."""
    base = ROLES.get(name.split(" ")[0], Role(name, BLACK, "X"))
    return ROLES.get(name, base._replace(label=name, marker="X" if " + " in name else base.marker))


def in_words(name: str) -> Role:
    """Return the look of a granularity, in words also where a scheme has its name."""
    return role(name)._replace(label=role(name).label.replace("_", " "))


def select(data: DataFrame, **values: Any) -> DataFrame:
    """Return the rows with these values; ``None`` means the first that is left. Raises UserError if there is none.

    Of several datasets and networks, too, the first is taken unless one is named.
    """
    data = data.astype({"layer": str}) if "layer" in data else data  # of a CSV "0" comes back as 0
    named = {key: None for key in ("dataset", "network") if key in data and data[key].notna().all()}
    for column, value in (named | values).items():
        value = data[column].iloc[0] if value is None else str(value) if column == "layer" else value
        rows = data[data[column] == value]
        if rows.empty:
            raise UserError(f"the data hold no row with {column} = {value!r}")
        data = rows
    return data


def side_by_side(data: DataFrame, by: str, along: str, width: float) -> Iterator[tuple[Role, DataFrame, Series]]:
    """Yield look, rows and places of every group ``by``, next to each other at the place of each value ``along``."""
    groups, values = data.groupby(by, sort=False), list(data[along].unique())
    for i, (name, rows) in enumerate(groups):
        yield role(str(name)), rows, rows[along].map(values.index) + (i - (len(groups) - 1) / 2) * width


def finish(ax: Axes, legend: bool, **options: Any) -> Axes:
    """Return ``ax``, with a legend if it is wanted."""
    if legend:
        ax.legend(**options)
    return ax


def plain_log(ax: Axes) -> None:
    """Make y logarithmic, with ticks 1, 2, 5 as numbers: a range below one decade has no power of ten to name."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def short_layer(name: str) -> str:
    """Shorten a layer's name to what tells it apart: ``features.stage2.unit1.body.conv1.conv`` -> ``s2.u1.conv1``."""
    words = [w for w in str(name).split(".") if w not in ("features", "body", "layers", "model")]
    if len(words) > 1 and words[-1] in ("conv", "0"):
        words.pop()
    words = ["skip" if w in ("identity_conv", "downsample") else w for w in words]
    return ".".join(re.sub(r"^(stage|unit|layer)(\d+)$", lambda m: m[1][0] + m[2], w) for w in words)
