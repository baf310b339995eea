"""The training monitor: the curves of a run while another process writes them. It needs a kernel, charts do not."""

from io import BytesIO
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from granq.runs import RunFolder
from granq.show.results import TRAINING_LABELS, plot_training_curves
from granq.show.style import STYLE


def training_monitor(run: str | Path) -> widgets.VBox:
    """Watch the folder of a run, which need not exist yet, while another process writes it; play rereads it."""
    path, wide = RunFolder(run).history, {"description_width": "initial"}
    labels = [(label.replace("\n", " "), name) for name, label in TRAINING_LABELS.items()]
    quantity = widgets.Dropdown(options=labels, description="curve", style=wide)
    play = widgets.Play(interval=2000, max=100_000)
    picture = widgets.Image(format="png", layout={"width": "min(100%, 700px)", "min_height": "200px"})
    below = widgets.HTML(layout={"overflow": "auto"})

    def update(quantity: str, reread: int) -> None:
        if not path.is_file():
            below.value = "no epoch is finished yet"
            return
        history, buffer = pd.read_csv(path), BytesIO()  # replaced atomically: never half a file
        with plt.style.context(STYLE):
            figure = Figure(figsize=(7, 3), layout="constrained")
            plot_training_curves(history, quantity=quantity, legend=False, ax=figure.subplots())
            figure.savefig(buffer, dpi=200)
        picture.value = buffer.getvalue()
        last = history[::-1].head(5).rename(columns=TRAINING_LABELS)[["epoch", *TRAINING_LABELS.values()]]
        below.value = last.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)

    errors = widgets.interactive_output(update, {"quantity": quantity, "reread": play})  # shows what a callback raises
    return widgets.VBox([widgets.HBox([quantity, play]), picture, below, errors])
