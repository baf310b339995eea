"""Every figure by name: its question, how it is measured, how it is drawn. ``granq figures`` runs this list.

``measure -> CSV -> plot``: a figure's frame is written with its provenance in every row, read back, and drawn from the
CSV alone. A :class:`Setting` holds what the measurements share (teacher, images, one zero-shot run) and makes each of
them once, at first use.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from granq import analysis, auditing, factorial, figures, models, qat
from granq.checks import one_of, resolve_device, typed
from granq.config import QATConfig
from granq.convert import SCHEMES, quantize_model
from granq.data import (
    DataSpec,
    ImageData,
    batches,
    class_names,
    describe_data,
    load_split,
    split_folder,
)
from granq.figures import Panels
from granq.files import save_atomically, write_csv
from granq.generator import Generator
from granq.runs import RunFolder, load_generator, versions

PUBLISHED = Path(__file__).with_name("published_results.csv")
RESULTS = "results_cifar10.csv"


@dataclass(frozen=True)
class Budget:
    """How much a preset measures. The bits are those at which its data show an effect."""

    images: int  # real, and as many synthetic
    bits: int  # of the single-width figures; digits lose nothing at 3
    accuracy_bits: tuple[int, ...]
    accuracy_seeds: int
    run: dict[str, Any]  # settings of a zero-shot run
    snapshots: tuple[int, ...]  # epochs after which the generator draws


BUDGETS = {
    "quick": Budget(
        images=256, bits=2, accuracy_bits=(2, 3), accuracy_seeds=2,
        run=dict(epochs=3, iterations=20, warmup_epochs=1, batch_size=32, student_lr=1e-3), snapshots=(1, 2, 3),
    ),
    "cifar10": Budget(
        images=1024, bits=3, accuracy_bits=(3, 4, 5), accuracy_seeds=3,
        run=dict(epochs=6, iterations=100, warmup_epochs=4, batch_size=64), snapshots=(1, 2, 4, 6),
    ),
}  # fmt: skip


class Setting:
    """What the measurements of one preset share.

    Args:
        preset: ``"quick"`` (digits; the teacher is trained here unless given) or ``"cifar10"``.
        data: dataset name; digits or cifar10 by default.
        network: name in pytorchcv or torchvision.
        teacher: checkpoint file; ``quick`` trains one without it, ``cifar10`` downloads.
        runs: folders of finished ``granq quantize`` runs with this teacher: the first gives the generator, all give
            training curves. Without them a short ``release`` run is made here.
        out: folder of the figures, where results of long runs are looked up.
        device: auto, cpu, cuda or mps.
        seed: of everything that draws.

    Raises:
        ValueError: unknown preset or dataset, missing files, or runs of another network.
    """

    def __init__(
        self,
        preset: str = "quick",
        *,
        data: str | None = None,
        network: str = "resnet20_cifar10",
        teacher: str | Path | None = None,
        runs: Sequence[Path] = (),
        out: Path = Path("figures"),
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        one_of("preset", preset, BUDGETS)
        self.preset, self.budget, self.network, self.seed = preset, BUDGETS[preset], network, seed
        self.data = data or ("digits" if preset == "quick" else "cifar10")
        self.teacher_file, self.runs, self.out = Path(teacher) if teacher else None, runs, out
        self.device = resolve_device(device)
        self._described = describe_data(self.data, network)
        if self.teacher_file is not None and not self.teacher_file.is_file():
            raise ValueError(f"teacher file {str(teacher)!r} does not exist")
        for run in runs:
            if not all((run / name).is_file() for name in ("config.json", "checkpoint.pt", "history.csv")):
                raise ValueError(f"{run} holds no run (config.json, checkpoint.pt, history.csv)")
            if (other := RunFolder(run).read_config().get("network")) != network:
                raise ValueError(f"{run} is a run of {other or 'a network without a name'}, not of {network}")

    @cached_property
    def _loaded(self) -> tuple[nn.Module, DataSpec, float]:
        spec = self._described
        if self.teacher_file is None and self.preset == "quick":
            train = partial(models.train_teacher, self.network, spec, epochs=12, batch_size=64)
            model, top1 = train(seed=self.seed, device=self.device)
            return model, spec, top1
        model, spec = models.load_teacher(self.network, spec, self.teacher_file, self.device)
        return model, spec, models.top1_on(model, load_split(spec, "test"), spec, self.device)

    @property
    def teacher(self) -> nn.Module:
        """The full-precision network in eval mode."""
        return self._loaded[0]

    @property
    def spec(self) -> DataSpec:
        """The data, with the normalization that belongs to the teacher."""
        return self._loaded[1]

    @property
    def top1(self) -> float:
        """The teacher's accuracy on the test split in percent."""
        return self._loaded[2]

    @cached_property
    def test(self) -> ImageData:
        """The test split."""
        return load_split(self.spec, "test")

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the labels, where the data have them, else their numbers."""
        if self.spec.name.startswith("folder:"):  # small images are kept without their class names
            return class_names(split_folder(Path(self.spec.root), "test"))
        return [str(name) for name in getattr(self.test, "classes", range(self.spec.classes))]

    @property
    def images(self) -> int:
        """How many images ``real`` and ``synthetic`` give: the preset's number, at most half of the test split."""
        return min(self.budget.images, len(self.test) // 2)

    def sample(self, start: int, count: int, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of test images and labels: ``count`` from place ``start`` of an order drawn once from the seed."""
        order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(self.seed)).tolist()
        subset: Any = Subset(cast(Any, self.test), order[start : start + count])
        return batches(subset, self.spec, batch_size)

    def real(self, part: int = 0, batch_size: int = 64) -> Iterator[Tensor]:
        """Batches of real test images; ``part`` 0 and 1 are disjoint samples of equal size."""
        return (images for images, _ in self.sample(part * self.images, self.images, batch_size))

    def synthetic(self, batch_size: int = 64) -> Iterator[Tensor]:
        """As many generated images as real ones, drawn as during the run: BatchNorm with the batch's statistics."""
        return factorial.generated_batches(self.zero_shot[0], self.seed, self.images, batch_size)

    def config(self, **changes: Any) -> QATConfig:
        """Settings of a zero-shot run in this preset."""
        bits = dict(weight_bits=self.budget.bits, act_bits=self.budget.bits)
        facts = dict(image_size=self.spec.image_size, seed=self.seed, device=self.device)
        return QATConfig(**(self.budget.run | bits | facts | changes))

    def evaluate(self, model: nn.Module) -> float:
        """Top-1 on the test split in percent."""
        return models.top1_on(model, self.test, self.spec, self.device)

    @cached_property
    def zero_shot(self) -> tuple[Generator, pd.DataFrame, pd.DataFrame]:
        """Generator, history and generated images over training, of the given runs or of a short one made here."""
        if self.runs:
            return self._read_runs()
        trainer = qat.Trainer(self.teacher, self.config())
        frames = []
        while trainer.epoch < trainer.config.epochs:
            with torch.enable_grad():  # this may be the first use, in the middle of a measurement
                trainer.run_epoch(self.evaluate)
            if trainer.epoch in self.budget.snapshots:
                drawn = analysis.measure_generated_images(trainer.generator, self.teacher, self.spec, seed=self.seed)
                frames.append(drawn.assign(epoch=trainer.epoch))
        history = _history(pd.DataFrame(trainer.rows), trainer.config)
        return trainer.generator, history, pd.concat(frames, ignore_index=True)

    def _read_runs(self) -> tuple[Generator, pd.DataFrame, pd.DataFrame]:
        configs = [QATConfig.from_dict(RunFolder(r).read_config()["config"]) for r in self.runs]
        history = [_history(pd.read_csv(r / "history.csv"), c) for r, c in zip(self.runs, configs, strict=True)]
        generator = load_generator(self.runs[0], self.device).train()
        drawn = analysis.measure_generated_images(generator, self.teacher, self.spec, per_class=3, seed=self.seed)
        return generator, pd.concat(history, ignore_index=True), drawn.assign(epoch=history[0].epoch.max())

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """Rows of ``granq quantize`` for every scheme, width and seed, with the published results below them.

        ``quick`` makes short runs; ``cifar10`` takes the rows of long ones from ``results_cifar10.csv`` in ``out``.
        """
        if self.preset == "cifar10":
            measured = pd.read_csv(self.out / RESULTS)
            measured["scheme"] = [method_name(row) for row in measured.to_dict("records")]
            # published rows say last_top1, which rows without training lack
            table = pd.concat([measured, _published(measured)], ignore_index=True)
            return table.assign(teacher_test_top1=measured.teacher_top1.mean(), commit="")  # of many commits
        rows = []
        seeds = range(self.seed, self.seed + self.budget.accuracy_seeds)
        for bits, scheme, seed in itertools.product(self.budget.accuracy_bits, SCHEMES, seeds):
            config = self.config(scheme=scheme, weight_bits=bits, act_bits=bits, seed=seed)
            result = qat.train(self.teacher, config, evaluate=self.evaluate)
            row = result.row(figures.dataset_name(self.data), self.network, self.top1, len(self.test))
            rows.append(self.facts() | row)
        return pd.DataFrame(rows)

    def layers(self, count: int) -> list[str]:
        """``count`` convolutions spread evenly over the depth, neither the first nor the last layer."""
        names = analysis.layer_names(self.teacher)
        inner = [n for n in names[1:-1] if isinstance(self.teacher.get_submodule(n), nn.Conv2d)] or names
        return [inner[(i + 1) * len(inner) // (count + 1)] for i in range(count)]

    def facts(self, teacher: bool = True) -> dict[str, Any]:
        """Provenance, written into every row of a CSV."""
        facts: dict[str, Any] = {"preset": self.preset, "seed": self.seed, "commit": _commit()}
        if teacher:
            name = figures.dataset_name(self.data)
            facts |= dict(dataset=name, network=self.network, teacher_test_top1=self.top1)
        here = versions(self.device)
        return facts | {k: here[k] for k in ("torch", "device")}


def method_name(row: Mapping[Any, Any]) -> str:
    """The scheme, and in what else a run differs from the plain recipe: such a run is a method of its own."""
    steps = f"{row['epochs'] * row['iterations']:.0f} steps"
    layers, image_bits = row["recipe"] == "layers", row.get("image_bits", 0)  # NaN where a table has no such column
    differs = {
        f"layers, {steps}" if layers else row["recipe"]: row["recipe"] != "adadfq",
        "BatchNorm": row["reestimate_batchnorm"] and not layers,  # belongs to that recipe
        "no random shapes": layers and row.get("random_shapes") is False,
        f"image {image_bits:.0f} bits": image_bits > 0,
        "pixel range": row.get("pixel_range", 0) > 0 and not image_bits > 0,  # goes with them
        "bfloat16": row.get("bf16") is True and not layers,
    }
    return " + ".join([row["scheme"], *(name for name, does in differs.items() if does)])


def _at_every_width(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Without methods that were measured at some bit widths only; ``results_table`` has them all."""
    measured = _measured(accuracy)
    widths = measured.groupby("scheme").bits.nunique()
    partial = set(widths[widths < measured.bits.nunique()].index)
    return accuracy[~(accuracy.scheme.isin(partial) & accuracy.index.isin(measured.index))]


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that were measured here: of a table with published ones without these."""
    if "kind" in table:
        return table[table.kind == "measured"]
    return table[table.source.isna()] if {"source", "last_top1"} <= {*table} else table


def _results_table(s: Setting) -> pd.DataFrame:
    measured = _measured(s.accuracy).astype({"seed": int})  # beside published rows, which have none, it is a float
    facts = {k: _joined(measured[k]) for k in ("teacher_test_top1", "seed", "torch", "device", "commit")}
    return figures.results_table(s.accuracy).assign(**facts)


def _joined(values: pd.Series) -> Any:
    """The value that all have, else all different ones as one text."""
    different = list(dict.fromkeys(values.dropna()))
    return different[0] if len(different) == 1 else ", ".join(map(str, sorted(different)))


def _history(rows: pd.DataFrame, config: QATConfig) -> pd.DataFrame:
    bits = f"W{config.weight_bits}A{config.act_bits}"
    return rows.assign(scheme=str(config.scheme), bits=bits, seed=config.seed, recipe=config.recipe)


def _commit() -> str:
    """The commit of the checkout this runs from, with ``+`` if the sources differ from it; empty outside of one."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "diff", "--quiet", "HEAD", "--", "."]).returncode == 1 else "")
    except OSError:  # no git here
        return ""


def _published(measured: pd.DataFrame) -> pd.DataFrame:
    """Published results for the same images, network and widths, in the columns of the measured rows."""
    table = pd.read_csv(PUBLISHED)
    keys = ["dataset", "network", "source"]
    teachers = table[table.method == "full precision"].rename(columns={"top1_percent": "teacher_top1"})
    table = table[(table.dataset == "CIFAR-10") & (table.network == "ResNet-20")]
    table = table.assign(bits=[f"W{b}A{b}" for b in table.bits]).merge(teachers[[*keys, "teacher_top1"]], "left", keys)
    table = table[table.bits.isin(measured.bits)].rename(columns={"method": "scheme", "top1_percent": "last_top1"})
    return table[["dataset", "network", "scheme", "bits", "source", "last_top1", "std", "teacher_top1"]]


# How each figure is measured, where that takes more than one call


def _channel_scales(s: Setting) -> pd.DataFrame:
    measure = partial(analysis.measure_channel_scales, s.teacher, bits=s.budget.bits)
    frames = [measure(s.synthetic(), source="synthetic"), measure(s.real(), source="real")]
    return pd.concat(frames, ignore_index=True)


def _layer_error(s: Setting) -> pd.DataFrame:
    def measure(**options: Any) -> pd.DataFrame:
        ranges = list(itertools.islice(s.real(1), 2))
        return analysis.measure_layer_error(
            s.teacher, s.real(), list(SCHEMES), s.budget.bits, calibration=ranges, **options
        )

    frame = measure()
    # the layer that hurts most, over all schemes, channel by channel
    worst = frame[frame["mode"] == "local"].groupby("layer").sqnr_db.mean().idxmin()
    return pd.concat([frame, measure(layers=[str(worst)], per_channel=True)], ignore_index=True)


def _synthetic_gap(s: Setting) -> pd.DataFrame:
    measure = partial(analysis.measure_synthetic_gap, s.teacher)
    first = measure(s.synthetic(), s.real()).assign(pair="synthetic against real")
    second = measure(s.real(1), s.real()).assign(pair="real against other real")
    return pd.concat([first, second], ignore_index=True)


def _granularity_factorial(s: Setting) -> pd.DataFrame:
    cells = factorial.factorial_cells((2, 3) if s.preset == "quick" else (2, 3, 4, 5, 8))
    test = list(s.sample(0, s.budget.images))
    return factorial.measure_granularity_factorial(s.teacher, test, cells, lambda seed: s.synthetic())


def _quantizer_latency(s: Setting) -> pd.DataFrame:
    from granq import bench  # torch.utils.benchmark is slow to import, and talks

    shapes = bench.SHAPES[:3] if s.preset == "quick" else bench.SHAPES  # those of ResNet-20 alone take seconds
    return bench.measure_latency_quantizer(shapes, s.budget.bits, device=s.device)


def _scaling_latency(s: Setting) -> pd.DataFrame:
    from granq import bench  # torch.utils.benchmark is slow to import, and talks

    channels, images = ((8, 16, 32, 64), (1, 4, 16)) if s.preset == "quick" else ((8, 16, 32, 64, 128), (1, 4, 16, 64))
    return bench.measure_latency_scaling(channels, images, bits=s.budget.bits, device=s.device)


def _true_bits(s: Setting) -> pd.DataFrame:
    """Five networks without trained weights: what is quantized does not depend on them."""
    rows = []
    for name in ("resnet20_cifar10", "resnet18", "resnet50", "mobilenetv2_w1", "mobilenet_v2"):
        size, classes = (32, 10) if "cifar" in name else (224, 1000)
        torch.manual_seed(s.seed)
        network = models.build_network(name, classes)
        for scheme in SCHEMES:
            frame = auditing.audit(quantize_model(network, scheme, 3, 3), torch.randn(1, 3, size, size))
            facts = auditing.summarize_audit(frame)
            values = dict(bits_per_weight=facts["true_bits_per_weight"], quantized_percent=facts["weights_low_bit"])
            rows.append(dict(network=name, scheme=scheme, weight_bits=3) | values)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Figure:
    """One figure: the question it answers, its data, its picture, and its description for those who cannot see it."""

    question: str
    measure: Callable[[Setting], pd.DataFrame]
    panels: Sequence[Panels]  #: below each other
    size: tuple[float, float]  #: width and height in inches
    alt: str
    teacher: bool = True  #: the measurement depends on the teacher, which its provenance then names
    command: str = ""  #: measures a CSV that names no preset


FIGURES: dict[str, Figure] = {
    "granularity_maps": Figure(
        "What do the scales look like?",
        lambda s: analysis.measure_scale_maps(s.teacher, next(s.real(batch_size=16)), s.layers(1)[0], s.budget.bits),
        [Panels(figures.plot_granularity_maps, columns={"granularity": None})],
        (6.8, 2.4),
        "Maps of images by channels, colored by quantization step, one map per granularity: one color for per tensor, "
        "vertical stripes for per channel, horizontal stripes for per image, single cells for GranQ. "
        "Constant channels are grey.",
    ),
    "activation_distortion": Figure(
        "What do few bits do to activations?",
        lambda s: analysis.measure_activation_distortion(s.teacher, s.real(), s.layers(3)),
        [
            Panels(
                figures.plot_activation_distortion,
                {"layer": None, "quantity": ("distribution", "error")},
                {"bits": None},
            )
        ],
        (6.8, 9.0),
        "For three layers and 3, 4 and 5 bits: share of values above each activation, in full precision and under "
        "per-tensor, per-channel and GranQ scales, and below it the root mean square error by activation value.",
    ),
    "channel_scales": Figure(
        "How far apart are the channels?",
        _channel_scales,
        [Panels(figures.plot_channel_scales)],
        (6.8, 3.2),
        "A logarithmic axis of quantization steps over all layers, one point per channel, synthetic images beside "
        "real ones, with a bar at each median.",
    ),
    "layer_error": Figure(
        "Which layer is guilty?",
        _layer_error,
        [
            Panels(
                figures.plot_layer_error,
                {"metric": ("sqnr_db", "mse", "cosine_similarity")},
                {"mode": analysis.MODES},
                same_y=True,
            ),
            Panels(figures.plot_channel_error, columns={"mode": analysis.MODES}, same_y=True),
        ],
        (6.8, 7.2),
        "SQNR, mean square error and cosine similarity over the layers, one line per scheme, left with clean inputs "
        "and right with quantized inputs; the bottom row shows every channel of the worst layer.",
    ),
    "accuracy_bits": Figure(
        "How much accuracy is left at each bit width?",
        lambda s: _at_every_width(s.accuracy),
        [Panels(figures.plot_accuracy_bits)],
        (6.8, 2.8),
        "Test accuracy over bit widths, one column of points per scheme measured at all of them, open points before "
        "training and filled points after it, with the teacher as a dotted line and published results as dashes.",
    ),
    "true_bits": Figure(
        "How many bits is a 3-bit network?",
        _true_bits,
        [Panels(figures.plot_true_bits, columns={"quantity": [*figures.TRUE_BITS_LABELS]})],
        (6.8, 2.6),
        "Five networks, one point per scheme: left the bits per weight with scales and zero points counted in and a "
        "dotted line at the label, right the share of weights that are really quantized.",
        teacher=False,
    ),
    "quantizer_latency": Figure(
        "What does it cost to quantize activations?",
        _quantizer_latency,
        [Panels(figures.plot_quantizer_latency)],
        (6.8, 2.8),
        "Logarithmic time of one fake quantization, forward and backward, over activation shapes: layer-wise, a loop "
        "over channels, the textbook chain and GranQ's vectorized step, above the time of copying the same bytes.",
        teacher=False,
        command="granq bench quantizer --out FOLDER",
    ),
    "scaling_latency": Figure(
        "What does it cost to apply the scales?",
        _scaling_latency,
        [
            Panels(
                figures.plot_scaling_latency,
                {"against": ("channels", "batch")},
                {"quantity": [*figures.SCALING_LABELS]},
            )
        ],
        (6.8, 4.2),
        "Time, peak memory and number of scale multiplications of one quantized convolution against channels (top) and "
        "batch (bottom), both axes logarithmic but for a zero below the multiplications, one line per execution: "
        "layer-wise, accumulation-time in a loop and grouped, pre-scaled, folded. Layer-wise takes as many "
        "multiplications as pre-scaled, the loop as many as grouped: the later line covers the earlier.",
        teacher=False,
        command="granq bench scaling --out FOLDER",
    ),
    "granularity_factorial": Figure(
        "Which choice is worth how much?",
        _granularity_factorial,
        [Panels(figures.plot_granularity_factorial, {"epochs": None, "ranges": ("dynamic", "static")}, {"bits": None})],
        (6.8, 3.6),
        "Test accuracy in cells colored by the points below the best, weight granularities down and activation "
        "granularities across, one map per bit width, dynamic ranges above and static ones below; empty where no range "
        "exists. Below each title half of the widest 95 % interval of the map.",
        command="granq factorial --network resnet20_cifar10 --images 2000 --run RUN --out FILE.csv",
    ),
    "training_curves": Figure(
        "How does a run go?",
        lambda s: s.zero_shot[1],
        [Panels(figures.plot_training_curves, columns={"quantity": [*figures.TRAINING_LABELS]})],
        (6.8, 1.8),
        "Five small panels over epochs: generator loss, student loss, BatchNorm distance, the teacher's accuracy on "
        "synthetic images and the student's test accuracy, with the warm-up shaded.",
    ),
    "synthetic_images": Figure(
        "What does the generator draw?",
        lambda s: s.zero_shot[2].assign(name=s.zero_shot[2].label.map(dict(enumerate(s.class_names)))),
        [Panels(figures.plot_synthetic_images)],
        (6.8, 3.2),
        "Generated images, one column per class and one row per epoch, each with the teacher's probability of the "
        "class that was asked for.",
    ),
    "synthetic_gap": Figure(
        "How far are synthetic images from real ones, seen from inside the network?",
        _synthetic_gap,
        [Panels(figures.plot_synthetic_gap, {"quantity": [*figures.GAP_LABELS]})],
        (6.8, 4.6),
        "Three rows over the layers: Kolmogorov-Smirnov distance, difference of means and ratio of variances, one "
        "point per channel, synthetic against real images beside real against other real images.",
    ),
    "results_table": Figure(
        "How do these results compare with published ones?",
        _results_table,
        [Panels(figures.plot_results_table, columns={"bits": None})],
        (6.8, 4.2),
        "One panel per bit width, one line per method, the position is the number of points lost against the method's "
        "own teacher; measured methods filled with their spread, published ones open.",
    ),
}


@typed
def make_figures(names: Sequence[str], setting: Setting) -> list[str]:
    """Measure figures (all without names), write CSV, SVG and PNG into ``setting.out``, and the gallery in its README.

    Without names, a CSV that its own command measured (``Figure.command``) is left as it is.

    Raises:
        ValueError: an unknown name, missing rows of long runs, or a folder that holds figures of another preset.
    """
    asked, names = names, _known(names)
    there = {name: setting.out / f"{name}.csv" for name in names if (setting.out / f"{name}.csv").is_file()}
    for name, path in there.items():
        presets = set(pd.read_csv(path, nrows=1).get("preset", ["that of its own command"]))
        if setting.preset in presets:
            continue
        if asked or not FIGURES[name].command:
            raise ValueError(f"{path} was measured with another preset, {presets.pop()}; choose another --out")
        names.remove(name)  # not asked for by name: what another command measured stays
    if setting.preset == "cifar10" and {"accuracy_bits", "results_table"} & set(names):
        if not (setting.out / RESULTS).is_file():
            raise ValueError(f"{setting.out / RESULTS} is missing: a row for each run of granq quantize --json")
    setting.out.mkdir(parents=True, exist_ok=True)
    for name in tqdm(names, desc="figures", unit="figure"):
        data = FIGURES[name].measure(setting)
        facts = setting.facts(FIGURES[name].teacher and "teacher_test_top1" not in data)
        data = data.assign(**{k: v for k, v in facts.items() if k not in data})
        write_csv(setting.out / f"{name}.csv", data, float_format="%.6g")
        redraw_figures([name], setting.out)
    return names


@typed
def redraw_figures(names: Sequence[str], folder: Path) -> list[str]:
    """Draw figures again from the CSV files in ``folder``, all that are there if ``names`` is empty; returns the names.

    Raises:
        ValueError: an unknown name, or a figure without its CSV.
    """
    names = _known(names) if names else [name for name in FIGURES if (folder / f"{name}.csv").is_file()]
    if missing := [name for name in names if not (folder / f"{name}.csv").is_file()]:
        raise ValueError(f"{folder / missing[0]}.csv does not exist; granq figures {missing[0]} measures it")
    if not names:
        raise ValueError(f"{folder} holds no CSV of a figure; granq figures measures them")
    for name in names:
        figures.draw_figure(name, folder, FIGURES[name].size, FIGURES[name].panels)
        if name == "results_table":
            table = pd.read_csv(folder / f"{name}.csv")
            (folder / f"{name}.md").write_text(figures.table_text(table, "markdown"))
            (folder / f"{name}.tex").write_text(figures.table_text(table, "latex"))
    write_gallery(folder)
    return names


GALLERY = ("<!-- gallery, written by granq figures -->", "<!-- end of gallery -->")


def write_gallery(folder: Path) -> None:
    """Write every figure in ``folder`` into its README.md, between two marks; the text around them stays as it is."""
    shown = [n for n in FIGURES if all((folder / f"{n}.{kind}").is_file() for kind in ("csv", "png"))]
    middle = "\n".join([GALLERY[0], "", *(_gallery_entry(name, folder) for name in shown), GALLERY[1]])
    readme = folder / "README.md"
    text = readme.read_text() if readme.is_file() else "# Figures\n"
    start, opened, rest = text.partition(GALLERY[0])
    _, closed, end = rest.partition(GALLERY[1])
    if opened and not closed:
        raise ValueError(
            f"{readme} has the line {GALLERY[0]!r} and below it no {GALLERY[1]!r}: nothing tells what to keep"
        )
    save_atomically(readme, lambda path: path.write_text(f"{start.rstrip()}\n\n{middle}{end.rstrip()}\n"))


def _gallery_entry(name: str, folder: Path) -> str:
    figure, table = FIGURES[name], pd.read_csv(folder / f"{name}.csv")
    facts = table.iloc[0]
    # what the CSV says of itself; frames of other commands may say less
    texts = dict(dataset="{}", images="{} images", network="{}", teacher_test_top1="teacher {:.2f} %",
                 seed="seed {}", device="{}", torch="torch {}", commit="commit {}", preset="preset {}")  # fmt: skip
    measured = _measured(table)
    for several in ("seed", "network"):  # the picture says which
        if several in table and measured[several].nunique() > 1:
            del texts[several]
    own = {k: _joined(measured[k]) for k in texts if k in measured}
    said = [texts[k].format(value) for k, value in own.items() if value != ""]
    command = f"granq figures {name}" + (f" --preset {facts.preset}" if "preset" in facts else "")
    command = figure.command if figure.command and "preset" not in facts else command
    if facts.get("dataset") == figures.dataset_name("folder:"):
        command += " --teacher FILE --data folder:PATH"
    return (
        f"## {name}\n\n**{figure.question}**\n\n![{figure.alt}]({name}.png)\n\n{figure.alt}\n\n"
        f"{', '.join(said)}. `{command}`; [CSV]({name}.csv), [SVG]({name}.svg).\n"
    )


def _known(names: Iterable[str]) -> list[str]:
    names = list(names) or list(FIGURES)
    for name in names:
        one_of("figure", name, FIGURES)
    return names
