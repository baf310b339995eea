"""Files from elsewhere: read only what is an image of the dataset, run nothing, and say which file was wrong."""

import copy
import io
import json
import pickle
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyNet
from PIL import Image
from safetensors.torch import save_file

from granq import data
from granq.cli import main
from granq.data import describe_data, load_split
from granq.files import write_csv
from granq.models import build_network, load_teacher, top1_on


def load(folder: str) -> None:
    load_split(describe_data(folder, "resnet20_cifar10"), "test")


def images(folder: str) -> list[Path]:
    return sorted(Path(folder.removeprefix("folder:")).glob("test/*/*"))


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims width x height black pixels in a few kilobytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit, gray
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_hundred_megapixels_are_refused_unread(folder, side, monkeypatch):
    (bad := images(folder)[0]).with_suffix(".png").write_bytes(
        huge_png(side, side) if side < 20_000 else huge_png(side, 9_000)
    )
    bad.unlink()
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the pixels were decoded"))
    with pytest.raises(ValueError, match=r"0\.png is not a usable image: .*pixels"):
        load(folder)


def test_truncated_jpeg_is_named(folder):
    bad = images(folder)[1]
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    bad.write_bytes(whole.getvalue()[: whole.getbuffer().nbytes // 2])
    with pytest.raises(ValueError, match=rf"{bad.name} is not a usable image: .*truncated"):
        load(folder)


def test_command_says_which_image(folder, teacher, tmp_path, capsys):
    images(folder)[2].write_text("not an image")
    arguments = f"quantize --data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme strict --bits 3,3"
    assert main([*arguments.split(), "--out", str(tmp_path / "run")]) == 2
    assert "2.jpg is not a usable image" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_links_stay_inside(folder, tmp_path):
    root = Path(folder.removeprefix("folder:"))
    (tmp_path / "elsewhere").symlink_to(root)
    load(f"folder:{tmp_path / 'elsewhere'}")  # the dataset itself may be a link
    (root / "test/cat/again.jpg").symlink_to(root / "test/cat/0.jpg")
    load(folder)  # and so may an image within
    (link := root / "test/cat/secret.jpg").symlink_to(tmp_path / "private.jpg")
    with pytest.raises(ValueError, match="secret.jpg is a link to .*private.jpg"):
        load(folder)
    link.unlink()
    (root / "test/cat/loop").symlink_to(root / "test")  # would be walked for ever
    with pytest.raises(ValueError, match="loop is a link"):
        load(folder)


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_pickled_program_is_not_run(tmp_path):
    for name, write in (
        ("a.pt", lambda v, p: torch.save(v, p)),
        ("b.pkl", lambda v, p: p.write_bytes(pickle.dumps(v))),
    ):
        write({"weight": Bomb(tmp_path / "proof")}, tmp_path / name)
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load_teacher("resnet20_cifar10", describe_data("digits"), tmp_path / name)
    assert not (tmp_path / "proof").exists()


def test_archive_with_a_way_out_writes_nothing(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt", "a") as archive:
        archive.writestr("../evil.txt", "x")
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "t.pt").rename(tmp_path / "deep/er/t.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="not a readable checkpoint|does not fit"):
        load_teacher("resnet20_cifar10", describe_data("digits"), tmp_path / "deep/er/t.pt")
    assert sorted(tmp_path.rglob("*")) == before


def test_formulas_become_text(tmp_path):
    table = pd.DataFrame({"layer": ["=1+1", "@x", "conv", None, "-a"], "error": [-1.0, 2.0, -3.0, 4.0, 5.0]})
    write_csv(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "layer,error", "'=1+1,-1.0", "'@x,2.0", "conv,-3.0", ",4.0", "'-a,5.0",
    ]  # fmt: skip
    assert table.layer[0] == "=1+1"


@pytest.mark.parametrize("image", [torch.rand(3, 8, 8), np.zeros((3, 8, 8))])
def test_images_that_are_no_bytes_are_refused(image):
    """As v2.ToTensor makes them: divided by 255 once more, all would be black."""
    with pytest.raises(TypeError, match=r"must be uint8 \(0 to 255\), as load_split gives, got float"):
        top1_on(torch.nn.Flatten(), [(image, 0)], describe_data("digits"))


def test_audit_of_a_layer_named_like_a_formula(tmp_path, monkeypatch):
    from granq import models

    evil = torch.nn.Sequential()
    evil.add_module("=cmd|' 'calc", torch.nn.Conv2d(3, 2, 3))
    monkeypatch.setattr(models, "build_network", lambda *_: evil)
    assert main(["audit", "--network", "any", "--image-size", "8", "--out", str(tmp_path / "new/audit.csv")]) == 0
    assert (tmp_path / "new/audit.csv").read_text().splitlines()[1].startswith("'=cmd")


def test_limit_is_below_what_pillow_refuses_itself():
    assert data._MAX_PIXELS < Image.MAX_IMAGE_PIXELS


def test_splits_with_other_classes_are_refused(folder):
    """Each split numbers its folders: label 0 would be one class in training and another in the test."""
    root = Path(folder.removeprefix("folder:"))
    other = sorted((root / "train").iterdir())[0]
    other.rename(other.with_name("zebra"))
    try:
        with pytest.raises(ValueError, match="in one split only"):
            load_split(describe_data(folder, "resnet20_cifar10"), "train")
        load(folder)  # a test split alone is enough to quantize
    finally:
        other.with_name("zebra").rename(other)


@pytest.mark.parametrize("kind", ["I;16", "F"])
def test_pixels_of_more_than_8_bits_are_refused(folder, kind):
    """Pillow would make all of them white."""
    (bad := images(folder)[0]).unlink()
    pixels = np.linspace(0, 60_000, 32 * 32).reshape(32, 32)
    Image.fromarray(pixels.astype(np.uint16 if kind == "I;16" else np.float32)).save(bad.with_suffix(".tiff"))
    with pytest.raises(ValueError, match=r"more than 8 bits a channel \(mode"):
        load(folder)


def test_labels_are_those_of_the_network(folder):
    spec = replace(describe_data(folder, "resnet20_cifar10"), classes=3)
    with pytest.raises(ValueError, match="has 2 class folders, not the 3"):
        load_split(spec, "test")


@pytest.mark.parametrize(("state", "message"), [
    ({1: torch.zeros(2)}, "holds no state dict"), ([torch.zeros(2)], "holds no state dict"),
])  # fmt: skip
def test_what_is_no_state_dict_is_said(state, message, tmp_path, folder):
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=message):
        load_teacher("resnet20_cifar10", describe_data(folder, "resnet20_cifar10"), tmp_path / "t.pt")


def test_teachers_of_other_programs_are_read(tmp_path, folder):
    """DataParallel's and torch.compile's names, the key that timm's training uses, and headers of others."""
    spec = describe_data(folder, "resnet20_cifar10")
    state = {f"_orig_mod.module.{k}": v for k, v in build_network("resnet20_cifar10", 2).state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "t.pt")
    load_teacher("resnet20_cifar10", spec, tmp_path / "t.pt")
    for header in ("[]", "{}", '{"network": "a"}'):
        save_file(state, tmp_path / "t.safetensors", metadata={"granq": header})
        assert load_teacher("resnet20_cifar10", spec, tmp_path / "t.safetensors")[1] == spec


def test_downloaded_weights_must_fit_the_classes(folder, monkeypatch, tmp_path, capsys):
    def download(name, **options):
        print("Downloading ...")
        return TinyNet(10)

    monkeypatch.setattr("pytorchcv.model_provider.get_model", download)
    out = tmp_path / "t.safetensors"
    args = ["teacher", "--network", "resnet20_cifar10", "--pretrained", "--json", "--out", str(out), "--device", "cpu"]
    assert main([*args, "--data", folder]) == 2
    assert "tell 10 classes apart, but" in capsys.readouterr().err and not out.exists()
    assert main([*args, "--data", "digits"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] < 50  # what libraries print is not on standard output


def test_accuracy_is_measured_in_eval_mode(folder):
    spec = replace(describe_data(folder, "resnet20_cifar10"), image_size=8)
    model = TinyNet(2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    test = load_split(spec, "test")
    outputs = []
    model.register_forward_hook(lambda module, args, out: outputs.append((args[0], out)))
    top1_on(model, test, spec)
    ((images, logits),) = outputs
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model).eval().forward(images), logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
