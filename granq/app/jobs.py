"""One run as data, wherever it comes from: the command line, a row of a table, or a line of a sweep."""

from __future__ import annotations

import os
import re
import warnings
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from tyro.conf import arg

import granq  # its names are imported at first use: the command line answers without torch
from granq.config import QATConfig
from granq.errors import UserError
from granq.schemes import Scheme

Data = Annotated[str, arg(help="digits, cifar10, cifar100, imagenet or folder:PATH")]
Network = Annotated[str, arg(help="a name of pytorchcv or torchvision, timm:NAME, or FILE.py:FUNCTION")]
TeacherFile = Annotated[Path | None, arg(help="checkpoint; without it digits have theirs, others are downloaded")]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
BIT_CHOICES, BIT_IMAGES = (2, 3, 4, 5, 6, 8), 256  # widths and generated images of --bits auto
BITS_HELP = "width of weights,activations; or auto:3.0, an average: each layer gets its own, from generated images"
Mean = Annotated[str, arg(help="of the three channels, from 0 to 1, such as 0.5,0.5,0.5, if nothing else says it")]
Std = Annotated[str, arg(help="likewise, the standard deviation")]


def _writable(path: Path) -> Path:
    """Return ``path``. Raises ValueError if nothing can be written there: before hours of work, and not after them."""
    there = next(part for part in (path, *path.absolute().parents) if part.is_dir() or (part != path and part.exists()))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--out {path} cannot be written: {there} is no folder to write into")
    return path


Out = Annotated[Path, AfterValidator(_writable)]
MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


class Files(BaseModel):
    """What is quantized, and where it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Data
    network: Network
    out: Out = Field(description="run folder, new or empty")
    teacher: TeacherFile = None
    mean: Mean = ""
    std: Std = ""
    generator: Path | None = Field(None, description="start from the generator of this run, without a warm-up")
    preset: Literal["quick", "paper"] = Field("quick", description="the settings that the other options change")
    resume: bool = Field(False, description="continue the run in --out")
    from_row: tuple[Path, int] | None = Field(
        None, description="repeat a row of a results table, counted from 1, and say how far the new accuracy is"
    )


class Job(QATConfig, Files):
    """Everything that ``granq quantize`` needs."""

    @model_validator(mode="after")
    def _draws_images(self) -> Job:
        """Bits are chosen on the images of a generator that learned to draw them, in a run of its own."""
        learns = 0 < self.warmup_epochs < min(self.epochs, self.generator_epochs or self.epochs)
        if self.auto_bits and not (self.layer_bits or self.generator or learns):
            raise ValueError("--bits auto needs a warm-up and an epoch after it with the generator on, or --generator")
        return self

    def run(self) -> dict[str, Any]:
        """Quantize a teacher without its training data. Return a row of a results table, as ``result.json`` has it."""
        from granq import files, runs
        from granq.data import dataset_name
        from granq.measure import workbench

        runs.RunFolder(self.out).check_free(self.resume)
        given: Any = dict(data=self.data, network=self.network, teacher=self.teacher, image_size=self.image_size)
        shared = granq.Workbench(device=self.device, **given, **channels(self.mean, self.std))
        generator = granq.load_generator(self.generator, shared.device) if self.generator else None
        teacher, spec, test = shared.teacher, shared.spec, shared.test  # the training split is never touched
        black, white = granq.pixel_bounds(spec)
        if ((white - black < 1.5) | ((black + white).abs() > 2.5)).any():
            seen = f"from {black.min():.1f} (black) to {white.max():.1f}"
            warnings.warn(f"{self.network} sees pixels {seen}; generators draw mean 0, deviation 1", stacklevel=2)
        config = QATConfig(**{name: getattr(self, name) for name in QATConfig.model_fields})
        start, before = self.generator, 0.0
        if choose := bool(self.auto_bits and not self.layer_bits):
            config, start, generator, before = self._choose_bits(config, teacher, shared.device)
        source: dict[str, Any] = {"data": self.data, "network": self.network, "teacher": str(self.teacher or "")}
        top1, count = shared.top1, len(test)
        facts = source | {"teacher_top1": top1, "test_images": count, "spec": spec.model_dump(mode="json")}
        result = granq.train(
            teacher, config, evaluate=shared.evaluate, out=self.out, resume=self.resume or choose, facts=facts,
            generator=generator, pixels=(black, white),
        )  # fmt: skip
        row = source | result.row(dataset_name(self.data), Path(self.network).name, top1, count)
        row |= {"generator": str(start or ""), "preset": self.preset, "out": str(self.out)}
        row["seconds"] = round(row["seconds"] + before, 1)
        row["method"] = workbench.method_name(row)
        row |= {name: ",".join(map(str, facts["spec"][name])) for name in ("mean", "std")}
        image, _ = next(granq.batches(test, spec, batch_size=1))
        row |= granq.summarize_audit(granq.audit(result.student, image.to(shared.device)))
        del row["summary"]
        if self.from_row:
            old = read_row(*self.from_row)
            row |= {"row_last_top1": float(old["last_top1"]), "difference": row["last_top1"] - float(old["last_top1"])}
            if float(old.get("test_images", count)) != count:
                warnings.warn(f"the row was measured on {old['test_images']} images, this on {count}", stacklevel=2)
        files.save_atomically(self.out / "result.json", lambda path: path.write_text(files.to_json(row, indent=2)))
        return row

    def _choose_bits(self, c: QATConfig, teacher: Any, device: str) -> tuple[QATConfig, Path, Any, float]:
        """Allocate bits on generated images. Return what is left of the run (settings, start, generator), and seconds.

        Without ``--generator`` the warm-up comes first, as a run of its own in the folder.
        """
        from granq import convert, runs

        student = granq.quantize_model(teacher, c.scheme, 8, 8, c.image_bits or None)  # refuses now, not after hours
        folder, start, seconds = runs.RunFolder(self.out), self.generator or self.out / "warmup", 0.0
        with folder.claimed():
            if not folder.config.is_file():
                folder.write_config(c, {})  # so that it can be resumed from here on
            if not self.generator:
                none = Scheme(weights=None, activations=None)  # this recipe's generator does not look at the student
                alone: Any = dict(recipe="gdfq", scheme=none, image_bits=0, refined_images=0)
                warm = c.change(epochs=c.warmup_epochs, auto_bits=0.0, **(alone if c.recipe == "match" else {}))
                seconds = granq.train(teacher, warm, out=start, resume=start.exists()).seconds
                later = tuple(max(epoch - c.warmup_epochs, 0) for epoch in c.milestones)
                left = {name: max(getattr(c, name) - c.warmup_epochs, 0) for name in ("epochs", "generator_epochs")}
                c = c.change(warmup_epochs=0, milestones=later, **left)
            images = [*granq.generated_batches(generator := granq.load_generator(start, device), c.seed, BIT_IMAGES)]
            how: Any = dict(kinds=["alone"], parts=["weights", "activations"], calibration=images)
            how |= {"out": self.out / "sensitivity.csv"}  # what is measured stays so when the run is resumed
            widths = sorted({*BIT_CHOICES, c.image_bits} - {0})
            table = granq.measure_sensitivity(teacher, images, c.scheme, widths, **how)
            if c.image_bits:  # of the image nothing is to be chosen
                image = convert.image_places(student)
                others = [name for name, place in convert.activation_places(student).items() if place not in image]
                table = table[(table.part == "weights") | (table.bits == c.image_bits) | table.place.isin(others)]
        return c.change(layer_bits=granq.allocate_bits(table, c.auto_bits)), start, generator, seconds


def execute(job: Job) -> dict[str, Any]:
    """Return the row of a run, and what it says in one sentence."""
    row = job.run()
    half = 1.96 * (row["last_top1"] * (100 - row["last_top1"]) / row["test_images"]) ** 0.5
    said = f"teacher {row['teacher_top1']:.2f} %, untrained {row['ptq_top1']:.2f}, after the last epoch "
    said += f"{row['last_top1']:.2f} ± {half:.2f} (95 % interval over {row['test_images']} test images)"
    return row | {"said": f"{row['scheme']} {row['bits']}: {said}"}


def parse_bits(text: str, auto: bool = False) -> dict[str, Any]:
    """Return the widths in ``"3,3"``, or the average in ``"auto:3.0"``. Raises UserError unless from 2 to 8."""
    if found := re.fullmatch("([2-8]),([2-8])", text):
        return {"weight_bits": int(found[1]), "act_bits": int(found[2])}
    found = re.fullmatch(r"auto:(\d(\.\d+)?)", text) if auto else None
    if found and 2 <= (average := float(found[1])) <= 8:
        return {"weight_bits": int(average), "act_bits": int(average), "auto_bits": average}
    known = "such as 3,3, or an average, such as auto:3.0" if auto else "such as 3,3"
    raise UserError(f"--bits takes two numbers from 2 to 8, weights,activations, {known}; got {text!r}")


def likely_data(network: str) -> str:
    """Return the data that a network's name speaks of; the path of a file says nothing."""
    name = network.rpartition(":")[2]
    return "cifar100" if "cifar100" in name else "cifar10" if "cifar" in name else "imagenet"


def channels(mean: str, std: str) -> dict[str, Any]:
    """Return ``"0.5,0.5,0.5"`` as keywords of ``granq.describe_data``, which reads the numbers."""
    given = {name: text.split(",") for name, text in (("mean", mean), ("std", std)) if text}
    if any(len(values) != 3 for values in given.values()):
        raise UserError(f"--mean and --std take three numbers, such as 0.5,0.5,0.5; got {mean!r}, {std!r}")
    return given


def from_arguments(argv: Sequence[str]) -> Job:
    """Return the run that ``argv``, options of ``granq quantize``, describes. Raises ValidationError or UserError."""
    asked = {part.partition("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
    asked |= {name.removeprefix("no_") for name in asked}
    groups = vars(tyro.cli(options("from_row" in asked), args=argv, config=MARKERS, prog="granq quantize")).values()
    given = {name: value for group in groups for name, value in vars(group).items() if name in asked}
    return Job.model_validate(complete(given), strict=False)  # a row is text


def options(repeats: bool) -> type:
    """Return the options of ``granq quantize`` as a dataclass of groups; a row that it ``repeats`` names the data, too.

    It checks nothing: tyro would put a box around pydantic's messages.
    """
    groups, start = [], {"bits": "3,3"} | ({"data": "", "network": ""} if repeats else {})
    bases: tuple[Any, ...] = (Files, *reversed(QATConfig.__bases__))
    for model in bases:
        start |= {name: known.default for name, known in model.model_fields.items() if not known.is_required()}
        shown = {name: (known.rebuild_annotation(), known.description) for name, known in model.model_fields.items()}
        if "scheme" in shown:  # named here, and widths are one option
            shown |= {"scheme": (str, shown["scheme"][1]), "bits": (str, BITS_HELP)}
            del shown["weight_bits"], shown["act_bits"], shown["auto_bits"]
        given = {name: [field(default_factory=partial(start.get, name))] for name in start}
        fields = [
            (name, Annotated[kind, arg(help=text)] if text else kind, *given.get(name, ()))
            for name, (kind, text) in shown.items()
        ]
        group = make_dataclass(model.__name__, fields, kw_only=True, namespace={"__doc__": model.__doc__})
        groups.append((model.__name__.lower(), group))
    return make_dataclass("Quantize", groups, namespace={"__doc__": "Quantize a teacher without its training data."})


def complete(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what was asked for, with the settings of its row, or of its preset, recipe and data."""
    bits = {"auto_bits": 0.0} | parse_bits(asked.pop("bits"), auto=True) if "bits" in asked else {}
    if bits.get("auto_bits") and "layer_bits" in asked:
        raise UserError("--bits auto chooses what --layer-bits gives; leave one of them out")
    start = {"warmup_epochs": 0} if "generator" in asked else {}
    if "from_row" in asked:
        if "preset" in asked:
            raise UserError("a row has the settings of its own preset; leave --preset or --from-row out")
        if bits:  # other widths: those of the row's single layers do not hold
            bits |= {"layer_bits": {}}
        elif "layer_bits" in asked:  # chosen by hand now
            bits = {"auto_bits": 0.0}
        row = _settings(read_row(*asked["from_row"]))
        if ".py:" in row["network"] and "network" not in asked:
            raise UserError("the network of this row is code, which runs only if --network names it again")
        return row | bits | ({} if "generator" in row else start) | asked
    data, network, recipe = asked["data"], asked["network"], asked.get("recipe", "adadfq")
    settings: dict[str, Any] = {"weight_bits": 3, "act_bits": 3, "recipe": recipe} | bits | start
    settings["image_size"] = granq.describe_data(data, network, asked.get("image_size")).image_size
    settings |= {name: value for name, value in asked.items() if name in QATConfig.model_fields}
    if asked.get("preset") != "paper":
        return dict(QATConfig(**settings)) | asked
    if recipe == "match":
        raise UserError("--preset paper is for recipes adadfq and gdfq; match takes --epochs and --iterations")
    name = network.rpartition(":")[2]  # a folder's name says nothing of the network
    return dict(QATConfig.paper(data, name, settings.pop("weight_bits"), **settings)) | asked


def read_row(table: str | Path, number: int) -> dict[str, str]:
    """Return the fields of a row of a results table that hold something."""
    import pandas as pd

    if not Path(table).is_file():
        raise UserError(f"there is no table {table}")
    rows = pd.read_csv(table, dtype=str, keep_default_na=False).to_dict("records")
    if not 1 <= number <= len(rows):
        raise UserError(f"{table} has no row {number}")
    row = {str(name): text for name, text in rows[number - 1].items() if text}
    if missing := {"dataset", "network", "scheme", "bits", "recipe", "seed", "last_top1"} - row.keys():
        raise UserError(f"row {number} of {table} lacks {', '.join(sorted(missing))}; granq sweep writes them")
    return row


def _settings(row: dict[str, str]) -> dict[str, Any]:
    """Return what a row says of its run: text, which ``from_arguments`` reads as what it should be."""
    if "data_used" in row:
        raise UserError(f"this row was trained on {row['data_used']}, which only benchmarks/controls.py repeats")
    settings: dict[str, Any] = {name: row[name] for name in Job.model_fields.keys() & row.keys() - {"device"}}
    for name in settings.keys() & {"milestones", "layer_bits"}:
        settings[name] = literal_eval(row[name])
    settings["image_bits"] = int(float(row.get("image_bits", 0)))  # 0.0 where a column lacks some values
    widths = (int(float(number)) for number in re.findall(r"[\d.]+", row["bits"]))
    settings |= dict(zip(("weight_bits", "act_bits"), widths, strict=True))
    return settings | {"data": row.get("data", row["dataset"])}
