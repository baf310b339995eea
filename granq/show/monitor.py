"""The training monitor: curves and images of a run while another process writes them. It needs a kernel."""

from io import BytesIO
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from granq.data import DataSpec
from granq.generator import LATENT
from granq.measure.images import to_pixels
from granq.runs import RunFolder, load_generator
from granq.show.results import TRAINING_LABELS, plot_training_curves
from granq.show.style import STYLE


def training_monitor(run: str | Path) -> widgets.VBox:
    """Watch the folder of a run, which need not exist yet, while another process writes it; play rereads it."""
    path, wide, epoch = RunFolder(run).history, {"description_width": "initial"}, 0
    labels = [(label.replace("\n", " "), name) for name, label in TRAINING_LABELS.items()]
    quantity = widgets.Dropdown(options=labels, description="curve", style=wide)
    play = widgets.Play(interval=2000, max=100_000)
    picture = widgets.Image(format="png", layout={"width": "min(100%, 700px)", "min_height": "200px"})
    images, below = widgets.Image(format="png", layout={"max_width": "100%"}), widgets.HTML(layout={"overflow": "auto"})

    def update(quantity: str, reread: int) -> None:
        nonlocal epoch
        if not path.is_file():
            below.value = "no epoch is finished yet"
            return
        history, buffer = pd.read_csv(path), BytesIO()  # replaced atomically: never half a file
        with plt.style.context(STYLE):
            figure = Figure(figsize=(7, 3), layout="constrained")
            plot_training_curves(history, quantity=quantity, legend=False, ax=figure.subplots())
            figure.savefig(buffer, dpi=200)
        picture.value = buffer.getvalue()
        last = history[::-1].head(5).rename(columns=TRAINING_LABELS)
        last = last.reindex(columns=["epoch", *TRAINING_LABELS.values()])
        below.value = last.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)
        if epoch != (newest := int(history.epoch.iloc[-1])):
            epoch = newest
            images.value = _thumbnails(RunFolder(run))

    errors = widgets.interactive_output(update, {"quantity": quantity, "reread": play})  # shows what a callback raises
    return widgets.VBox([widgets.HBox([quantity, play]), picture, images, below, errors])


@torch.no_grad()
def _thumbnails(run: RunFolder) -> bytes:
    """Return one image of each of the first ten labels, drawn now, as a strip of 64 pixels in PNG."""
    generator, spec, buffer = load_generator(run.path).train(), run.read_config().get("spec"), BytesIO()
    labels = torch.arange(min(generator.classes, 10))
    noise = torch.randn(len(labels), LATENT, generator=torch.Generator().manual_seed(0))
    pixels = to_pixels(generator(noise, labels), spec and DataSpec.model_validate(spec))
    strip = Image.fromarray(np.concatenate([*pixels], 1))
    strip.resize((64 * len(labels), 64), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
