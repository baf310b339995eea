"""The commands of ``docs/reproduction.md`` on stand-ins: everything is real but downloads, checksums and length."""

import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pytorchcv.models.common import model_store
from torch import nn
from torch.utils.data import Subset
from torchvision import datasets, transforms
from torchvision.models import ResNet18_Weights

import granq
from granq import build_network, models, qat
from granq.app.cli import main
from granq.app.jobs import Job, from_arguments
from granq.app.sweep import read_plan, status
from granq.data import IMAGENET_IDS
from granq.files import write_csv

PAGE = Path(__file__).parent.parent / "docs/reproduction.md"
COMMANDS = re.findall(r"^    granq (quantize .*)$", PAGE.read_text(), re.MULTILINE)
SHORT = "--epochs 1 --warmup-epochs 0 --iterations 1 --batch-size 2 --device cpu --json".split()
SHOWN = 4  # images the stand-in teachers know


def photographs(height: int, width: int) -> list[Image.Image]:
    """``SHOWN`` smooth pictures, each framed by another one where a center crop of 224 in 256 cuts."""
    noise = np.random.default_rng(0).integers(0, 255, (SHOWN, 4, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(n).resize((width, height), Image.Resampling.BICUBIC) for n in noise]
    frames = [picture.copy() for picture in pictures[1:] + pictures[:1]]
    for frame, picture in zip(frames, pictures, strict=True):
        frame.paste(picture.crop((w := width // 16, h := height // 16, width - w, height - h)), (w, h))
    return frames


def stand_in(network: str, classes: int, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Random weights, but BatchNorm statistics of ``images`` and a last layer that gives them ``labels``.

    Seen through another normalization, crop or order of classes the images get other labels.
    """
    model = build_network(network, classes)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.train()(images)
    seen: list[torch.Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]
    last.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(1)))
    with torch.no_grad():
        model.eval()(images)
        last.weight.zero_()
        last.weight[labels] = 10 * torch.linalg.pinv(seen[0]).T.view_as(last.weight[labels])
        if last.bias is not None:
            last.bias.zero_()
    return model


def write_cifar(root: Path, classes: int, labels: torch.Tensor) -> torch.Tensor:
    """torchvision's files: ``SHOWN`` test images, an unreadable train split. Returns what pytorchcv's networks take."""
    pixels = np.stack([np.asarray(image) for image in photographs(32, 32)])
    test = {"data": pixels.transpose(0, 3, 1, 2).reshape(SHOWN, -1), "labels": labels.tolist()}
    if classes == 10:
        folder, names, meta = root / "cifar-10-batches-py", ["test_batch"], "batches.meta"
        train = [f"data_batch_{i}" for i in range(1, 6)]
    else:
        folder, names, meta, train = root / "cifar-100-python", ["test"], "meta", ["train"]
        test["fine_labels"] = test.pop("labels")
    folder.mkdir(parents=True)
    (folder / names[0]).write_bytes(pickle.dumps(test))
    key = "label_names" if classes == 10 else "fine_label_names"
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {i}" for i in range(classes)]}))
    for name in train:
        (folder / name).write_bytes(b"whoever reads this fails")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # pytorchcv's for CIFAR
    view = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    return torch.stack([view(Image.fromarray(p)) for p in pixels])


def write_imagenet(root: Path, labels: torch.Tensor) -> torch.Tensor:
    """1000 class folders with one JPEG each. Returns those of ``labels`` as torchvision's own transform gives them."""
    shown, files = dict(zip(labels.tolist(), photographs(375, 500), strict=True)), []
    Image.new("RGB", (8, 8)).save(blank := io.BytesIO(), "JPEG")
    for label in range(1000):
        folder = root / "imagenet/val" / IMAGENET_IDS[label]
        folder.mkdir(parents=True)
        encoded = io.BytesIO() if label in shown else blank
        if label in shown:
            shown[label].save(encoded, "JPEG")
            files.append(encoded)
        (folder / f"ILSVRC2012_val_{label:08d}.JPEG").write_bytes(encoded.getvalue())
    view = ResNet18_Weights.IMAGENET1K_V1.transforms()
    return torch.stack([view(Image.open(file)) for file in files])


def write_teacher(network: str, model: nn.Module, home: Path, monkeypatch, path: str | Path | None = None) -> None:
    """Put a checkpoint where pytorchcv would download it to, or at ``path``."""
    if path is None:
        error, sha1, _ = model_store.get_model_name_suffix_data(network)
        path = home / ".torch/models" / f"{network}-{error}-{sha1[:8]}.pth"
        path.parent.mkdir(parents=True)
        monkeypatch.setattr(model_store, "_check_sha1", lambda *_: True)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)  # the format of their time
    monkeypatch.setattr(qat, "CALIBRATION", 1)
    monkeypatch.setattr(model_store, "_download", lambda *_, **__: pytest.fail("a download was tried"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: re.search(r"--out runs/(\w+)", c)[1])
def test_command_of_the_page(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRANQ_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))  # pytorchcv's folder lies below
    monkeypatch.chdir(tmp_path)
    arguments = os.path.expandvars(command).split()
    option = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    name, network = option["--data"], option["--network"]
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[name]
    labels = torch.arange(SHOWN) * (classes // SHOWN)

    if name == "imagenet":
        images = write_imagenet(tmp_path / "data", labels)
        measure = models.top1_on  # 1000 images at 224 pixels would take minutes: those the teacher knows are measured
        monkeypatch.setattr(models, "top1_on", lambda m, test, *rest: measure(m, Subset(test, labels.tolist()), *rest))
    else:
        images = write_cifar(tmp_path / "data", classes, labels)
        monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    write_teacher(network, stand_in(network, classes, images, labels), tmp_path, monkeypatch, option.get("--teacher"))

    assert main([*arguments, *SHORT]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["teacher_top1"] == 100, "images, labels and weights do not reach the teacher as they were"
    assert 0 <= row["last_top1"] <= 100 and row["test_images"] == (1000 if name == "imagenet" else SHOWN)
    assert (row["preset"], row["bits"], row["epochs"]) == ("paper", "W3A3", 1)
    assert row["image_size"] == (224 if name == "imagenet" else 32)
    assert row["temperature"] == (5 if name == "imagenet" else 20)
    config = json.loads((tmp_path / option["--out"] / "config.json").read_text())
    assert config["spec"]["classes"] == classes


def test_page_names_every_setting_of_the_paper():
    assert [re.search(r"--network (\w+)", command)[1] for command in COMMANDS] == [
        "resnet20_cifar10", "resnet20_cifar100", "resnet18", "resnet50", "mobilenetv2_w1",
    ]  # fmt: skip
    assert all("--preset paper" in command for command in COMMANDS)


def test_a_sweep_plans_the_rows_of_the_paper(tmp_path):
    command = re.search(r"^granq (sweep --data cifar10 .*?)#", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    arguments = command.replace("\\", "").replace("runs/paper", str(tmp_path / "s")).split()
    assert main([*arguments, "--status"]) == 0
    plan = read_plan(tmp_path / "s")
    rows = {(j.scheme, j.weight_bits, j.act_bits) for j in plan}
    assert rows == {(s, b, b) for s in ("granq", "layerwise", "per_channel") for b in (3, 4, 5)}
    assert len(plan) == len(rows) and {(j.preset, j.recipe, j.seed) for j in plan} == {("paper", "adadfq", 0)}
    for job in plan:
        paper = granq.QATConfig.paper(job.data, job.network, job.weight_bits, scheme=job.scheme)
        assert {name: getattr(job, name) for name in granq.QATConfig.model_fields} == dict(paper)


def test_a_preset_runs_continues_and_shows_the_distance(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRANQ_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    labels = torch.arange(SHOWN) * (100 // SHOWN)
    images = write_cifar(tmp_path / "data", 100, labels)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    write_teacher("resnet20_cifar100", stand_in("resnet20_cifar100", 100, images, labels), tmp_path, monkeypatch)
    command = "sweep --preset paper --data cifar100 --network resnet20_cifar100 --bits 4,4 --schemes".split()
    command += ["granq", "layerwise", "per_channel", *SHORT, "--out", str(tmp_path / "s")]
    real, begun = Job.run, []

    def run(job):
        begun.append(job.scheme)
        if begun == ["granq", "layerwise"]:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(Job, "run", run)
    assert main(command) == 130 and begun == ["granq", "layerwise"]
    assert main(command) == 0 and begun[2:] == ["layerwise", "per_channel"]  # the first one is finished
    table = status(tmp_path / "s")
    results = pd.read_csv(tmp_path / "s/results.csv")
    assert list(table.lost) == list(results.teacher_top1 - results.last_top1) and set(results.epochs) == {1}
    assert "lost" in capsys.readouterr().err


def test_any_row_is_repeated_from_its_own_fields(folder, teacher, tmp_path, capsys):
    options = f"--data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme foldable --bits 4,3"
    options += " --recipe gdfq --seed 5 --preset paper --epochs 2 --warmup-epochs 1 --iterations 1 --batch-size 4"
    generator = ["--generator", str(tmp_path / "drawing")]
    assert main(["quantize", *options.split(), "--out", generator[1]]) == 0
    capsys.readouterr()
    assert main(["quantize", *options.split(), *generator, "--json", "--out", str(tmp_path / "first")]) == 0
    first = json.loads(capsys.readouterr().out)
    write_csv(tmp_path / "own.csv", pd.DataFrame([first | {"seed": 9}, first]))
    kept = pd.read_csv(PAGE.parent.parent / "figures/results_cifar10.csv", nrows=0).columns
    frame = pd.DataFrame([first]).reindex(columns=kept).assign(dataset="images", data="folder:PATH")
    write_csv(tmp_path / "published.csv", frame)
    for name, row, given in (("own", "2", []), ("published", "1", ["--data", folder, *generator])):
        out = tmp_path / name
        assert main(["quantize", "--from-row", f"{out}.csv", row, *given, "--out", str(out), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert (again.pop("row_last_top1"), again.pop("difference")) == (first["last_top1"], 0)
        assert again == first | {"out": str(out), "seconds": again["seconds"]}
        states = [torch.load(run / "checkpoint.pt", weights_only=True)["student"] for run in (tmp_path / "first", out)]
        assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_rows_of_the_published_table_are_understood(tmp_path):
    table = PAGE.parent.parent / "figures/results_cifar10.csv"
    rows = pd.read_csv(table)
    rows.index += 1
    for number, row in rows[rows.data_used.isna()][::6].iterrows():
        code = ["--network", row["network"]] if ".py:" in row["network"] else []
        (tmp_path / "cifar10/test/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "cifar10/test/a/0.png")
        code += ["--data", f"folder:{tmp_path}/cifar10"]
        job = from_arguments(["--from-row", str(table), str(number), "--out", "again", "--seed", "77", *code])
        assert (job.scheme, job.recipe, job.epochs, job.seed) == (row["scheme"], row["recipe"], row["epochs"], 77)
        assert row["bits"] == f"W{job.weight_bits}A{job.act_bits}" and str(job.teacher) == row["teacher"]


def test_rows_that_cannot_be_repeated(tmp_path, capsys):
    pd.DataFrame({"scheme": ["granq"], "bits": ["W3A3"]}).to_csv(tmp_path / "t.csv", index=False)
    published = pd.read_csv(PAGE.parent.parent / "figures/results_cifar10.csv")
    published[published.data_used.notna()].to_csv(tmp_path / "real.csv", index=False)
    cases = ("t", "0", "no row 0"), ("t", "2", "no row 2"), ("t", "1", "lacks dataset, last_top1")
    for name, row, message in (*cases, ("real", "2", "trained on real, folder:cifar100")):
        assert (
            main(["quantize", "--from-row", str(tmp_path / f"{name}.csv"), row, "--out", str(tmp_path / "again")]) == 2
        )
        assert message in capsys.readouterr().err
    assert main(["quantize", "--from-row", str(tmp_path / "none.csv"), "1", "--out", str(tmp_path / "again")]) == 2
    assert "there is no table" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
