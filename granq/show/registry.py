"""Every figure by name: its question, how it is measured, how it is drawn. ``granq figures`` runs this list."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from tqdm.auto import tqdm

from granq.convert import quantize_model
from granq.errors import UserError, one_of
from granq.files import write_csv
from granq.measure import activations, audit, factorial, images, latency, layer_error, scales
from granq.measure.workbench import RESULTS, Workbench
from granq.models import build_network
from granq.schemes import SCHEMES
from granq.show.distortion import DISTORTION_LABELS, plot_activation_distortion
from granq.show.latency import SCALING_LABELS, plot_quantizer_latency, plot_scaling_latency
from granq.show.layer_error import plot_channel_error, plot_layer_error
from granq.show.panels import Panels, draw_figure
from granq.show.results import (
    TRUE_BITS_LABELS,
    plot_accuracy_bits,
    plot_granularity_factorial,
    plot_results_table,
    plot_true_bits,
    results_table,
    split_published,
    table_text,
)
from granq.show.scales import GAP_LABELS, plot_channel_scales, plot_granularity_maps, plot_synthetic_gap
from granq.show.training import TRAINING_LABELS, plot_synthetic_images, plot_training_curves


def _layer_error(w: Workbench) -> pd.DataFrame:
    ranges = list(itertools.islice(w.real(1), 2))
    options: dict[str, Any] = dict(schemes=list(SCHEMES), bits=w.budget.bits, calibration=ranges)
    frame = layer_error.measure_layer_error(w.teacher, w.real(), **options)
    # the layer that hurts most, over all schemes, channel by channel
    worst = [str(frame[frame["mode"] == "local"].groupby("layer").sqnr_db.mean().idxmin())]
    inside = layer_error.measure_layer_error(w.teacher, w.real(), layers=worst, per_channel=True, **options)
    return pd.concat([frame, inside], ignore_index=True)


def _channel_scales(w: Workbench) -> pd.DataFrame:
    sources = {"synthetic": w.synthetic(), "real": w.real()}
    measure = partial(scales.measure_channel_scales, w.teacher, bits=w.budget.bits)
    return pd.concat([measure(batches, source=name) for name, batches in sources.items()], ignore_index=True)


def _synthetic_gap(w: Workbench) -> pd.DataFrame:
    pairs = {"synthetic against real": w.synthetic(), "real against other real": w.real(1)}
    measure = partial(images.measure_synthetic_gap, w.teacher)
    return pd.concat([measure(b, w.real()).assign(pair=name) for name, b in pairs.items()], ignore_index=True)


def _factorial(w: Workbench) -> pd.DataFrame:
    cells, test = factorial.factorial_cells(w.budget.widths), list(w.sample(0, w.budget.images))
    return factorial.measure_granularity_factorial(w.teacher, test, cells, lambda seed: w.synthetic())


def _true_bits(w: Workbench) -> pd.DataFrame:
    """Audit five networks without trained weights: what is quantized does not depend on them."""
    rows = []
    for name in ("resnet20_cifar10", "resnet18", "resnet50", "mobilenetv2_w1", "mobilenet_v2"):
        size, classes = (32, 10) if "cifar" in name else (224, 1000)
        torch.manual_seed(w.seed)
        network, example = build_network(name, classes), torch.randn(1, 3, size, size)
        for scheme in SCHEMES:
            facts = audit.summarize_audit(audit.audit(quantize_model(network, scheme, 3, 3), example))
            values = dict(bits_per_weight=facts["true_bits_per_weight"], quantized_percent=facts["weights_low_bit"])
            rows.append(dict(network=name, scheme=scheme, weight_bits=3) | values)
    return pd.DataFrame(rows)


def _at_every_width(w: Workbench) -> pd.DataFrame:
    """Return accuracies without methods that were measured at some widths only; ``results_table`` has them all."""
    measured, _ = split_published(w.accuracy)
    widths = measured.groupby("scheme").bits.nunique()
    return w.accuracy.drop(measured.index[measured.scheme.map(widths) < measured.bits.nunique()])


def _results_table(w: Workbench) -> pd.DataFrame:
    measured = split_published(w.accuracy)[0].astype({"seed": int})  # next to published rows it is a float
    measured = measured.assign(teacher_test_top1=measured.teacher_test_top1.map("{:.6g}".format))
    names = ("teacher_test_top1", "seed", "torch", "device", "commit")
    return results_table(w.accuracy).assign(**{k: ", ".join(map(str, sorted(set(measured[k])))) for k in names})


class Figure(NamedTuple):
    """One figure: the question it answers, its data, width and height in inches, grids of panels below each other."""

    question: str
    measure: Callable[[Workbench], pd.DataFrame]
    size: tuple[float, float]
    panels: Sequence[Panels]
    teacher: bool = True  #: the measurement depends on the teacher, which its provenance then names


FIGURES: dict[str, Figure] = {
    "granularity_maps": Figure("What do the scales look like?", lambda w: scales.measure_scale_maps(
        w.teacher, next(w.real(batch_size=16)), w.layers(1)[0], w.budget.bits), (6.8, 2.4), [
        Panels(plot_granularity_maps, {}, {"granularity": None}, {"sharey": True})]),
    "activation_distortion": Figure("What do few bits do to activations?", lambda w:
        activations.measure_activation_distortion(w.teacher, w.real(), w.layers(3)), (6.8, 9.0), [
        Panels(plot_activation_distortion, {"layer": None, "quantity": DISTORTION_LABELS}, {"bits": None})]),
    "channel_scales": Figure("How far apart are the channels?", _channel_scales, (6.8, 3.2), [
        Panels(plot_channel_scales)]),
    "layer_error": Figure("Which layer is guilty?", _layer_error, (6.8, 7.2), [
        Panels(plot_layer_error, {"metric": ("sqnr_db", "mse", "cosine_similarity")}, {"mode": layer_error.MODES},
               {"sharex": True, "sharey": "row"}),
        Panels(plot_channel_error, {}, {"mode": layer_error.MODES}, {"sharey": True})]),
    "accuracy_bits": Figure("How much accuracy is left at each bit width?", _at_every_width, (6.8, 2.8), [
        Panels(plot_accuracy_bits)]),
    "true_bits": Figure("How many bits is a 3-bit network?", _true_bits, (6.8, 2.6), [
        Panels(plot_true_bits, {}, {"quantity": TRUE_BITS_LABELS}, {"sharey": True})], teacher=False),
    "quantizer_latency": Figure("What does it cost to quantize activations?", lambda w:
        latency.measure_latency_quantizer(latency.SHAPES[: w.budget.sizes], w.budget.bits, device=w.device),
        (6.8, 2.8), [Panels(plot_quantizer_latency)], teacher=False),
    "scaling_latency": Figure("What does it cost to apply the scales?", lambda w:
        latency.measure_latency_scaling((8, 16, 32, 64, 128)[: w.budget.sizes], (1, 4, 16, 64)[: w.budget.sizes],
        bits=w.budget.bits, device=w.device), (6.8, 4.2), [
        Panels(plot_scaling_latency, {"against": ("channels", "batch")}, {"quantity": SCALING_LABELS})], teacher=False),
    "granularity_factorial": Figure("Which choice is worth how much?", _factorial, (6.8, 3.6), [
        Panels(plot_granularity_factorial, {"epochs": None, "ranges": ("dynamic", "static")}, {"bits": None},
               {"sharex": True, "sharey": True})]),
    "training_curves": Figure("How does a run go?", lambda w: w.zero_shot[1], (6.8, 1.8), [
        Panels(plot_training_curves, {}, {"quantity": TRAINING_LABELS})]),
    "synthetic_images": Figure("What does the generator draw?", lambda w: w.zero_shot[2].assign(
        name=w.zero_shot[2].label.map(dict(enumerate(w.class_names)))), (6.8, 3.2), [Panels(plot_synthetic_images)]),
    "synthetic_gap": Figure("How far are synthetic images from real ones, seen from inside the network?",
        _synthetic_gap, (6.8, 4.6), [Panels(plot_synthetic_gap, {"quantity": GAP_LABELS}, {}, {"sharex": True})]),
    "results_table": Figure("How do these results compare with published ones?", _results_table, (6.8, 4.2), [
        Panels(plot_results_table, {}, {"bits": None})]),
}  # fmt: skip


def make_figures(names: Sequence[str], workbench: Workbench) -> list[str]:
    """Measure figures (all without names), write CSV, SVG and PNG into ``workbench.out``, and return their names.

    Raises UserError for an unknown name, for rows of long runs that are missing, and for a CSV of another budget or of
    another command such as ``granq bench``, which is not overwritten; without names, such figures are left out.
    """
    out, todo = workbench.out, _known(names)
    for name in list(todo):
        path = out / f"{name}.csv"
        if path.is_file() and list(pd.read_csv(path, nrows=1).get("budget", [])) != [workbench.name]:
            todo.remove(name)
            if names or not todo:
                raise UserError(f"{path} was measured with another budget or command; choose another --out")
    if workbench.name == "full" and {"accuracy_bits", "results_table"} & set(todo) and not (out / RESULTS).is_file():
        raise UserError(f"{out / RESULTS} is missing: a row for each run of granq quantize --json")
    out.mkdir(parents=True, exist_ok=True)
    for name in tqdm(todo, desc="figures", unit="figure"):
        data = FIGURES[name].measure(workbench)
        facts = workbench.facts(FIGURES[name].teacher and "teacher_test_top1" not in data)
        write_csv(out / f"{name}.csv", data.assign(**{k: v for k, v in facts.items() if k not in data}), "%.6g")
        redraw_figures([name], out)
    return todo


def redraw_figures(names: Sequence[str], folder: Path) -> list[str]:
    """Draw figures again from the CSV files in ``folder``, by default all that are there, and return their names.

    Raises UserError for an unknown name and for a CSV that is missing.
    """
    names = _known(names) if names else [name for name in FIGURES if (folder / f"{name}.csv").is_file()]
    if missing := [name for name in names or ["*"] if not (folder / f"{name}.csv").is_file()]:
        raise UserError(f"{folder / missing[0]}.csv does not exist; granq figures measures it")
    for name in names:
        draw_figure(name, folder, FIGURES[name].size, FIGURES[name].panels)
        if name == "results_table":
            table = pd.read_csv(folder / f"{name}.csv")
            (folder / f"{name}.md").write_text(table_text(table, "markdown"))
            (folder / f"{name}.tex").write_text(table_text(table, "latex"))
    return list(names)


def _known(names: Sequence[str]) -> list[str]:
    for name in names:
        one_of("figure", name, FIGURES)
    return list(names or FIGURES)
