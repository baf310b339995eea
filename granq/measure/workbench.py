"""What a lesson or a figure starts from: a teacher, images and one zero-shot run, each made once, at first use."""

import copy
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Subset

from granq import models
from granq.config import QATConfig
from granq.data import PREPARATION, DataSpec, batches, data_root, dataset_name, describe_data, load_split
from granq.devices import commit, resolve_device, versions
from granq.errors import UserError, one_of
from granq.files import write_csv
from granq.graph import layer_names
from granq.measure.images import generated_batches, measure_generated_images
from granq.qat import Game
from granq.runs import RunFolder, fingerprint, load_generator, same_network, train
from granq.schemes import SCHEMES

PUBLISHED = Path(__file__).with_name("published_results.csv")


class Budget(NamedTuple):
    """How much is measured. The bits are those at which the data show an effect."""

    data: str
    images: int  #: real, and as many synthetic
    bits: int  #: of the figures at one width; digits lose nothing at 3
    widths: Sequence[int]  #: of the figures over several
    sizes: int  #: how many to time; the first of them, those of ResNet-20, take seconds
    snapshots: Sequence[int]  #: epochs after which the generator draws
    run: dict[str, Any]  #: settings of a zero-shot run


BUDGETS = {
    "quick": Budget("digits", 256, 2, (2, 3), 3, snapshots=(1, 2, 3), run=dict(
        epochs=3, iterations=20, warmup_epochs=1, batch_size=32, student_lr=1e-3)),
    "full": Budget("cifar10", 1024, 3, (2, 3, 4, 5, 8), 7, snapshots=(1, 2, 4, 6), run=dict(
        epochs=6, iterations=100, warmup_epochs=4, batch_size=64)),
}  # fmt: skip


class Workbench:
    """What measurements share: ``quick`` on digits, with the package's teacher unless given, or ``full`` on cifar10.

    Args:
        data, network, teacher: dataset and network by name, and a checkpoint file or the network itself.
        runs: folders of finished ``granq quantize`` runs with this teacher, instead of a short one that is made here:
            the first gives the generator, all give training curves.
        out: folder of the figures, where ``full`` finds the results of long runs.
        seed: of everything that draws.
        image_size, mean, std: as in ``describe_data``.
    """

    def __init__(
        self, budget: str = "quick", *, data: str | None = None, network: str = "resnet20_cifar10",
        teacher: str | Path | nn.Module | None = None, runs: Sequence[str | Path] = (), out: str | Path = "figures",
        device: str = "auto", seed: int = 0, image_size: int | None = None, mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        one_of("budget", budget, BUDGETS)
        self.name, self.budget, self.network, self.seed = budget, BUDGETS[budget], network, seed
        self.data, self.out, self.device = data or self.budget.data, Path(out), resolve_device(device)
        self._teacher, self.runs, size = teacher, [RunFolder(run) for run in runs], image_size
        for run in self.runs:
            if not same_network(other := str((facts := run.read_config()).get("network")), network):
                raise UserError(f"{run.path} is a run of {other}, not of {network}")
            if dataset_name(other := facts.get("data", self.data)) != dataset_name(self.data):
                raise UserError(f"{run.path} is a run on {other}, not on {self.data}")
            spec = facts.get("spec", {})  # real images are prepared as they were there
            size = size or spec.get("image_size")
            mean, std = (spec.get("mean"), spec.get("std")) if mean is None and std is None else (mean, std)
        self._described, self._size = describe_data(self.data, network, size, mean=mean, std=std), image_size
        if self.runs and spec:  # what an old run does not say, was not done
            kept = {k: spec.get(k, DataSpec.model_fields[k].default) for k in PREPARATION}
            self._described = self._described.model_copy(update=kept)

    @cached_property
    def _loaded(self) -> tuple[nn.Module, DataSpec]:
        if isinstance(given := self._teacher, nn.Module):
            return copy.deepcopy(given).eval().to(self.device), self._described
        teacher, spec = models.load_teacher(self.network, self._described, given, self.device)
        if self._size not in (None, spec.image_size):
            raise UserError(f"the teacher was trained at {spec.image_size} pixels, not at {self._size}")
        return teacher, spec

    teacher = property(lambda self: self._loaded[0], doc="The full-precision network in eval mode.")
    spec = property(lambda self: self._loaded[1], doc="The data, with the normalization that belongs to the teacher.")

    @cached_property
    def top1(self) -> float:
        """The teacher's accuracy on the test split in percent. Raises UserError if the runs had another teacher."""
        top1 = self.evaluate(self.teacher)
        for run in self.runs:
            run.measured_alike({"teacher_top1": top1})
        return top1

    @cached_property
    def test(self) -> Any:
        """The test split."""
        return load_split(self.spec, "test")

    @property
    def images(self) -> int:
        """How many images ``real`` and ``synthetic`` give: at most half of the test split."""
        return min(self.budget.images, len(self.test) // 2)

    def sample(self, start: int, count: int, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches of ``count`` test images and labels, from place ``start`` of an order drawn from the seed."""
        order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return batches(Subset(self.test, order[start : start + count]), self.spec, batch_size)

    def real(self, part: int = 0, batch_size: int = 64) -> Iterator[Tensor]:
        """Return batches of real test images; ``part`` 0 and 1 are disjoint samples of equal size."""
        return (images for images, _ in self.sample(part * self.images, self.images, batch_size))

    def synthetic(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Return batches of as many generated images, drawn as during the run: BatchNorm with batch statistics."""
        return generated_batches(self.zero_shot[0], self.seed, self.images, batch_size)

    def config(self, **changes: Any) -> QATConfig:
        """Return the settings of a zero-shot run in this budget, with changes."""
        bits = dict(weight_bits=self.budget.bits, act_bits=self.budget.bits)
        facts = dict(image_size=self.spec.image_size, seed=self.seed, device=self.device)
        return QATConfig(**(self.budget.run | bits | facts | changes))

    def evaluate(self, model: nn.Module) -> float:
        """Return top-1 on the test split in percent."""
        return models.top1_on(model, self.test, self.spec)

    @cached_property
    def zero_shot(self) -> tuple[nn.Module, pd.DataFrame, pd.DataFrame]:
        """Generator, history and generated images over training, of the given runs or of a short one made here."""
        runs, histories = self.runs or [self._short_run()], []
        generator = load_generator(runs[0].path, self.device).train()
        for run in runs:
            c = (facts := run.read_config())["config"]
            told = dict(scheme=str(c.scheme), bits=c.bits, seed=c.seed, recipe=c.recipe, run=run.path.name)
            told["generator"] = f"generator {f'stops at {c.generator_epochs}' if c.generator_epochs else 'goes on'}"
            told["trained_on"] = facts.get("versions", {}).get("device", "")
            histories.append(pd.read_csv(run.history).assign(**told))
        if (drawn := runs[0].path / "images.csv").is_file():
            images = pd.read_csv(drawn, dtype={"pixels": str})
        else:
            images = self._draw(generator, per_class=3).assign(epoch=histories[0].epoch.max())
        return generator, pd.concat(histories, ignore_index=True), images

    def _draw(self, generator: nn.Module, per_class: int = 1) -> pd.DataFrame:
        spec = self.spec.model_copy(update={"classes": min(self.spec.classes, 10)})  # 1,000 do not fit one batch
        return measure_generated_images(generator, self.teacher, spec, per_class, seed=self.seed)

    def _short_run(self) -> RunFolder:
        """Make the run of these settings and this teacher, once: it is kept in ``data_root``."""
        config, drawn = self.config(), list[pd.DataFrame]()
        software = str([versions(self.device), version("granq"), commit()])
        identity = fingerprint(config, software, self.spec, self.teacher)[:16]
        run = RunFolder(data_root() / "runs" / identity)

        def snapshot(game: Game) -> None:
            if game.epoch in self.budget.snapshots:
                drawn.append(self._draw(game.generator).assign(epoch=game.epoch))

        run.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{run.path}.lock"), torch.enable_grad():  # the first use may be in the middle of a measurement
            if not (run.path / "images.csv").is_file():
                shutil.rmtree(run.path, ignore_errors=True)  # of a run that was interrupted
                train(self.teacher, config, evaluate=self.evaluate, out=run.path, after_epoch=snapshot)
                write_csv(run.path / "images.csv", pd.concat(drawn))
        return run

    def results(self) -> Path:
        """Return the table of long runs, in ``out``, above it, or of a sweep. Raises UserError without one."""
        name = f"results_{dataset_name(self.data)}.csv"
        swept = [run.path.parent / "results.csv" for run in self.runs]  # of the sweep that they belong to
        found = [path for path in (self.out / name, self.out.parent / name, *swept) if path.is_file()]
        if not found:
            raise UserError(f"{self.out / name} is missing: copy results.csv of a granq sweep, or pass a run of it")
        return found[0]

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """Rows of ``granq quantize`` for every scheme, width and seed; ``full`` reads them, and published results."""
        rows, names = [], (dataset_name(self.data), Path(self.network).name)
        if self.name == "full":
            measured = pd.read_csv(self.results()).query("dataset == @names[0] and network == @names[1]")
            measured = measured[~measured.method.str.contains("real images")]  # of benchmarks/controls.py
            measured = measured.assign(scheme=measured.method)
            table = pd.concat([measured, published_results(measured.bits, *names)], ignore_index=True)
            return table.assign(teacher_test_top1=measured.teacher_top1.mean(), commit="")  # of many commits
        for bits, scheme, seed in itertools.product(self.budget.widths, SCHEMES, (self.seed, self.seed + 1)):
            config = self.config(scheme=scheme, weight_bits=bits, act_bits=bits, seed=seed)
            result = train(self.teacher, config, evaluate=self.evaluate)
            rows.append(self.facts() | result.row(*names, self.top1, len(self.test)))
        return pd.DataFrame(rows)

    def layers(self, count: int) -> list[str]:
        """Return ``count`` convolutions spread evenly over the depth, neither the first nor the last layer."""
        names = layer_names(self.teacher)
        inner = [n for n in names[1:-1] if isinstance(self.teacher.get_submodule(n), nn.Conv2d)] or names
        return [inner[i * len(inner) // (count + 1)] for i in range(1, count + 1)]

    def facts(self, teacher: bool = True) -> dict[str, Any]:
        """Return the provenance that every row of a CSV carries."""
        facts: dict[str, Any] = {"budget": self.name, "seed": self.seed, "commit": commit()}
        if teacher:
            facts |= dict(dataset=dataset_name(self.data), network=Path(self.network).name, teacher_test_top1=self.top1)
        return facts | {name: versions(self.device)[name] for name in ("torch", "device")}


def method_name(row: Mapping[Any, Any]) -> str:
    """Return the scheme, and in what else a run differs from the plain recipe: such a run is a method of its own."""
    match = row["recipe"] == "match"
    image_bits, auto, stops = (row.get(name, 0) for name in ("image_bits", "auto_bits", "generator_epochs"))
    by_layer = str(row.get("layer_bits", "")).startswith("{")
    steps = (row["epochs"] - row["warmup_epochs"]) * row["iterations"]
    paper = f"paper, {row['epochs']:.0f} epochs" if row.get("preset") == "paper" else ""
    differs = {
        "match, untrained" if match else "untrained": not steps,
        f"match, {steps:.0f} steps" if match else row["recipe"]: row["recipe"] != "adadfq" and steps > 0,
        paper: paper and steps > 0,
        f"generator stops at {stops:.0f}": stops > 0 and not match,
        f"image {image_bits:.0f} bits": image_bits > 0,  # NaN where a table has no such column
        f"auto {auto:.1f}" if auto > 0 else "bits by layer": by_layer,
    }
    return " + ".join([row["scheme"], *(name for name, does in differs.items() if does)])


def published_results(bits: Iterable[str], dataset: str = "cifar10", network: str = "resnet20_cifar10") -> pd.DataFrame:
    """Return published results at these widths, in the columns of measured rows."""
    table, keys = pd.read_csv(PUBLISHED), ["dataset", "network", "source"]
    teachers = table[table.method == "full precision"].set_index(keys).top1_percent.rename("teacher_top1")
    names = {name: table[name].str.lower().str.replace("-", "") for name in ("dataset", "network")}
    # ResNet-20 is resnet20_cifar10 of pytorchcv
    network = network.rpartition(":")[2].replace("_", "").removesuffix("w1").partition("cifar")[0]
    table = table[(names["dataset"] == dataset) & (names["network"] == network)].join(teachers, keys)
    table["bits"] = [f"W{b}A{b}" for b in table.bits]
    table = table[table.bits.isin(bits)].rename(columns={"method": "scheme", "top1_percent": "last_top1"})
    return table[[*keys, "scheme", "bits", "last_top1", "std", "teacher_top1"]]
