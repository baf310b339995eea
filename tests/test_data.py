"""Datasets: what is described, read and refused; a file that is wrong is named."""

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError

from granq.data import (
    IMAGENET_IDS,
    DataSpec,
    batches,
    class_names,
    describe_data,
    load_split,
    normalize,
    pixel_bounds,
    split_folder,
)
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
        "crop_pct": 0.875, "squash": False, "interpolation": "bilinear", "labels": (), "given": False,
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


@pytest.mark.parametrize(("network", "size"), [
    ("torchvision:resnet50", 224), ("torchvision:efficientnet_b1", 240), ("timm:tf_efficientnet_lite4", 380),
    ("timm:resnet50", 224), ("timm:tf_efficientnetv2_b3", 240), ("inceptionv3", 296), ("resnet50", 224),
])  # fmt: skip
def test_images_are_prepared_as_the_published_weights_want_them(folder, network, size):
    """By its publisher's own transform; InceptionV3's 299 pixels are no multiple of 4."""
    path = images(folder)[0]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), "uint8")).resize((650, 450)).save(path)
    spec, own = describe_data(folder, network), network.rpartition(":")[2]
    assert spec.image_size == size
    mine = normalize(load_split(spec, "test")[0][0], spec)[0]
    if network.startswith("timm:"):
        theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model(own)))
    elif network.startswith("torchvision:"):
        theirs = torchvision.models.get_model_weights(own).DEFAULT.transforms()
    else:  # those of pytorchcv are ImageNet's
        theirs = torchvision.transforms._presets.ImageClassification(crop_size=size, resize_size=round(size / 0.875))
    assert (mine - theirs(Image.open(path))).abs().max() < 0.02  # 8 bits
    assert describe_data(folder, network, 64).image_size == 64
    assert describe_data(folder, network, mean=(0.1,) * 3, std=(0.2,) * 3).mean == (0.1,) * 3


def test_a_run_keeps_the_crop_of_its_images(folder):
    """Of the day on which it was made; what a network's publisher says today may be something else."""
    prepared = {"crop_pct": 0.5, "squash": True, "interpolation": "bicubic"}
    old = describe_data(folder, "resnet18").model_copy(update=prepared)
    new = describe_data(folder, "timm:resnet18").prepared_as(old)
    assert (new.model_dump(include={*prepared}), new.classes) == (prepared, 2)


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
    with pytest.raises(UserError, match="train must hold 2 class folders, those of the test split"):
        load_split(describe_data(folder, "resnet20_cifar10"), "train")
    load(folder)  # a test split alone is enough to quantize


def test_labels_are_those_of_the_network(folder):
    spec = describe_data(folder, "resnet20_cifar10").model_copy(update={"classes": 3})
    with pytest.raises(UserError, match="must hold 3 class folders"):
        load_split(spec, "test")


def test_batches_are_shuffled_by_a_seed(folder):
    """In a folder images lie class by class."""
    spec = describe_data(folder)
    test = load_split(spec, "test")
    stored, one, other = (
        torch.cat([labels for _, labels in batches(test, spec, 2, seed)]).tolist() for seed in (None, 0, 1)
    )
    assert stored == sorted(stored) and sorted(one) == sorted(other) == stored and stored != one != other
    images = torch.cat([images for images, _ in batches(test, spec, 2, seed=0)])
    again = torch.cat([images for images, _ in batches(test, spec, 2, seed=0)])
    assert torch.equal(images, again)


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


# ---- facts on the way in

TENCH, RETRIEVER, TISSUE = "n01440764", "n02099601", "n15075141"  # classes 0, 207 and 999 of ImageNet


def picture(path: Path, size: tuple[int, int] = (32, 32), level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)


@pytest.fixture
def some_of_imagenet(tmp_path, monkeypatch) -> Path:
    """Three of 1,000 classes, each image as bright as its class says, and no train split."""
    monkeypatch.setenv("GRANQ_DATA", str(tmp_path))
    for level, name in ((50, TISSUE), (10, TENCH), (30, RETRIEVER)):
        picture(tmp_path / "imagenet/val" / name / "a.png", level=level)
    return tmp_path / "imagenet"


def labels_by_level(spec: DataSpec, split: str = "test") -> dict[int, int]:
    return {int(image.float().mean()): int(label) for image, label in load_split(spec, split)}


def test_labels_of_a_part_of_imagenet_are_those_of_the_whole(some_of_imagenet):
    wanted = {10: 0, 30: 207, 50: 999}
    spec = describe_data("imagenet", image_size=32)
    assert spec.classes == 1000 and labels_by_level(spec) == wanted
    small = describe_data(f"folder:{some_of_imagenet}", "resnet18", 32)
    assert small.classes == 3 and labels_by_level(small) == {10: 0, 30: 1, 50: 2}  # for a network of three classes
    whole = small.fit_classes(1000)
    assert labels_by_level(whole) == wanted and whole.label_names()[207] == RETRIEVER
    with pytest.raises(UserError, match="weights tell 4 classes apart, but .* has 3"):
        small.fit_classes(4)
    with pytest.raises(UserError, match="no folder train"):
        load_split(whole, "train")
    (some_of_imagenet / "val/tench").mkdir()
    with pytest.raises(UserError, match="must hold 1000 class folders, .*WordNet ids"):
        load_split(spec, "test")
    with pytest.raises(UserError, match="tell 1000 classes apart"):  # another data set, which has folders like these
        describe_data(f"folder:{some_of_imagenet}", "resnet18", 32).fit_classes(1000)


def test_the_list_of_imagenet_s_classes():
    assert len({*IMAGENET_IDS}) == 1000 and sorted(IMAGENET_IDS) == IMAGENET_IDS
    assert [IMAGENET_IDS.index(name) for name in (TENCH, RETRIEVER, TISSUE)] == [0, 207, 999]


def test_what_is_hidden_is_no_class_and_no_image(tmp_path):
    """Jupyter's and macOS' leftovers, next to the classes and inside of them, also below a hidden folder."""
    root = tmp_path / ".cache/data"
    for level, name in ((10, "cat/a.png"), (30, "dog/a.png"), (30, "dog/more/b.png")):
        picture(root / "test" / name, level=level)
    for name in (".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a-checkpoint.png"):
        picture(root / "test" / name, level=99)
    (root / "test/dog/._a.png").write_text("no image")
    spec = describe_data(f"folder:{root}", "resnet20_cifar10")
    assert spec.classes == 2 and len(load_split(spec, "test")) == 3 and labels_by_level(spec) == {10: 0, 30: 1}


def test_a_train_split_without_some_classes_is_labelled_like_the_test(tmp_path):
    for split, names in {"test": "abc", "train": "ac"}.items():
        for name in names:
            picture(tmp_path / split / name / "0.png", level=ord(name))
    spec = describe_data(f"folder:{tmp_path}", "resnet20_cifar10")
    assert labels_by_level(spec, "train") == {ord("a"): 0, ord("c"): 2}


@pytest.mark.parametrize(
    ("size", "wanted"), [((32, 32), 32), ((30, 30), 28), ((65, 65), 64), ((232, 232), 224), ((320, 400), 224)]
)
def test_images_of_a_network_of_ones_own_say_their_size(tmp_path, size, wanted):
    folder, network = f"folder:{tmp_path}", "somewhere/cifar/net.py:make"
    for name in "ab":
        picture(tmp_path / "test" / name / "0.png", size)
    spec = describe_data(folder, network)
    picture(tmp_path / "test/b/1.png", (48, 40))
    assert describe_data(folder, network).image_size == 224  # of two sizes none is taken
    assert (spec.image_size, spec.mean) == (wanted, describe_data("imagenet").mean)  # the path is not the network
    assert describe_data(folder, network, 16).image_size == 16 and describe_data(folder, "resnet18").image_size == 224


def test_small_images_that_are_no_squares_are_told(tmp_path):
    for name in "ab":
        picture(tmp_path / "test" / name / "0.gif", (64, 48))
    with pytest.warns(UserWarning, match="images of 64x48 pixels, which are prepared as 224x224: give an image_size"):
        assert describe_data(f"folder:{tmp_path}", "net.py:make").image_size == 224
    spec = describe_data(f"folder:{tmp_path}", "net.py:make", 48)
    assert len(load_split(spec, "test")) == 2


def test_the_user_s_mean_and_deviation(folder):
    spec = describe_data(folder, "resnet18", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 1))
    assert (spec.mean, spec.std, spec.given) == ((0.1, 0.2, 0.3), (0.4, 0.5, 1.0), True)
    for mean, std, said in (
        ((0.5,) * 3, None, "go together"), ((0.5,), (0.5,), "Field required"), ((0.5,) * 3, (0.5, 0.5, 0), "than 0"),
        ((123.7, 116.3, 103.5), (0.5,) * 3, "less than or equal to 1"), ((0.5,) * 3, (58.4,) * 3, "than or equal to 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            describe_data("digits", mean=mean, std=std)


@pytest.mark.parametrize(("size", "shown"), [(227, 224), (300, 224 / 256 * 300)])
def test_an_image_that_was_shrunk_already_is_only_cropped(tmp_path, size, shown):
    """A ramp from left to right: how much of it the crop shows says how the image was resized."""
    pixels = np.tile(np.linspace(0, 255, size).astype(np.uint8)[None, :, None], (size, 1, 3))
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    image, _ = load_split(describe_data(f"folder:{tmp_path}"), "test")[0]
    assert image.shape == (3, 224, 224)
    assert float(image[0, 0, -1]) - float(image[0, 0, 0]) == pytest.approx(255 * shown / size, abs=3)


def test_a_class_without_images_is_told(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test/cat/1.png")
    with pytest.raises(UserError, match="needs a folder with images for each class: .*dog"):
        load_split(describe_data(f"folder:{tmp_path}", "cifar"), "test")
