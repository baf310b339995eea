"""Datasets: what is described, read and refused; a file that is wrong is named."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from granq.data import DataSpec, batches, class_names, describe_data, load_split, normalize, pixel_bounds, split_folder
from granq.errors import UserError


def load(folder: str) -> None:
    load_split(describe_data(folder, "resnet20_cifar10"), "test")


def images(folder: str) -> list[Path]:
    return sorted(Path(folder.removeprefix("folder:")).glob("test/*/*"))


def test_descriptions(folder, monkeypatch):
    monkeypatch.setenv("GRANQ_DATA", "/somewhere")
    assert describe_data("digits").root == ""
    assert describe_data("cifar100").model_dump() | {"mean": 0, "std": 0} == {
        "name": "cifar100", "classes": 100, "image_size": 32, "mean": 0, "std": 0, "root": "/somewhere",
        "given": False,
    }  # fmt: skip
    assert describe_data("imagenet").root == "/somewhere/imagenet"
    small, large = describe_data(folder, "resnet20_cifar10"), describe_data(folder, "resnet18", 64)
    assert (small.classes, small.image_size, small.mean) == (2, 32, describe_data("cifar10").mean)
    assert (large.image_size, large.std) == (64, describe_data("imagenet").std)
    assert DataSpec.model_validate_json(small.model_dump_json()) == small


@pytest.mark.parametrize(("name", "size", "message"), [
    ("nope", None, "unknown dataset 'nope'; known: digits, cifar10, cifar100, imagenet, folder:PATH"),
    ("folder:/nope", None, "/nope does not exist or has no folder test or val"),
    ("digits", 30, "multiple of 4"), ("digits", 0, "greater than or equal to 4"),
])  # fmt: skip
def test_what_cannot_be_described(name, size, message):
    with pytest.raises(UserError if size is None else ValidationError, match=message):
        describe_data(name, image_size=size)


def test_folders_of_splits(tmp_path):
    for name in ("train/b", "train/a", "val/a"):
        (tmp_path / name).mkdir(parents=True)
    assert split_folder(tmp_path, "test") == tmp_path / "val"
    assert class_names(split_folder(tmp_path, "train")) == ["a", "b"]


def test_digits_by_split():
    spec = describe_data("digits")
    train, test = load_split(spec, "train"), load_split(spec, "test")
    assert (len(train), len(test)) == (1347, 450)
    image, label = train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and label == 0
    with pytest.raises(UserError, match="unknown split 'val'"):
        load_split(spec, "val")


def test_large_images_are_read_when_they_are_needed(folder):
    data = load_split(describe_data(folder, "resnet18"), "test")
    images(folder)[0].unlink()  # memory would still have it
    with pytest.raises(UserError, match="No such file"):
        data[0]
    assert data[1][0].shape == (3, 224, 224) and data[1][0].dtype == torch.uint8


def test_a_truncated_jpeg_is_named(folder):
    bad = images(folder)[1]
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    bad.write_bytes(whole.getvalue()[: whole.getbuffer().nbytes // 2])
    with pytest.raises(UserError, match=rf"{bad.name} is not a usable image: .*truncated"):
        load(folder)


@pytest.mark.parametrize("kind", ["I;16", "F"])
def test_pixels_of_more_than_8_bits_are_refused(folder, kind):
    """Pillow would make all of them white."""
    (bad := images(folder)[0]).unlink()
    pixels = np.linspace(0, 60_000, 32 * 32).reshape(32, 32)
    Image.fromarray(pixels.astype(np.uint16 if kind == "I;16" else np.float32)).save(bad.with_suffix(".tiff"))
    with pytest.raises(UserError, match=r"0.tiff is not a usable image: .*more than 8 bits a channel \(mode"):
        load(folder)


def test_splits_with_other_classes_are_refused(folder):
    """Each split numbers its folders: label 0 would be one class in training and another in the test."""
    other = sorted(Path(folder.removeprefix("folder:"), "train").iterdir())[0]
    other.rename(other.with_name("zebra"))
    with pytest.raises(UserError, match="train must hold 2 class folders, those of .*test; it holds 2"):
        load_split(describe_data(folder, "resnet20_cifar10"), "train")
    load(folder)  # a test split alone is enough to quantize


def test_labels_are_those_of_the_network(folder):
    spec = describe_data(folder, "resnet20_cifar10").model_copy(update={"classes": 3})
    with pytest.raises(UserError, match="must hold 3 class folders, .* it holds 2"):
        load_split(spec, "test")


def test_normalized_by_hand():
    spec = DataSpec(name="any", classes=2, image_size=4, mean=(0.5, 0, 0.25), std=(0.5, 1, 0.25))
    black, white = pixel_bounds(spec)
    assert black.flatten().tolist() == [-1, 0, -1] and white.flatten().tolist() == [1, 1, 3]
    data = [(torch.full((3, 4, 4), level, dtype=torch.uint8), level) for level in (0, 255, 0)]
    found = list(batches(data, spec, batch_size=2))
    assert [labels.tolist() for _, labels in found] == [[0, 255], [0]]
    assert torch.equal(found[0][0][1], white.expand(1, 3, 4, 4)[0])
    assert normalize(data[0][0][None], spec).dtype == torch.float32


@pytest.mark.parametrize("image", [torch.rand(3, 8, 8), np.zeros((3, 8, 8))])
def test_images_that_are_no_bytes_are_refused(image):
    """As v2.ToTensor makes them: divided by 255 once more, all would be black."""
    with pytest.raises(UserError, match=r"must be uint8 \(0 to 255\), as load_split gives, got torch.float"):
        next(batches([(image, 0)], describe_data("digits")))
