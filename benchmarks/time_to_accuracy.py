"""Minutes from a teacher to a W3A3 student as good as the published settings' best epoch, and the curves on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import tyro
from matplotlib.axes import Axes
from torch import nn

from granq.config import QATConfig
from granq.data import DataSpec, ImageData, describe_data, load_split, pixel_bounds
from granq.devices import commit, resolve_device, versions
from granq.files import write_csv
from granq.models import load_teacher, top1_on
from granq.runs import train
from granq.show.style import role

Channels = tuple[float, float, float] | None

#: For each scheme the recipe that gets furthest (docs/results.md), and what it changes.
BEST: dict[str, dict[str, Any]] = {
    "granq": {"recipe": "match"},
    "strict": {"recipe": "match", "image_bits": 6},
    "foldable": {"recipe": "match", "image_bits": 6},
}
SHOWN = {*"recipe image_bits refined_images iterations batch_size bf16 seed".split()}


def measure_time_to_accuracy(
    teacher: nn.Module, spec: DataSpec, test: ImageData, target: float, settings: dict[str, QATConfig]
) -> pd.DataFrame:
    """Train a student with each of ``settings``, by name, and measure it after every epoch.

    Returns:
        Columns method, epoch, seconds (wall clock since the beginning, generator and refined images included, measuring
        the accuracy not), test_top1, target, reached_seconds (of the first epoch that has ``target``; NaN without one),
        scheme, and the settings ``SHOWN``, test_images, commit, python, torch, torchvision, device.
    """
    frames = []
    for name, config in settings.items():
        measured, rows = 0.0, list[dict[str, Any]]()

        def evaluate(student: nn.Module) -> float:
            nonlocal measured
            start = time.perf_counter()
            top1 = top1_on(student, test, spec)  # noqa: B023 (called in this turn only)
            measured += time.perf_counter() - start
            return top1

        def keep(game: Any) -> None:
            seconds = time.perf_counter() - begin - measured  # noqa: B023
            rows.append({"epoch": game.epoch, "seconds": seconds, "test_top1": game.rows[-1]["test_top1"]})  # noqa: B023

        begin = time.perf_counter()
        train(teacher, config, evaluate=evaluate, pixels=pixel_bounds(spec), after_epoch=keep)
        frame = pd.DataFrame(rows)
        reached = frame.seconds[frame.test_top1 >= target].min()
        facts = {"target": target, "reached_seconds": reached, "scheme": str(config.scheme)}
        facts |= config.model_dump(include=SHOWN) | {"test_images": len(test), "commit": commit()}
        frames.append(frame.assign(method=name, **facts, **versions(resolve_device(config.device))))
    return pd.concat(frames, ignore_index=True)


def plot_time_to_accuracy(data: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw accuracy over minutes, a line for each method, and the target; the published settings are dashed."""
    ax = ax or plt.gca()
    for name, rows in data.groupby("method", sort=False):
        dashed = {"linestyle": "--"} if "paper" in str(name) else {}
        ax.plot(rows.seconds / 60, rows.test_top1, **role(str(name)).line | dashed)
    ax.axhline(data.target.iloc[0], color="#222222", linewidth=0.8)
    ax.set(xlabel="minutes", xlim=(0, None), title=f"test accuracy (%), seed {data.seed.iloc[0]}; line: the target")
    ax.legend()
    return ax


def main(
    network: str, teacher: Path, data: str, target: float, *, out: Path, schemes: tuple[str, ...] = tuple(BEST),
    mean: Channels = None, std: Channels = None, image_size: int | None = None, epochs: int = 10,
    iterations: int = 100, batch_size: int = 64, refined_images: int = 4096, bf16: bool = False,
    paper_epochs: int = 5, paper_batch_size: int | None = None, seed: int = 0, device: str = "auto",
) -> None:  # fmt: skip
    """Measure and draw; write ``--out`` (CSV) and the picture next to it.

    Args:
        target: the best accuracy in percent of a run with the published settings.
        mean: of the three channels, from 0 to 1, as the network was trained with; likewise ``std``.
        paper_epochs: so many epochs of these settings after their warm-up, to know how long all of them take.
        paper_batch_size: of the run that has the target, if it is not the published one.
    """
    spec = describe_data(data, network, image_size, mean=mean, std=std)
    model, spec = load_teacher(network, spec, teacher, resolve_device(device))
    shared: dict[str, Any] = dict(device=device, seed=seed, bf16=bf16, image_size=spec.image_size)
    length = dict(epochs=epochs, iterations=iterations, batch_size=batch_size, refined_images=refined_images)
    settings = {s: QATConfig(scheme=s, **{"weight_bits": 3, "act_bits": 3} | shared | length | BEST[s])
                for s in schemes}  # fmt: skip
    other = {"batch_size": paper_batch_size} if paper_batch_size else {}
    whole = QATConfig.paper("cifar100" if spec.classes == 100 else "cifar10", "", 3, **shared, **other)
    settings["granq + paper"] = whole.change(epochs=whole.warmup_epochs + paper_epochs)
    frame = measure_time_to_accuracy(model, spec, load_split(spec, "test"), target, settings)
    paper = frame[frame.method == "granq + paper"]
    per_epoch = paper.seconds.diff()[paper.epoch > whole.warmup_epochs].median()
    whole_run = paper.seconds[paper.epoch == whole.warmup_epochs].sum() + per_epoch * (
        whole.epochs - whole.warmup_epochs
    )
    frame["share_of_paper_run"] = frame.reached_seconds / whole_run
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out, frame)
    print(frame.groupby("method", sort=False)[["reached_seconds", "share_of_paper_run", "test_top1"]].max().to_string())
    print(f"The published settings take {whole_run / 60:.0f} minutes, by {paper_epochs} of their epochs.")
    plot_time_to_accuracy(frame, plt.figure(figsize=(4.6, 3), layout="constrained").gca())
    plt.savefig(out.with_suffix(".png"), dpi=200)


if __name__ == "__main__":
    tyro.cli(main)
