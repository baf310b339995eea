"""Every figure by name: its question, how it is measured, how it is drawn. ``granq figures`` runs this list."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor
from tqdm.auto import tqdm

from granq.convert import quantize_model
from granq.data import dataset_name
from granq.errors import UserError, one_of
from granq.files import write_csv
from granq.measure import activations, allocation, audit, factorial, images, latency, layer_error, sensitivity
from granq.measure.workbench import Workbench
from granq.models import build_network
from granq.schemes import SCHEMES
from granq.show import layers, results
from granq.show.style import STYLE


class Figure(NamedTuple):
    """One figure: a row of panels for every combination of values in ``rows``, a column for every one in ``columns``.

    Their keys are keywords of the plot; ``None`` stands for all values of that column in the frame.
    """

    question: str
    measure: Callable[[Workbench], pd.DataFrame]
    plot: Callable[..., Axes]
    size: tuple[float, float]  #: width and height in inches
    rows: Mapping[str, Iterable[Any] | None] = {}
    columns: Mapping[str, Iterable[Any] | None] = {}
    share: Mapping[str, Any] = {}  #: sharex and sharey, as in ``plt.subplots``
    teacher: bool = True  #: the measurement depends on the teacher, which its provenance then names

    def grid(self, data: pd.DataFrame) -> list[list[dict[str, Any]]]:
        """Return the keywords of every row and of every column."""
        given = [{k: data[k].unique() if v is None else v for k, v in x.items()} for x in (self.rows, self.columns)]
        return [[dict(zip(keys, combi, strict=True)) for combi in itertools.product(*keys.values())] for keys in given]

    def draw(self, name: str, folder: Path) -> None:
        """Draw ``folder/name.csv`` as SVG and PNG without dates: every panel that has rows, and one legend above."""
        texts = dict.fromkeys(("pixels", "layer", "name"), str)  # a black image, layer "0", class "null"
        data = pd.read_csv(folder / f"{name}.csv", dtype=texts, keep_default_na=False, na_values=[""])
        if data.empty:
            raise UserError(f"{folder / name}.csv has no rows")
        rows, columns = self.grid(data)
        with plt.style.context(STYLE):
            figure = matplotlib.figure.Figure(self.size)  # not one of pyplot's, which somebody would have to close
            axes = figure.subplots(len(rows), len(columns), squeeze=False, **self.share)
            for (r, c), ax in np.ndenumerate(axes):
                values, options = rows[r] | columns[c], {"legend": axes.size == 1, "colorbar": c == len(columns) - 1}
                known = {key: value for key, value in options.items() if key in signature(self.plot).parameters}
                own = pd.Series({key: value for key, value in values.items() if key in data}, dtype=object)
                if (data[own.index] == own).all(axis=1).any():
                    self.plot(data, ax=ax, **values, **known)
                else:
                    ax.set_axis_off()
            for text, lines in {"ylabel": axes, "xlabel": axes.T[:, ::-1], "title": axes.T}.items():
                for line in lines:  # what a whole row or column shares stands there once
                    if len({plt.getp(ax, text) for ax in line}) == 1:
                        plt.setp(list(line[1:]), text, "")
            labels = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            if labels and axes.size > 1:
                for lines in range(1, len(labels) + 1):  # as few as fit
                    ncols = -(-len(labels) // lines)
                    legend = figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=ncols)
                    if ncols == 1 or legend.get_window_extent().width < figure.bbox.width:
                        break
                    legend.remove()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def _compare(measure: Callable[..., pd.DataFrame], column: str, **sources: Iterable[Tensor]) -> pd.DataFrame:
    """Measure every source of images; ``column`` names it."""
    frames = [measure(batches).assign(**{column: name.replace("_", " ")}) for name, batches in sources.items()]
    return pd.concat(frames, ignore_index=True)


def _true_bits(w: Workbench) -> pd.DataFrame:
    """Audit networks without trained weights: what is quantized does not depend on them, but on the size of images."""
    rows, small = [], "resnet18, 32 pixels"
    for name in ("resnet20_cifar10", small, "resnet18", "resnet50", "mobilenetv2_w1", "mobilenet_v2"):
        size, classes = (32, 10) if name == small or "cifar" in name else (224, 1000)
        torch.manual_seed(w.seed)
        network = build_network("torchvision:resnet18" if name == small else name, classes)
        example = torch.randn(2, 3, size, size)
        for scheme in SCHEMES:
            facts = audit.summarize_audit(audit.audit(quantize_model(network, scheme, 3, 3), example))
            rows.append((name, scheme, 3, *(facts[key] for key in results.TRUE_BITS_LABELS)))
    return pd.DataFrame(rows, columns=["network", "scheme", "weight_bits", *results.TRUE_BITS_LABELS])


def _results_table(w: Workbench) -> pd.DataFrame:
    measured = results.split_published(w.accuracy)[0].astype({"seed": int})  # next to published rows it is a float
    measured = measured.assign(teacher_test_top1=measured.teacher_test_top1.map("{:.6g}".format))
    said = measured[["teacher_test_top1", "seed", "torch", "device", "commit"]].astype(str)
    table = results.results_table(w.accuracy)
    compared = {*table.bits[table.kind == "published"]} or {*table.bits}  # widths that nobody else has compare nothing
    return table[table.bits.isin(compared)].assign(**said.apply(lambda values: ", ".join(sorted(set(values)))))


FIGURES: dict[str, Figure] = {
    "method": Figure(
        "How does GranQ quantize all channels at once?",
        lambda w: activations.measure_data_flow(w.teacher, next(w.real()), w.layers(2)[-1], w.budget.bits),
        layers.plot_data_flow, (6.8, 2.9)),
    "granularity_maps": Figure(
        "What do the scales look like?",
        lambda w: activations.measure_scale_maps(w.teacher, next(w.real(batch_size=16)), w.layers(1)[0], w.budget.bits),
        layers.plot_granularity_maps, (6.8, 2.4), {}, {"granularity": None}, {"sharey": True}),
    "activation_distortion": Figure(
        "What do few bits do to activations?",
        lambda w: activations.measure_activation_distortion(w.teacher, w.real(), w.layers(3)),
        layers.plot_activation_distortion, (6.8, 9.0), {"layer": None, "quantity": layers.DISTORTION_LABELS},
        {"bits": None}),
    "channel_scales": Figure(
        "How far apart are the channels?",
        lambda w: _compare(partial(activations.measure_channel_scales, w.teacher, bits=w.budget.bits), "source",
            synthetic=w.synthetic(), real=w.real()),
        layers.plot_channel_scales, (6.8, 3.2)),
    "layer_error": Figure(
        "Which layer is guilty?",
        lambda w: layer_error.measure_layer_error(
            w.teacher, w.real(), list(SCHEMES), w.budget.bits, calibration=list(itertools.islice(w.real(1), 2))),
        layers.plot_layer_error, (6.8, 4.6), {"metric": ("sqnr_db", "mse")},
        {"mode": layer_error.MODES}, {"sharex": True, "sharey": "row"}),
    "sensitivity": Figure(
        "Which layer costs the output of the network?",
        lambda w: sensitivity.measure_sensitivity(w.teacher, [*w.sample(0, w.images // 2, 64)], "strict", w.budget.bits,
            kinds=("alone", "all_but")),
        layers.plot_sensitivity, (6.8, 5.6), {"metric": ("kl", "lost")}, {"kind": ("alone", "all_but")},
        {"sharex": True, "sharey": "row"}),
    "accuracy_bits": Figure(
        "How much accuracy is left after quantization?",
        lambda w: w.accuracy[~w.accuracy.scheme.str.contains(" + ", regex=False)],  # the plain recipe
        results.plot_accuracy_bits, (6.8, 2.8)),
    "true_bits": Figure(
        "How many bits is a 3-bit network?", _true_bits, results.plot_true_bits, (6.8, 3.0), {},
        {"quantity": results.TRUE_BITS_LABELS}, {"sharey": True}, teacher=False),
    "accuracy_true_bits": Figure(
        "What do bits for each layer bring?",
        lambda w: allocation.measure_budgets(w.teacher, [*w.synthetic()], w.evaluate),
        results.plot_accuracy_true_bits, (6.8, 4.6), {"training": None}, {"dataset": None}),
    "quantizer_latency": Figure(
        "What does it cost to quantize activations?",
        lambda w: latency.measure_latency_quantizer(latency.SHAPES[: w.budget.sizes], w.budget.bits, device=w.device),
        results.plot_quantizer_latency, (6.8, 2.8), teacher=False),
    "scaling_latency": Figure(
        "What does it cost to apply the scales?",
        lambda w: latency.measure_latency_scaling(
            (8, 16, 32, 64, 128)[: w.budget.sizes], (1, 4, 16, 64)[: w.budget.sizes], bits=w.budget.bits,
            device=w.device),
        results.plot_scaling_latency, (6.8, 4.2), {"against": ("channels", "batch")},
        {"quantity": results.SCALING_LABELS}, teacher=False),
    "granularity_factorial": Figure(
        "Which choice is worth how much?",
        lambda w: factorial.measure_granularity_factorial(w.teacher, list(w.sample(0, w.budget.images)),
            factorial.factorial_cells(w.budget.widths), lambda seed: w.synthetic()).assign(seed=w.seed),
        results.plot_granularity_factorial, (6.8, 3.6),
        {"ranges": ("dynamic", "static")}, {"bits": None}, {"sharex": True, "sharey": True}),
    "training_curves": Figure(
        "How does a run go?", lambda w: w.zero_shot[1], results.plot_training_curves, (6.8, 1.8), {},
        {"quantity": results.CURVES}),
    "paper_run": Figure(
        "Does the paper's run hold up?", lambda w: w.zero_shot[1], results.plot_training_curves, (6.8, 2.2), {},
        {"quantity": ("test_top1", "diversity", "student_loss", "codes_changed")}, {"sharex": True}),
    "synthetic_images": Figure(
        "What does the generator draw?",
        lambda w: w.zero_shot[2].query("label < 10").assign(name=lambda d: np.take(w.spec.label_names(), d.label)),
        results.plot_synthetic_images, (6.8, 3.2)),
    "synthetic_gap": Figure(
        "How far are synthetic images from real ones, seen from inside the network?",
        lambda w: _compare(lambda batches: images.measure_synthetic_gap(w.teacher, batches, w.real()), "pair",
            synthetic_against_real=w.synthetic(), real_against_other_real=w.real(1)),
        layers.plot_synthetic_gap, (6.8, 4.6), {"quantity": layers.GAP_LABELS}, {}, {"sharex": True}),
    "results_table": Figure(
        "How do these results compare with published ones?", _results_table, results.plot_results_table, (6.8, 4.2),
        {}, {"bits": None}),
}  # fmt: skip


def make_figures(names: Sequence[str], workbench: Workbench) -> list[str]:
    """Measure figures (all without names), write CSV, SVG and PNG into ``workbench.out``, and return their names.

    A CSV of other data, network, budget or command (``granq bench``), or of runs that are not the workbench's, is not
    overwritten: UserError; without names, left out.
    """
    out, todo = workbench.out, []
    for name in names or FIGURES:
        one_of("figure", name, FIGURES)
        path, own = out / f"{name}.csv", dict(budget=workbench.name, dataset=dataset_name(workbench.data))
        own["network"] = Path(workbench.network).name
        old = pd.read_csv(path) if path.is_file() and path.stat().st_size else pd.DataFrame([own])
        ours = all(list(old.get(key, [])[:1]) == [own[key]] for key in own if key == "budget" or FIGURES[name].teacher)
        runs, given = {*old.get("run", [])}, {run.path.name for run in workbench.runs}
        if ours and (len(runs) < 2 or runs == given) and ("commit" not in old or old.commit.nunique() < 2):
            todo.append(name)
        elif names:
            differs = "another budget, data, network or command, or of several runs"
            raise UserError(f"{path} is of {differs}; choose another --out")
    if workbench.name == "full" and {"accuracy_bits", "results_table"} & {*todo}:
        workbench.results()  # which refuses before anything is measured
    for name in tqdm(todo, desc="figures", unit="figure", leave=False):
        data = FIGURES[name].measure(workbench)
        facts = workbench.facts(FIGURES[name].teacher and "teacher_test_top1" not in data)
        write_csv(out / f"{name}.csv", data.assign(**{k: v for k, v in facts.items() if k not in data}), "%.6g")
        redraw_figures([name], out)
    return todo


def redraw_figures(names: Sequence[str], folder: str | Path) -> list[str]:
    """Draw figures again from the CSV files in ``folder``, by default all that are there, and return their names."""
    folder = Path(folder)
    names = names or [name for name in FIGURES if (folder / f"{name}.csv").is_file()]
    if not names:
        raise UserError(f"{folder} holds no CSV of a figure; granq figures measures them")
    for name in names:
        one_of("figure", name, FIGURES)
        if not (path := folder / f"{name}.csv").is_file():
            raise UserError(f"{path} does not exist; granq figures measures it")
        FIGURES[name].draw(name, folder)
        if name == "results_table":
            table = pd.read_csv(path, dtype={"n": "Int64"}).loc[:, "bits":"source"]
            table = table.astype(object).where(table.notna(), None)
            table.to_markdown(path.with_suffix(".md"), index=False, floatfmt=".2f", missingval="")
            table.to_latex(path.with_suffix(".tex"), index=False, escape=True, na_rep="", float_format="%.2f")
    return list(names)
