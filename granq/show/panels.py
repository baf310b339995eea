"""From a CSV to a picture: panels in rows and columns, the same bytes every time."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from granq.errors import UserError
from granq.files import write_csv
from granq.show.style import STYLE


@dataclass(frozen=True)
class Panels:
    """One plot as a grid: a row for every combination of values in ``rows``, a column for every one in ``columns``.

    Their keys are keywords of the plot; ``None`` stands for all values of that column in the frame.
    """

    plot: Callable[..., Axes]
    rows: Mapping[str, Iterable[Any] | None] = field(default_factory=dict)
    columns: Mapping[str, Iterable[Any] | None] = field(default_factory=dict)
    share: Mapping[str, Any] = field(default_factory=dict)  #: sharex and sharey, as in ``plt.subplots``

    def values(self, data: pd.DataFrame) -> list[list[dict[str, Any]]]:
        """Return the keywords of every row and of every column."""
        given = [
            {k: data[k].unique() if v is None else v for k, v in keys.items()} for keys in (self.rows, self.columns)
        ]
        return [[dict(zip(keys, combi, strict=True)) for combi in itertools.product(*keys.values())] for keys in given]

    def draw(self, data: pd.DataFrame, place: SubplotSpec) -> None:
        """Draw every panel that has rows; a title or label that a whole row or column shares stands there once."""
        grid = self.values(data)
        axes = place.subgridspec(*map(len, grid)).subplots(squeeze=False, **self.share)
        for (r, c), ax in np.ndenumerate(axes):
            values, last = grid[0][r] | grid[1][c], c == axes.shape[1] - 1
            options = {"legend": axes.size == 1, "colorbar": last}
            known = {key: option for key, option in options.items() if key in signature(self.plot).parameters}
            own = pd.Series({key: value for key, value in values.items() if key in data}, dtype=object)
            if (data[own.index] == own).all(axis=1).any():
                self.plot(data, ax=ax, **values, **known)
            else:
                ax.set_axis_off()
        for text, lines in {"ylabel": axes, "xlabel": axes.T[:, ::-1], "title": axes.T}.items():
            for line in lines:
                if len({plt.getp(ax, text) for ax in line}) == 1:
                    plt.setp(list(line[1:]), text, "")


def save_figure(
    name: str, data: pd.DataFrame, plot: Callable[..., Axes], folder: Path, size: tuple[float, float] = (3.3, 2.4)
) -> None:
    """Write ``name.csv`` into ``folder`` and draw it from there as SVG and PNG, ``size`` inches wide and high."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", data, float_format="%.6g")
    draw_figure(name, folder, size, [Panels(plot)])


def draw_figure(name: str, folder: Path, size: tuple[float, float], panels: Sequence[Panels]) -> None:
    """Draw ``folder/name.csv`` as SVG and PNG without dates: grids of panels below each other, one legend above."""
    data = pd.read_csv(folder / f"{name}.csv", dtype={"pixels": str})  # black ones would be the number 0
    if data.empty:
        raise UserError(f"{folder / name}.csv has no rows")
    with plt.style.context(STYLE):
        figure = Figure(figsize=size)  # not one of pyplot's: it needs no screen, and nobody has to close it
        heights = [len(part.values(data)[0]) for part in panels]
        places = figure.add_gridspec(len(panels), height_ratios=heights)
        for i, part in enumerate(panels):
            part.draw(data, places[i])
        if len(figure.axes) > 1:
            labels = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            ncols = min(len(labels), 5 if sum(map(len, labels)) < 80 else 3)
            if labels:
                figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=ncols)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
