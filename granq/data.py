"""Datasets by name: digits (embedded), cifar10, cifar100, imagenet, and ``folder:PATH`` with train/ and test/ or val/.

Images leave this module normalized, float32, (N, 3, size, size). Small images are kept in memory as uint8.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from granq.checks import check_image_size, one_of, typed

CIFAR_STATS = (
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),
)  # what pytorchcv's CIFAR networks were trained with
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ("digits", "cifar10", "cifar100", "imagenet", "folder:PATH")
_IN_MEMORY_SIZE = 64  # pixels; larger images are streamed from disk
_MAX_PIXELS = 50_000_000  # of one image file: a few kB of PNG can claim more than fits into memory


@runtime_checkable
class ImageData(Protocol):
    """A sized dataset of (uint8 image (3, size, size), label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class DataSpec:
    """What must be known about a dataset before a single image is read."""

    name: str
    classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    root: str = ""


def data_root() -> Path:
    """Where downloads go: ``$GRANQ_DATA`` or ``~/.cache/granq``."""
    return Path(os.environ.get("GRANQ_DATA", "~/.cache/granq")).expanduser()


def describe_data(name: str, network: str = "", image_size: int | None = None) -> DataSpec:
    """Describe dataset ``name`` without reading any image.

    A folder has no known normalization: networks named ``*_cifar10`` or ``*_cifar100`` take CIFAR's at 32 pixels,
    all others ImageNet's at 224. A teacher file written by ``granq teacher`` overrides both (models.load_teacher).

    Raises:
        ValueError: unknown name, a folder without test images, or ``image_size`` no multiple of 4.
    """
    if image_size is not None:
        check_image_size(image_size)
    if name == "digits":
        spec = DataSpec(name, 10, 32, (0.3053,) * 3, (0.3760,) * 3)  # of the 8x8 originals, 16 grey levels
    elif name in ("cifar10", "cifar100"):
        spec = DataSpec(name, 10 if name == "cifar10" else 100, 32, *CIFAR_STATS, root=str(data_root()))
    elif name == "imagenet":
        spec = DataSpec(name, 1000, 224, *IMAGENET_STATS, root=str(data_root() / "imagenet"))
    elif name.startswith("folder:"):
        root = Path(name.removeprefix("folder:")).expanduser()
        if not root.is_dir():
            raise ValueError(f"folder {str(root)!r} does not exist; it should hold train/ and test/ (or val/)")
        classes = len(class_names(split_folder(root, "test")))
        if not classes:
            raise ValueError(f"folder {str(root)!r} has no class folders in its test split")
        small = "cifar" in network or "svhn" in network
        spec = DataSpec(
            name, classes, 32 if small else 224, *(CIFAR_STATS if small else IMAGENET_STATS), root=str(root)
        )
    else:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(NAMES)}")
    return replace(spec, image_size=image_size) if image_size else spec


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split below ``root``. Raises ValueError if there is none."""
    for name in ("train",) if split == "train" else ("test", "val"):
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"{str(root)!r} has no {'train/' if split == 'train' else 'test/ or val/'} folder of class folders"
    )


def class_names(folder: Path) -> list[str]:
    """Names of the class folders, in the order of their labels."""
    return sorted(d.name for d in folder.iterdir() if d.is_dir())


@typed
def load_split(spec: DataSpec, split: str) -> ImageData:
    """Dataset of (uint8 image (3, size, size), label) for ``split`` 'train' or 'test'; downloads where it can."""
    one_of("split", split, ("train", "test"))
    if spec.name == "digits":
        return _digits(split, spec.image_size)
    from torchvision import datasets
    from torchvision.transforms import v2

    small = spec.image_size <= _IN_MEMORY_SIZE
    resize = v2.Resize((spec.image_size,) * 2) if small else v2.Resize(round(spec.image_size * 256 / 224))
    transform = v2.Compose([resize, v2.CenterCrop(spec.image_size), v2.PILToTensor()])
    if spec.name in ("cifar10", "cifar100"):
        cls = datasets.CIFAR10 if spec.name == "cifar10" else datasets.CIFAR100
        data: ImageData = cls(spec.root, train=split == "train", transform=transform, download=True)
    else:
        folder = split_folder(Path(spec.root), split)
        if split == "train":  # each split numbers its own folders
            train, test = (class_names(f) for f in (folder, split_folder(Path(spec.root), "test")))
            if train != test:
                odd = sorted(set(train) ^ set(test))[0]
                raise ValueError(
                    f"{spec.root!r} has a class folder {odd!r} in one split only, so labels would not match"
                )
        _refuse_links(folder)
        if (count := len(class_names(folder))) != spec.classes:  # labels are numbers of folders
            raise ValueError(f"{folder} has {count} class folders, not the {spec.classes} of {spec.name}")
        data = datasets.ImageFolder(str(folder), transform=transform, loader=_open_image)
    if not small:
        return data
    images, labels = zip(*DataLoader(cast(Any, data), batch_size=500), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def _refuse_links(folder: Path) -> None:
    """Raise ValueError for links below ``folder`` that lead out of it, or to folders; it may be a link itself."""
    inside = folder.resolve()
    for found, folders, files in os.walk(inside):
        for path in (Path(found, name) for name in (*folders, *files)):
            if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(inside)):
                raise ValueError(f"{path} is a link to {path.resolve()}; a dataset holds its images itself: copy them")


def _open_image(path: str) -> Any:
    """A file as an RGB image; raises ValueError that names the file."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(path) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, more than {_MAX_PIXELS:,}")
                if image.mode[0] in "IF":  # Pillow would cut them off at 255
                    raise ValueError(f"its pixels have more than 8 bits a channel (mode {image.mode}): convert it")
                return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a usable image: {error}") from error


def _digits(split: str, size: int) -> TensorDataset:
    """scikit-learn's 1,797 digits; the first 1,347 train, the last 450 test (no writer in both), enlarged."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16 * 255  # (N, 1, 8, 8)
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1)
    part = slice(None, 1347) if split == "train" else slice(1347, None)
    return TensorDataset(images[part].contiguous(), torch.from_numpy(digits.target)[part])


def normalize(images: Tensor, spec: DataSpec) -> Tensor:
    """uint8 (N, 3, H, W) -> float32, standardized by the dataset's mean and standard deviation."""
    mean = torch.tensor(spec.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255 - mean) / std


@typed
def pixel_bounds(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """What ``normalize`` makes of black and of white: lowest and highest value of each channel, both (1, 3, 1, 1)."""
    black, white = (normalize(torch.full((1, 3, 1, 1), level), spec) for level in (0, 255))
    return black, white


def batches(dataset: ImageData, spec: DataSpec, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized (images, labels) in the stored order. Raises TypeError unless they are (uint8 image, label)."""
    fits = isinstance(dataset, Dataset | Sequence) and not isinstance(dataset, str | bytes)
    first = dataset[0] if fits and len(dataset) else (None, None)
    if not fits or not isinstance(first, tuple) or len(first) != 2:
        raise TypeError(f"dataset must hold (image, label) pairs, as load_split gives, got {type(dataset).__name__}")
    kind = str(getattr(first[0], "dtype", type(first[0]).__name__)).removeprefix("torch.")
    if kind != "uint8":  # floats from 0 to 1 would be divided by 255 once more
        raise TypeError(f"images must be uint8 (0 to 255), as load_split gives, got {kind}; PILToTensor makes them")
    for images, labels in DataLoader(cast(Any, dataset), batch_size=batch_size):
        yield normalize(images, spec), labels
