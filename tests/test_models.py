"""Teachers: found by name or in a file, trained and continued to the same bits, measured, and read without running."""

import copy
import json
import pickle
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TinyNet
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from granq import models
from granq.data import describe_data, load_split
from granq.errors import UserError
from granq.models import augment, build_network, load_teacher, save_teacher, top1_on, train_teacher


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- by name


@pytest.mark.parametrize(("name", "classes"), [
    ("resnet20_cifar10", 10), ("resnet20_cifar10", 3), ("torchvision:resnet18", 7), ("timm:resnet18", 5),
])  # fmt: skip
def test_networks_by_name(name, classes):
    network = build_network(name, classes)
    assert network(torch.zeros(1, 3, 64 if ":" in name else 32, 64 if ":" in name else 32)).shape == (1, classes)
    assert not network.training


def test_a_name_that_nobody_knows():
    for name in ("nope", "torchvision:nope", "nope:resnet18", ""):
        with pytest.raises(UserError, match="known are the names of pytorchcv and torchvision, such as resnet20"):
            build_network(name, 10)


FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Settings:
    width: int = 1

class Net(torch.nn.Sequential):
    def __init__(self, outputs):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, outputs))

def by_name(width=1, *, num_classes=9): return Net(num_classes)
def by_position(outputs, width=1): return Net(outputs)
def without(outputs=4, *rest, **options): return Net(outputs)
"""


@pytest.mark.parametrize(("function", "classes"), [("by_name", 2), ("by_position", 2), ("Net", 2), ("without", 4)])
def test_a_network_from_a_file_of_ones_own(tmp_path, function, classes):
    (tmp_path / "net.py").write_text(FILE)
    network = build_network(f"{tmp_path / 'net.py'}:{function}", 2)
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, classes) and not network.training


def test_a_teacher_from_a_file_of_ones_own(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    name, spec = f"{tmp_path / 'net.py'}:by_position", describe_data("digits", image_size=8)
    model = build_network(name, 10)
    save_teacher(tmp_path / "t.safetensors", model, name, spec, 50.0)
    assert same_bits(load_teacher(name, spec, tmp_path / "t.safetensors")[0], model)
    with pytest.raises(UserError, match="names no pretrained weights"):  # they would be random ones
        load_teacher(name, spec)
    four = name.replace("by_position", "without")
    save_teacher(tmp_path / "four.safetensors", build_network(four, 10), four, spec, 50.0)
    with pytest.raises(UserError, match="tell 4 classes apart, but digits has 10"):
        load_teacher(four, spec, tmp_path / "four.safetensors")
    with pytest.raises(UserError, match="unknown function of .*net.py 'nope'; known: .*by_name"):
        build_network(name.replace("by_position", "nope"), 10)
    with pytest.raises(UserError, match="missing.py' of network Net does not exist"):
        build_network("missing.py:Net", 10)


# ---- from a checkpoint


def test_provenance_of_a_teacher(teacher, folder):
    with safe_open(teacher, "pt") as file:
        header = file.metadata()["granq"]
    info = json.loads(header)
    assert (info["network"], info["name"], info["top1"], info["image_size"]) == ("resnet20_cifar10", "folder", 50, 32)
    assert folder.removeprefix("folder:") not in header  # where it lay is nobody's business
    other = describe_data(folder, "resnet18", 64)
    _, spec = load_teacher("resnet20_cifar10", other, teacher)  # the file knows what it was trained with
    assert (spec.image_size, spec.mean, spec.name) == (32, describe_data("cifar10").mean, other.name)


def test_teachers_of_other_programs_are_read(tmp_path, folder):
    """DataParallel's and torch.compile's names, the key that timm's training uses, and headers of others."""
    spec = describe_data(folder, "resnet20_cifar10")
    state = {f"_orig_mod.module.{k}": v for k, v in build_network("resnet20_cifar10", 2).state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "t.pt")
    load_teacher("resnet20_cifar10", spec, tmp_path / "t.pt")
    for header in ("[]", "{}", '{"network": "a"}'):
        save_file(state, tmp_path / "t.safetensors", metadata={"granq": header})
        assert load_teacher("resnet20_cifar10", spec, tmp_path / "t.safetensors")[1] == spec


def test_weights_must_fit_network_and_classes(folder, teacher, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no weights of resnet20_cifar10 with 10 classes: .* size mismatch"):
        load_teacher("resnet20_cifar10", describe_data("digits"), teacher)
    spec = describe_data(folder, "resnet20_cifar10")
    torch.save({"epoch": 3}, tmp_path / "t.pt")
    with pytest.raises(UserError, match="no weights of resnet20_cifar10 with 2 classes: .* Missing key"):
        load_teacher("resnet20_cifar10", spec, tmp_path / "t.pt")
    monkeypatch.setattr("pytorchcv.model_provider.get_model", lambda name, **_: TinyNet(10).eval())
    with pytest.raises(UserError, match="tell 10 classes apart, but .* has 2"):
        load_teacher("resnet20_cifar10", spec)
    assert load_teacher("resnet20_cifar10", describe_data("digits"))[0](torch.zeros(1, 3, 8, 8)).shape == (1, 10)


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_a_pickled_program_is_not_run(tmp_path):
    bomb = {"weight": Bomb(tmp_path / "proof")}
    torch.save(bomb, tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(bomb, protocol=2))
    (tmp_path / "c.pt").write_bytes(b"garbage")
    (tmp_path / "d.safetensors").write_bytes(b"garbage")
    for name in ("a.pt", "b.pkl", "c.pt", "d.safetensors", "nothing.pt", "nothing.safetensors"):
        with pytest.raises(UserError, match=f"{name} holds no weights: .") as error:
            load_teacher("resnet20_cifar10", describe_data("digits"), tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "proof").exists()


def test_archive_with_a_way_out_writes_nothing(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt", "a") as archive:
        archive.writestr("../evil.txt", "x")
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "t.pt").rename(tmp_path / "deep/er/t.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds no weights"):
        load_teacher("resnet20_cifar10", describe_data("digits"), tmp_path / "deep/er/t.pt")
    assert sorted(tmp_path.rglob("*")) == before


# ---- measured


def test_accuracy_is_measured_in_eval_mode_and_keeps_no_graph(folder):
    spec = describe_data(folder, "resnet20_cifar10", 8)
    model = TinyNet(2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = []
    model.register_forward_hook(lambda module, args, out: outputs.append((args[0], out)))
    top1 = top1_on(model, load_split(spec, "test"), spec)
    ((images, logits),) = outputs
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model).eval().forward(images), logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert top1 == 100 * (logits.argmax(1) == torch.tensor([0, 0, 0, 1, 1, 1])).float().mean() != 0
    assert not logits.requires_grad


# ---- trained here


def test_augmented_images_by_hand():
    images = torch.arange(2 * 3 * 8 * 6).view(2, 3, 8, 6).remainder(256).to(torch.uint8)
    padded = nn.functional.pad(images.float(), (4,) * 4, mode="reflect")
    crops = [padded[:, :, y : y + 8, x : x + 6] for y in range(9) for x in range(9)]
    shifted, mirrored = augment(images, flip=False), augment(images)
    for i in range(2):
        assert any(torch.equal(shifted[i], crop[i]) for crop in crops)
        assert any(torch.equal(mirrored[i], version[i]) for crop in crops for version in (crop, crop.flip(3)))
    assert augment(images[:, :, :2, :2]).shape == (2, 3, 2, 2)  # too small for a border of 4


@pytest.fixture
def learn(monkeypatch):
    """``train_teacher`` on a few digits."""
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "train"), range(40))
    monkeypatch.setattr(models, "load_split", lambda *_: few)
    return partial(train_teacher, "resnet20_cifar10", describe_data("digits"), epochs=3, batch_size=16)


def test_a_diverged_teacher_is_told(learn):
    with pytest.raises(FloatingPointError, match=r"the learning rate 1e\+30 is too high"):
        learn(lr=1e30)


def test_four_steps_of_a_teacher(learn):
    """OneCycleLR divides by the rise less one step."""
    learn(epochs=4, batch_size=40)
