"""Datasets by name: digits (embedded), cifar10, cifar100, imagenet, and ``folder:PATH`` with train/ and test/ or val/.

Images leave this module normalized, float32, (N, 3, size, size). Up to 64 pixels they are kept in memory as uint8.
A class is a folder; what is hidden (``.ipynb_checkpoints``) is none. A train split may be absent.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from granq.errors import UserError, one_of, require

_IMAGENET: dict[str, Any] = {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CIFAR: dict[str, Any] = {"image_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_DIGITS: dict[str, Any] = {"image_size": 32, "mean": (0.3053,) * 3, "std": (0.3760,) * 3}  # of the 8x8 originals
_KNOWN = {"digits": (10, _DIGITS), "cifar10": (10, _CIFAR), "cifar100": (100, _CIFAR), "imagenet": (1000, _IMAGENET)}
#: WordNet ids of ImageNet's classes, which name their folders, in the order of their labels
IMAGENET_IDS = Path(__file__).with_name("imagenet_ids.txt").read_text().split()
Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]
PREPARATION = ("crop_pct", "squash", "interpolation")  #: of images, besides size and normalization
ImageData = Any  #: a dataset of (uint8 image (3, size, size), label), with a length


class DataSpec(BaseModel, frozen=True, extra="forbid"):
    """What must be known about a dataset before its images are read. Pixels go from 0 to 1."""

    name: str
    classes: int = Field(ge=2)
    image_size: int = Field(ge=4, multiple_of=4)
    mean: tuple[Share, Share, Share]
    std: tuple[Deviation, Deviation, Deviation]
    crop_pct: float = Field(0.875, gt=0)  #: share of the short side that the square from the middle has
    squash: bool = False  #: both sides are resized, so that an image loses its proportions
    interpolation: str = "bilinear"
    root: str = ""
    labels: tuple[str, ...] = ()  #: names of the class folders, unless ImageNet's ids
    given: bool = False  #: mean and std are the user's own: no teacher file changes them

    def facts(self) -> dict[str, Any]:
        """Return what a file says of its images: not where a folder lay, which is nobody's business."""
        return self.model_dump(mode="json", exclude={"root", "given"}) | {"name": self.name.split(":")[0]}

    def prepared_as(self, old: "DataSpec") -> "DataSpec":
        """Return these data with the classes and the preparation of a run's; a warning tells of other folders."""
        self.check_labels(old.labels)
        return self.fit_classes(old.classes).model_copy(update=old.model_dump(include={*PREPARATION}))

    def check_labels(self, learned: Sequence[str]) -> None:
        """Warn if the class folders are called otherwise than those that a network learned."""
        if learned and self.labels and [*learned] != [*self.labels]:
            said = f"{', '.join(learned[:10])}; here they are {', '.join(self.labels[:10])}"
            warnings.warn(f"the network learned other classes, or in another order: {said}", stacklevel=3)

    def fit_classes(self, classes: int) -> "DataSpec":
        """Return what a network of so many classes sees: 1,000 in a folder with a part of ImageNet, else its own."""
        if classes != self.classes and not (classes == len(IMAGENET_IDS) and self.has_imagenet_ids()):
            raise UserError(f"the network's weights tell {classes} classes apart, but {self.name} has {self.classes}")
        return self.model_copy(update={"classes": classes})

    def has_imagenet_ids(self) -> bool:
        """Say whether these are class folders that are all named as ImageNet's."""
        return self.name.startswith("folder:") and {*class_names(split_folder(self.root, "test"))} <= {*IMAGENET_IDS}

    def label_names(self) -> list[str]:
        """Return the names of class folders by label, of a part of ImageNet those of all 1,000; else the numbers."""
        if not self.name.startswith(("folder:", "imagenet")):
            return [str(label) for label in range(self.classes)]
        whole = self.name == "imagenet" or (self.classes == len(IMAGENET_IDS) and self.has_imagenet_ids())
        return IMAGENET_IDS if whole else class_names(split_folder(self.root, "test"))


def data_root() -> Path:
    """Return the folder of downloads: ``$GRANQ_DATA`` or ``~/.cache/granq``."""
    return Path(os.environ.get("GRANQ_DATA", "~/.cache/granq")).expanduser()


def dataset_name(name: str) -> str:
    """Return the last part of ``folder:/some/where``: the rest means nothing to a reader."""
    return Path(name.removeprefix("folder:")).expanduser().resolve().name if name.startswith("folder:") else name


def describe_data(
    name: str, network: str = "", image_size: int | None = None, *, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> DataSpec:  # fmt: skip
    """Describe a dataset. Raises UserError for an unknown name, or a folder without a test split.

    ``mean`` and ``std`` of the three channels, from 0 to 1, are those that the teacher was trained with. Without them a
    teacher file brings its own (``models.load_teacher``); else those of the data are taken. ImageNet and folders have
    what was published with the ``network`` (``published_images``), but a folder whose network is named like CIFAR's or
    SVHN's is as CIFAR. For a network ``FILE.py:FUNCTION`` the size is that of the first image and the last, if they are
    squares of at most 224 pixels, else 224.
    """
    if (mean is None) != (std is None):
        raise UserError("mean and std go together: give both or none of them")
    labels: tuple[str, ...] = ()
    if name.startswith("folder:"):
        root = str(Path(name.removeprefix("folder:")).expanduser())
        names = class_names(test := split_folder(root, "test"))
        labels = () if {*names} <= {*IMAGENET_IDS} else tuple(names)
        function = network.rpartition(":")[2]  # a file's path says nothing of images
        classes, facts = len(names), _CIFAR if "cifar" in function or "svhn" in function else _IMAGENET
        if ".py:" in network and image_size is None:
            (w, h), last = (_open_image(_read_folder(test, names).samples[i][0]).size for i in (0, -1))
            image_size = w - w % 4 if (w, h) == last and 4 <= w == h <= 224 else 224
            if (w, h) == last and w != h and max(w, h) <= 224:
                said = f"{name} has images of {w}x{h} pixels, which are prepared as 224x224"
                warnings.warn(f"{said}: give an image_size", stacklevel=2)
    else:
        one_of("dataset", name, [*_KNOWN, "folder:PATH"])
        root = {"digits": "", "imagenet": str(data_root() / name)}.get(name, str(data_root()))
        classes, facts = _KNOWN[name]
    if facts is _IMAGENET:
        facts = facts | published_images(network)
    facts = facts | {"name": name, "classes": classes, "root": root, "given": mean is not None, "labels": labels}
    own = {"image_size": image_size, "mean": mean, "std": std}
    return DataSpec(**facts | {key: value for key, value in own.items() if value is not None})


@cache
def published_images(network: str) -> dict[str, Any]:
    """Return how the images of a network's published weights are prepared; nothing of a network in a file.

    Source: ``in_size`` in pytorchcv, transforms of the default weights in torchvision, ``pretrained_cfg`` in timm.
    Sizes are rounded down to a multiple of 4, as the generators need it: InceptionV3 has 296 pixels, not 299.
    """
    source, _, own = network.rpartition(":")
    found: dict[str, Any] = {}
    if source == "timm":
        require("timm", "timm")
        import timm

        if known := timm.get_pretrained_cfg(own, allow_unregistered=True):
            cfg = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
            found = {key: cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")}
            found |= {"image_size": cfg["input_size"][-1], "squash": cfg["crop_mode"] == "squash"}
    elif network and source in ("", "torchvision"):
        from pytorchcv.model_provider import _models, get_model
        from torchvision import models as torchvision  # takes a second

        if network in _models:
            with torch.device("meta"):
                found = {"image_size": get_model(network).in_size[0]}
        elif own in torchvision.list_models(torchvision):
            to_image: Any = torchvision.get_model_weights(own).DEFAULT.transforms()
            found = {"mean": to_image.mean, "std": to_image.std, "interpolation": to_image.interpolation.value}
            found |= {"image_size": to_image.crop_size[0], "crop_pct": to_image.crop_size[0] / to_image.resize_size[0]}
    return found | ({"image_size": found["image_size"] // 4 * 4} if found else {})


def split_folder(root: str | Path, split: str) -> Path:
    """Return the folder of split ``train`` or ``test`` (test/ or val/). Raises UserError if there is none."""
    names = ["train"] if split == "train" else ["test", "val"]
    if found := [folder for name in names if (folder := Path(root, name)).is_dir()]:
        return found[0]
    raise UserError(f"{root} does not exist or has no folder {' or '.join(names)} with a folder for each class")


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, in the order of their labels."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_folder(folder: Path, names: list[str], transform: Any = None) -> Any:
    """Return the images of class folders, labelled by their places in ``names``; nothing that is hidden."""
    from torchvision.datasets import ImageFolder  # takes a second
    from torchvision.datasets.folder import IMG_EXTENSIONS

    class Folder(ImageFolder):
        def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
            return names, {name: names.index(name) for name in class_names(folder)}

    def shown(path: str) -> bool:
        known = (*IMG_EXTENSIONS, ".gif", ".avif")
        return path.lower().endswith(known) and f"{os.sep}." not in path.removeprefix(str(folder))

    try:
        return Folder(str(folder), transform, loader=_open_image, is_valid_file=shown)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder} needs a folder with images for each class: {error}") from error


def load_split(spec: DataSpec, split: str) -> ImageData:
    """Return split ``train`` or ``test`` as pairs (uint8 image (3, size, size), label); download what can be."""
    one_of("split", split, ("train", "test"))
    if spec.name == "digits":
        return _digits(split, spec.image_size)
    from torchvision import datasets  # takes a second
    from torchvision.transforms import v2

    small = spec.image_size <= 64
    side, squash = spec.image_size if small else int(spec.image_size / spec.crop_pct + 1e-6), small or spec.squash
    resize = v2.Resize([side] * (1 + squash), v2.InterpolationMode(spec.interpolation))

    def shrink(image: Image.Image) -> Image.Image:  # what somebody shrank already is not enlarged again
        return image if not squash and spec.image_size <= min(image.size) <= side else resize(image)

    transform = v2.Compose([shrink, v2.CenterCrop(spec.image_size), v2.PILToTensor()])
    if spec.name in ("cifar10", "cifar100"):
        cifar = getattr(datasets, spec.name.upper())
        try:
            data: Any = cifar(spec.root, train=split == "train", transform=transform, download=True)
        except OSError as error:
            said = f"{spec.name} is not in {spec.root} and could not be downloaded ({error})"
            raise OSError(f"{said}; folder:PATH takes images that are here") from error
    else:
        folder, names = split_folder(spec.root, split), spec.label_names()
        if len(names) != spec.classes or not {*class_names(folder)} <= {*names}:  # labels would mean other classes
            raise UserError(f"{folder} must hold {spec.classes} class folders, those of the test split or WordNet ids")
        data = _read_folder(folder, names, transform)
    if not small:
        return data
    images, labels = zip(*DataLoader(data, batch_size=500), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def _open_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would cut them off at 255
                raise OSError(f"its pixels have more than 8 bits a channel (mode {image.mode})")
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a usable image: {error}") from error


def _digits(split: str, size: int) -> TensorDataset:
    """scikit-learn's 1,797 digits; the first 1,347 train, the last 450 test (no writer in both), enlarged."""
    from sklearn.datasets import load_digits

    part = slice(None, 1347) if split == "train" else slice(1347, None)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16 * 255  # (N, 1, 8, 8)
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1)
    return TensorDataset(images[part].contiguous(), torch.from_numpy(digits.target)[part])


def normalize(images: Tensor, spec: DataSpec) -> Tensor:
    """Standardize uint8 images (N, 3, H, W) by the dataset's mean and standard deviation, in float32."""
    mean, std = (torch.tensor(value, device=images.device).view(1, -1, 1, 1) for value in (spec.mean, spec.std))
    return (images.float() / 255 - mean) / std


def pixel_bounds(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Return what ``normalize`` makes of black and of white, both (1, 3, 1, 1)."""
    black, white = normalize(torch.tensor([0, 255]).view(2, 1, 1, 1), spec).split(1)
    return black, white


def predictions(logits: Tensor) -> Tensor:
    """Return the class of every image, (N,). Raises UserError unless ``logits`` are numbers, (N, at least two)."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2 or logits.isnan().any():
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"a prediction needs logits (N, two classes or more) that are numbers, got {given}")
    return logits.argmax(1)


def batches(
    dataset: ImageData, spec: DataSpec, batch_size: int = 250, seed: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalized (images, labels) in the stored order, a folder's class by class, or shuffled by ``seed``.

    Raises UserError unless images are uint8.
    """
    random = None if seed is None else torch.Generator().manual_seed(seed)
    for images, labels in DataLoader(dataset, batch_size=batch_size, shuffle=seed is not None, generator=random):
        if images.dtype != torch.uint8:  # floats from 0 to 1 would be divided by 255 once more
            raise UserError(f"images must be uint8 (0 to 255), as load_split gives, got {images.dtype}")
        yield normalize(images, spec), labels
