"""One run as data, wherever it comes from: the command line, a row of a table, or a line of a sweep."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field
from tyro.conf import arg

import granq  # its names are imported at first use: the command line answers without torch
from granq.config import QATConfig
from granq.errors import UserError

Data = Annotated[str, arg(help="digits, cifar10, cifar100, imagenet or folder:PATH")]
Network = Annotated[str, arg(help="a name of pytorchcv or torchvision, timm:NAME, or FILE.py:FUNCTION")]
TeacherFile = Annotated[Path | None, arg(help="checkpoint; without it pretrained weights are downloaded")]
Mean = Annotated[str, arg(help="of the three channels, from 0 to 1, such as 0.5,0.5,0.5, if nothing else says it")]
Std = Annotated[str, arg(help="likewise, the standard deviation")]
MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


class Files(BaseModel):
    """What is quantized, and where it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Data
    network: Network
    out: Path = Field(description="run folder, new or empty")
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

    def run(self) -> dict[str, Any]:
        """Quantize a teacher without its training data.

        Returns:
            The run's row of a results table, which ``result.json`` keeps too.
        """
        from granq import devices, files, runs

        runs.RunFolder(self.out).check_free(self.resume)
        device = devices.resolve_device(self.device)
        generator = granq.load_generator(self.generator, device) if self.generator else None
        spec = granq.describe_data(self.data, self.network, self.image_size, **channels(self.mean, self.std))
        teacher, spec = granq.load_teacher(self.network, spec, self.teacher, device)
        if spec.image_size != self.image_size:
            raise UserError(f"{self.teacher} was trained at {spec.image_size} pixels, not at {self.image_size}")
        test = granq.load_split(spec, "test")  # the training split is never touched

        def evaluate(model: Any) -> float:
            return granq.top1_on(model, test, spec, device)

        config = QATConfig(**{name: getattr(self, name) for name in QATConfig.model_fields})
        source: dict[str, Any] = {"data": self.data, "network": self.network, "teacher": str(self.teacher or "")}
        facts = source | {"teacher_top1": evaluate(teacher), "spec": spec.model_dump(mode="json")}
        result = granq.train(
            teacher, config, evaluate=evaluate, out=self.out, resume=self.resume, facts=facts, generator=generator,
            pixels=granq.pixel_bounds(spec),
        )  # fmt: skip
        row = result.row(self.data, self.network, facts["teacher_top1"], len(test)) | source
        row |= {"generator": str(self.generator or ""), "preset": self.preset, "out": str(self.out)}
        row |= {name: ",".join(map(str, facts["spec"][name])) for name in ("mean", "std")}
        image, _ = next(granq.batches(test, spec, batch_size=1))
        row |= granq.summarize_audit(granq.audit(result.student, image.to(device)))
        del row["summary"]
        if self.from_row:
            before = float(read_row(*self.from_row)["last_top1"])
            row |= {"row_last_top1": before, "difference": row["last_top1"] - before}
        files.save_atomically(self.out / "result.json", lambda path: path.write_text(files.to_json(row, indent=2)))
        return row


def parse_bits(text: str) -> dict[str, int]:
    """Return the widths in ``"3,3"``. Raises UserError unless these are two numbers from 2 to 8."""
    if not re.fullmatch("[2-8],[2-8]", text):
        raise UserError(f"--bits takes two numbers from 2 to 8, weights,activations, such as 3,3; got {text!r}")
    return {"weight_bits": int(text[0]), "act_bits": int(text[2])}


def channels(mean: str, std: str) -> dict[str, Any]:
    """Return ``"0.5,0.5,0.5"`` as keywords of ``granq.describe_data``. Raises UserError unless these are numbers."""
    try:
        given = {name: [float(x) for x in text.split(",")] for name, text in (("mean", mean), ("std", std)) if text}
    except ValueError:
        raise UserError(f"--mean and --std take three numbers, such as 0.5,0.5,0.5; got {mean!r}, {std!r}") from None
    return given


def from_arguments(argv: Sequence[str]) -> Job:
    """Return the run that ``argv``, options of ``granq quantize``, describes. Raises ValidationError or UserError."""
    groups = vars(tyro.cli(options(argv), args=argv, config=MARKERS, prog="granq quantize")).values()
    values: dict[str, Any] = {name: value for group in groups for name, value in vars(group).items()}
    return Job(**values | parse_bits(values.pop("bits")))


def options(argv: Sequence[str]) -> type:
    """Return the options of ``granq quantize`` as a dataclass of groups, with the defaults that ``argv`` chooses.

    It checks nothing: tyro would put a box around pydantic's messages.
    """
    start, groups = defaults(argv), []
    start["bits"] = "{weight_bits},{act_bits}".format_map(start)
    bases: tuple[Any, ...] = (Files, *reversed(QATConfig.__bases__))
    for model in bases:
        shown = {name: (field.rebuild_annotation(), field.description) for name, field in model.model_fields.items()}
        if "scheme" in shown:  # named here, and both widths are one option
            shown |= {"scheme": (str, shown["scheme"][1]), "bits": (str, "width of weights,activations")}
            del shown["weight_bits"], shown["act_bits"]
        fields = [
            (name, Annotated[kind, arg(help=text)] if text else kind, *([start[name]] if name in start else []))
            for name, (kind, text) in shown.items()
        ]
        group = make_dataclass(model.__name__, fields, kw_only=True, namespace={"__doc__": model.__doc__})
        groups.append((model.__name__.lower(), group))
    return make_dataclass("Quantize", groups, namespace={"__doc__": "Quantize a teacher without its training data."})


def defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Return what the options in ``argv`` change: a preset with its recipe, or the row that ``--from-row`` names.

    tyro cannot tell what a user wrote from what was filled in. What other defaults depend on is therefore read first.
    """
    argv = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), part) for part in argv]  # tyro takes both
    first = ArgumentParser(prog="granq", add_help=False, allow_abbrev=False)
    for name in ("data", "network", "bits", "recipe", "scheme", "preset", "generator"):
        first.add_argument(f"--{name}")
    for name in ("image-bits", "image-size", "batch-size", "refined-images"):
        first.add_argument(f"--{name}", type=int)
    first.add_argument("--from-row", nargs=2)
    given = {name: value for name, value in vars(first.parse_known_args(argv)[0]).items() if value is not None}
    start = {name: field.default for name, field in Files.model_fields.items() if not field.is_required()}
    if "from_row" in given:
        return start | _settings(read_row(*given["from_row"]))
    data, network, preset = (given.pop(name, "") for name in ("data", "network", "preset"))
    changes: dict[str, Any] = {"recipe": "adadfq", "scheme": "granq"} | parse_bits(given.pop("bits", "3,3"))
    changes |= {"warmup_epochs": 0} if given.pop("generator", "") else {}
    if data and network:
        given["image_size"] = granq.describe_data(data, network, given.get("image_size")).image_size
    changes |= given
    if preset != "paper":
        return start | dict(QATConfig.for_recipe(**changes))
    if changes["recipe"] == "match":
        raise UserError("--preset paper is for recipes adadfq and gdfq; match takes --epochs and --iterations")
    name = network.rpartition(":")[2]  # a folder's name says nothing of the network
    return start | dict(QATConfig.paper(data, name, changes.pop("weight_bits"), **changes))


def read_row(table: str | Path, number: str | int) -> dict[str, str]:
    """Return the fields of a row of a results table that hold something."""
    import pandas as pd

    rows = pd.read_csv(table, dtype=str, keep_default_na=False).to_dict("records") if Path(table).is_file() else []
    if str(number) not in map(str, range(1, len(rows) + 1)):
        raise UserError(f"{table} has no row {number}")
    row = {str(name): text for name, text in rows[int(number) - 1].items() if text}
    if missing := {"dataset", "network", "scheme", "bits", "recipe", "seed", "last_top1"} - row.keys():
        raise UserError(f"row {number} of {table} lacks {', '.join(sorted(missing))}; granq sweep writes them")
    return row


def _settings(row: dict[str, str]) -> dict[str, Any]:
    """Return what a row says of its run."""

    def value(text: str) -> Any:
        try:
            # spreadsheets write TRUE, and 4.0 where a column lacks some values; pandas writes tuples
            read = json.loads(re.sub(r"^\((.*?),?\)$", r"[\1]", text.lower()))
        except ValueError:
            return text
        return int(read) if isinstance(read, float) and read.is_integer() else read

    settings = {name: value(row[name]) for name in QATConfig.model_fields.keys() - {"device"} if name in row}
    settings |= dict(zip(("weight_bits", "act_bits"), map(int, re.findall(r"\d+", row["bits"])), strict=True))
    start = dict(QATConfig.model_validate(settings, strict=False))
    start |= {name: Path(row[name]) for name in ("teacher", "generator") if name in row}
    start |= {name: row[name] for name in ("preset", "mean", "std") if name in row}
    start |= {"network": row["network"]} if ".py:" not in row["network"] else {}  # code of a table runs if named again
    return start | {"data": row.get("data", row["dataset"])}
