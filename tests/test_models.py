"""Teachers: found by name or in a file, trained and continued to the same bits, measured, and read without running."""

import copy
import itertools
import json
import pickle
import sys
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb, TinyNet, same_bits
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import granq
from granq import models
from granq.data import describe_data, load_split
from granq.errors import UserError
from granq.files import save_atomically
from granq.graph import plain_copy
from granq.models import augment, build_network, load_teacher, save_teacher, top1_on, train_teacher

# ---- by name


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_are_those_of_a_network_that_normalizes(name):
    """What torchvision builds for its weights; their state dict does not say so."""
    assert build_network(name, 10).transform_input and build_network(name, 10).aux_logits


def test_weights_of_a_network_that_knows_versions(tmp_path):
    network, spec = build_network("mnasnet0_5", 10), describe_data("cifar10", image_size=32)
    save_teacher(tmp_path / "t.safetensors", network, "mnasnet0_5", spec, 10.0)
    assert same_bits(load_teacher("mnasnet0_5", spec, tmp_path / "t.safetensors")[0], network)


def test_old_weights_that_lack_the_counters_of_norms(tmp_path):
    network, spec = build_network("resnet20_cifar10", 10), describe_data("cifar10")
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    loaded, _ = load_teacher("resnet20_cifar10", spec, tmp_path / "old.pth")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_digits_have_their_teacher():
    spec = describe_data("digits")
    teachers = [load_teacher("resnet20_cifar10", spec, file)[0] for file in (None, models.digits_teacher())]
    assert same_bits(*teachers)


@pytest.mark.parametrize(("name", "classes"), [
    ("resnet20_cifar10", 10), ("resnet20_cifar10", 3), ("torchvision:resnet18", 7), ("timm:resnet18", 5),
])  # fmt: skip
def test_networks_by_name(name, classes):
    network = build_network(name, classes)
    assert network(torch.zeros(1, 3, 64 if ":" in name else 32, 64 if ":" in name else 32)).shape == (1, classes)
    assert not network.training


def test_a_name_that_nobody_knows():
    for name in ("nope", "torchvision:nope", "timm:nope", "nope:resnet18", ""):
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


def test_a_network_s_file_imports_its_neighbours(tmp_path):
    (tmp_path / "granq_test_blocks.py").write_text(FILE)
    (tmp_path / "net.py").write_text("def make():\n    from granq_test_blocks import Net\n    return Net(2)\n")
    before = list(sys.path)
    assert build_network(f"{tmp_path / 'net.py'}:make", 2)(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert sys.path == before


def test_a_function_that_needs_more_than_classes_is_told(tmp_path):
    (tmp_path / "net.py").write_text("def make(depth, num_classes=10): ...\ndef other(depth, width): ...\n")
    with pytest.raises(UserError, match="make of .*net.py also needs depth: name a function that does not"):
        build_network(f"{tmp_path / 'net.py'}:make", 2)
    with pytest.raises(UserError, match="other of .*net.py also needs depth, width"):
        build_network(f"{tmp_path / 'net.py'}:other", 2)


def test_a_teacher_goes_to_its_device():
    """Its classes are counted before that, on the CPU."""
    teacher, _ = load_teacher("resnet20_cifar10", describe_data("digits"), models.digits_teacher(), "meta")
    assert next(teacher.parameters()).device.type == "meta"


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
    with pytest.raises(UserError, match="weights of .* with 10 classes, as many as digits has: .* size mismatch"):
        load_teacher("resnet20_cifar10", describe_data("digits"), teacher)
    spec = describe_data(folder, "resnet20_cifar10")
    torch.save({"epoch": 3}, tmp_path / "t.pt")
    with pytest.raises(UserError, match="weights of .* with 2 classes, as many as .* has: .* Missing key"):
        load_teacher("resnet20_cifar10", spec, tmp_path / "t.pt")
    monkeypatch.setattr("pytorchcv.model_provider.get_model", lambda name, **_: TinyNet(10).eval())
    with pytest.raises(UserError, match="tell 10 classes apart, but .* has 2"):
        load_teacher("resnet20_cifar10", spec)
    assert load_teacher("resnet20_cifar10", describe_data("cifar10"))[0](torch.zeros(1, 3, 8, 8)).shape == (1, 10)


SMALL = """
import torch
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(num_classes))

class Inside(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x):
        return self.model(x)
"""


@pytest.fixture
def own(tmp_path):
    """A network of a file, and its weights."""
    (tmp_path / "small.py").write_text(SMALL)
    name, spec = f"{tmp_path / 'small.py'}:make", describe_data("digits", image_size=8)
    network = build_network(name, 10)
    network(torch.zeros(1, 3, 8, 8))
    return name, spec, network


@pytest.mark.parametrize("wrapper", [(), *((key,) for key in models.WRAPPERS), ("state_dict", "model"), ("ema",)])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "net.", "module._orig_mod.", "_orig_mod.model."]
)
def test_checkpoints_as_they_are_found(own, tmp_path, wrapper, prefix):
    name, spec, network = own
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    for key in reversed(wrapper):
        state = {"epoch": 3, key: state, "best_prec1": 91.5}
    torch.save(state, tmp_path / "t.pt")
    if "ema" in wrapper:
        with pytest.raises(UserError, match="Missing key"):  # nobody says what else may lie under any name
            load_teacher(name, spec, tmp_path / "t.pt")
    else:
        assert same_bits(load_teacher(name, spec, tmp_path / "t.pt")[0], network)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_network_s_own_names_stay(own, tmp_path, prefix):
    """Its layers lie in a module ``model`` of its own."""
    name = own[0].replace(":make", ":Inside")
    network = build_network(name, 10)
    network(torch.zeros(1, 3, 8, 8))
    torch.save({"model": {f"{prefix}{k}": v for k, v in network.state_dict().items()}}, tmp_path / "t.pt")
    assert same_bits(load_teacher(name, own[1], tmp_path / "t.pt")[0], network)


@pytest.mark.parametrize(("first", "second"), [("net.", "model."), ("", "module.")])
def test_two_networks_in_one_file_are_refused(own, tmp_path, first, second):
    """A network and its teacher, or its moving average: either name leads to the same layer."""
    name, spec, network = own
    state = {f"{prefix}{key}": value for prefix in (first, second) for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(UserError, match="holds two networks: 0.weight is in it more than once"):
        load_teacher(name, spec, tmp_path / "t.pt")


def test_a_moving_average_of_torch_is_read(own, tmp_path):
    name, spec, network = own
    torch.save(AveragedModel(network).state_dict(), tmp_path / "t.pt")
    assert same_bits(load_teacher(name, spec, tmp_path / "t.pt")[0], network)


@pytest.mark.parametrize("kind", ["argparse.Namespace", "multiarray.scalar", "BatchNorm2d"])
def test_what_only_code_can_read_is_refused(own, tmp_path, kind):
    name, spec, network = own
    other = {"argparse.Namespace": Namespace(lr=0.1), "multiarray.scalar": np.float64(91.5), "BatchNorm2d": None}[kind]
    path = tmp_path / "it's mine.pth"
    torch.save({"net": network.state_dict(), "more": other} if other else nn.Sequential(nn.BatchNorm2d(3)), path)
    with pytest.raises(
        UserError, match="only code can read its .*; if you trust the author, save the state dict alone"
    ) as error:
        load_teacher(name, spec, path)
    assert kind in str(error.value) or "Sequential" in str(error.value)


def test_a_list_of_tensors_is_no_teacher(own, tmp_path):
    torch.save([torch.ones(2)], tmp_path / "t.pt")
    with pytest.raises(UserError, match="holds no weights: it is a list"):
        load_teacher(*own[:2], tmp_path / "t.pt")


@pytest.mark.parametrize("data", ["folder", "digits"])
def test_a_timm_network_from_a_file_is_normalized_as_timm_says(folder, tmp_path, data):
    """Inception's 0.5, not ImageNet's; the mean of digits stays theirs, and the user's word comes first."""
    name, given = "timm:tf_mobilenetv3_small_minimal_100", folder if data == "folder" else data
    spec = describe_data(given, name, 32)
    network = build_network(name, spec.classes)
    torch.save(network.state_dict(), tmp_path / "t.pt")
    found = load_teacher(name, spec, tmp_path / "t.pt")[1]
    wanted = ((0.5,) * 3, (0.5,) * 3) if data == "folder" else ((0.3053,) * 3, (0.376,) * 3)
    assert (found.mean, found.std) == wanted and found.image_size == 32
    own = describe_data(given, name, 32, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert load_teacher(name, own, tmp_path / "t.pt")[1] == own
    save_teacher(tmp_path / "t.safetensors", network, name, own, np.float32(50))
    assert load_teacher(name, spec, tmp_path / "t.safetensors")[1].mean == (0.1, 0.2, 0.3)  # the file knows
    other = own.model_copy(update={"mean": (0.7,) * 3})
    assert load_teacher(name, other, tmp_path / "t.safetensors")[1].mean == (0.7,) * 3


def test_nothing_says_how_images_of_an_own_network_are_normalized(own, folder, tmp_path):
    torch.save(build_small(own[0], 2, 32).state_dict(), tmp_path / "t.pt")
    spec = describe_data(folder, own[0])
    assert spec.image_size == 32
    with pytest.warns(UserWarning, match="give mean and std"):
        load_teacher(own[0], spec, tmp_path / "t.pt")
    with pytest.warns(UserWarning, match="give mean and std"):
        load_teacher(own[0], describe_data("cifar10").model_copy(update={"classes": 2}), tmp_path / "t.pt")
    load_teacher(own[0], describe_data(folder, own[0], mean=(0.5,) * 3, std=(0.5,) * 3), tmp_path / "t.pt")


def test_classes_of_other_names_are_told(folder, teacher):
    """In another order they are other labels, and nothing else would say so."""
    test = Path(folder.removeprefix("folder:"), "test")
    spec = load_teacher("resnet20_cifar10", describe_data(folder, "resnet20_cifar10"), teacher)[1]
    assert spec.labels == ("cat", "dog")
    (test / "cat").rename(test / "zebra")
    with pytest.warns(UserWarning, match="other classes, or in another order: cat, dog; here they are dog, zebra"):
        load_teacher("resnet20_cifar10", describe_data(folder, "resnet20_cifar10"), teacher)


def build_small(name: str, classes: int, size: int) -> nn.Module:
    network = build_network(name, classes)
    network(torch.zeros(1, 3, size, size))
    return network


def test_a_network_of_1000_classes_on_some_of_imagenet(own, tmp_path):
    for i, wnid in enumerate(("n01440764", "n02099601")):  # classes 0 and 207
        (tmp_path / "data/val" / wnid).mkdir(parents=True)
        Image.new("RGB", (8, 8), (100 * i,) * 3).save(tmp_path / "data/val" / wnid / "0.png")
    spec = describe_data(f"folder:{tmp_path / 'data'}", own[0], mean=(0.5,) * 3, std=(0.5,) * 3)
    for classes, labels in ((1000, [0, 207]), (2, [0, 1])):
        torch.save(build_small(own[0], classes, 8).state_dict(), tmp_path / "t.pt")
        model, fitted = load_teacher(own[0], spec, tmp_path / "t.pt")
        assert fitted.classes == classes and [int(y) for _, y in load_split(fitted, "test")] == labels
    assert (spec.image_size, spec.classes) == (8, 2)


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
    _, (images, logits) = outputs  # the first tries a layout
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model).eval().forward(images), logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert top1 == 100 * (logits.argmax(1) == torch.tensor([0, 0, 0, 1, 1, 1])).float().mean() != 0
    assert not logits.requires_grad


@pytest.mark.parametrize("last", [nn.Conv2d(3, 2, 1), nn.Sequential(nn.Flatten(), nn.LazyLinear(2))])
def test_maps_and_nan_are_no_classes(folder, last):
    """Compared with labels, (N, K, 1, 1) gave 600 percent, and NaN the share of class 0."""
    spec = describe_data(folder, "resnet20_cifar10", 8)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), last)
    model(torch.zeros(1, 3, 8, 8))
    for weight in last[1].parameters() if isinstance(last, nn.Sequential) else ():
        nn.init.constant_(weight, torch.nan)
    with pytest.raises(UserError, match=r"logits \(N, two classes .* that are numbers, got \(6, 2"):
        top1_on(model, load_split(spec, "test"), spec)
    model.forward = lambda images: (images, images)  # two heads
    with pytest.raises(UserError, match="got a tuple"):
        top1_on(model, load_split(spec, "test"), spec)


# ---- trained here


def test_augmented_images_by_hand():
    images = torch.arange(2 * 3 * 8 * 6).view(2, 3, 8, 6).remainder(256).to(torch.uint8)
    padded = nn.functional.pad(images.float(), (4,) * 4, mode="reflect")
    crops = [padded[:, :, y : y + 8, x : x + 6] for y in range(9) for x in range(9)]
    shifted, mirrored = augment(images, flip=False), augment(images)
    for i in range(2):
        assert any(torch.equal(shifted[i], crop[i]) for crop in crops)
        assert any(torch.equal(mirrored[i], version[i]) for crop in crops for version in (crop, crop.flip(3)))


@pytest.fixture
def learn(monkeypatch):
    """``train_teacher`` on a few digits."""
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "train"), range(40))
    monkeypatch.setattr(models, "load_split", lambda *_: few)
    monkeypatch.setattr(models, "build_network", lambda *_: TinyNet(10))
    return partial(train_teacher, "tiny", describe_data("digits"), epochs=3, batch_size=16)


def test_a_diverged_teacher_is_told(learn):
    with pytest.raises(FloatingPointError, match=r"the learning rate 1e\+30 is too high"):
        learn(lr=1e30)


def test_training_that_was_stopped_ends_with_the_same_bits(learn, tmp_path, monkeypatch):
    whole, _ = learn(checkpoint=tmp_path / "whole")
    saves = []

    def save(path, write):
        save_atomically(path, write)
        saves.append(path)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(models, "save_atomically", save)
    with pytest.raises(KeyboardInterrupt):
        learn(checkpoint=tmp_path / "c")
    again, _ = learn(checkpoint=tmp_path / "c")
    assert len(saves) == 3
    assert same_bits(whole, again)
    with pytest.raises(UserError, match="of another training"):
        learn(checkpoint=tmp_path / "c", lr=0.1)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_training_of_few_steps(tmp_path, epochs):
    for split, label in itertools.product(("train", "test"), "ab"):
        (folder := tmp_path / split / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), (40 * ord(label) % 256, 0, 0)).save(folder / "0.png")
    spec = describe_data(f"folder:{tmp_path}", "resnet20_cifar10")
    network, _ = train_teacher("resnet20_cifar10", spec, epochs=epochs, lr=0.01)  # one batch an epoch
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {epochs}
    assert all(value.isfinite().all() for value in network.state_dict().values())


VIEWS = """
from torch import nn

class Views(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, 8, 1), nn.BatchNorm2d(4), nn.Linear(64, classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(x.size(0), -1))
"""


def test_a_network_that_views_its_maps_as_rows(tmp_path: Path) -> None:
    """Maps in channels_last, the faster layout, have no such view: training, students and analysis get around that."""
    (tmp_path / "own.py").write_text(VIEWS)
    for split, label in itertools.product(("train", "test"), "abc"):
        (folder := tmp_path / split / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), (80 * ord(label) % 256, 0, 0)).save(folder / "0.png")
    network = f"{tmp_path}/own.py:Views"
    spec = describe_data(f"folder:{tmp_path}", network, mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher, _ = train_teacher(network, spec, epochs=1, lr=0.01)
    image = torch.randn(2, 3, 32, 32)
    assert models.faster_layout(teacher, image) == torch.contiguous_format
    assert models.faster_layout(TinyNet(), image) == torch.channels_last
    short = dict(epochs=2, warmup_epochs=1, iterations=1, batch_size=4, refined_images=0, device="cpu")
    for recipe, scheme in (("adadfq", "granq"), ("gdfq", "strict"), ("match", "foldable")):
        settings = granq.QATConfig(recipe=recipe, scheme=scheme, **short)
        result = granq.train(teacher, settings, evaluate=partial(top1_on, dataset=load_split(spec, "test"), spec=spec))
        drawn = [*granq.generated_batches(result.generator, 0, 8, 4)]
        with torch.no_grad():
            same = plain_copy(teacher, traced=True)(drawn[0].contiguous(memory_format=torch.channels_last))
            assert torch.allclose(same, teacher(drawn[0]), atol=1e-5) and result.student(drawn[0]).isfinite().all()
    frame = granq.measure_sensitivity(teacher, drawn, "foldable", 8, kinds=["alone"], parts=["both"])
    assert frame.kl.notna().all() and len(granq.measure_generated_images(result.generator, teacher, spec)) == 3


def test_bfloat16_trains_float32_weights(learn):
    model, _ = learn(epochs=1, bf16=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain, _ = learn(epochs=1)
    assert not torch.equal(next(model.parameters()), next(plain.parameters()))


def test_training_leaves_the_random_numbers_of_others(learn):
    """``digits_teacher`` trains at first use only: what is drawn next must not depend on that."""
    before = torch.get_rng_state()
    learn(epochs=1, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_teachers_that_take_or_give_something_else(tmp_path) -> None:
    """One channel is told, and so are no weights."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef grey(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())\n"
    )
    spec = describe_data("digits")
    torch.save(build_network(f"{tmp_path}/nets.py:grey", 10).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(UserError, match="takes no RGB images of 32 pixels"):
        load_teacher(f"{tmp_path}/nets.py:grey", spec, tmp_path / "grey.pth")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no weights"):
        load_teacher("resnet20_cifar10", spec, tmp_path / "empty.pth")


NO_CLASSIFIERS = """
import torch
from torch import nn
class Two(nn.Module):
    def forward(self, x, y): return x
def two(): return Two()
def maps(): return nn.Conv2d(3, 10, 3)
def nine(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 9))
def small(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
def nan():
    nn.init.constant_((net := nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))[1].bias, torch.nan)
    return net
def number(): return 3
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("two", "takes no RGB images of 32 pixels"), ("small", "takes no RGB images of 32 pixels"),
        ("maps", "gives no finite logits"), ("nan", "gives no finite logits"), ("number", "returns a int, no network"),
        ("nine", "tell 9 classes apart, but digits has 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_told_before(tmp_path, function, said):
    (tmp_path / "own.py").write_text(NO_CLASSIFIERS)
    with pytest.raises(UserError, match=said):
        train_teacher(f"{tmp_path}/own.py:{function}", describe_data("digits"), epochs=1)


def test_a_full_disk_is_no_bug(tmp_path):
    def write(path):
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")

    with pytest.raises(OSError, match="unexpected pos"):
        save_atomically(tmp_path / "t.pt", write)


def test_a_teacher_goes_on_with_its_own_normalization_only(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models, "load_split", lambda *_: [(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 2)
    spec = describe_data("digits")
    train = partial(train_teacher, "resnet20_cifar10", epochs=1, batch_size=2, checkpoint=tmp_path / "t.pt")
    train(spec)
    with pytest.raises(UserError, match="is of another training"):
        train(spec.model_copy(update={"mean": (0.1, 0.1, 0.1)}))


@pytest.mark.parametrize(("name", "flip", "mirrored"), [("digits", True, 0), ("other", True, 1), ("other", False, 0)])
def test_what_is_mirrored(tmp_path, monkeypatch, name, flip, mirrored) -> None:
    asked = []
    monkeypatch.setattr(models, "load_split", lambda *_: [(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 2)
    monkeypatch.setattr(models, "augment", lambda images, flip: asked.append(flip) or images)
    spec = describe_data("digits").model_copy(update={"name": name})
    train_teacher("resnet20_cifar10", spec, epochs=1, batch_size=2, flip=flip)
    assert asked == [bool(mirrored)]


def test_a_network_that_asserts_its_size_is_told_in_a_sentence(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Sequential):\n    def forward(self, x):\n"
        "        assert x.shape[-1] == 224, 'Input height (32) is not 224'\n        return super().forward(x)\n\n\n"
        "def net(num_classes=10):\n    return Net(torch.nn.Conv2d(3, num_classes, 224), torch.nn.Flatten())\n"
    )
    torch.save(build_network(f"{tmp_path}/own.py:net", 10).state_dict(), tmp_path / "own.pt")
    with pytest.raises(UserError, match=r"takes no RGB images of 32 pixels: Input height \(32\)"):
        load_teacher(f"{tmp_path}/own.py:net", describe_data("digits"), tmp_path / "own.pt")
