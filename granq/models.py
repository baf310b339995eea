"""Teachers by name: networks of pytorchcv, torchvision, timm or a file of yours; pretrained, read, or trained here."""

import inspect
import pickle
import re
import runpy
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from granq.data import PREPARATION, DataSpec, ImageData, batches, load_split, normalize, predictions
from granq.errors import UserError, one_of, require
from granq.files import read_checkpoint, read_tensors, save_atomically, write_tensors
from granq.hooks import Batch, eval_mode, images_of, labels_of

#: Under which training scripts keep weights. Of a network and its moving average the network is taken.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema")


def build_network(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """Return a network in eval mode, with random weights unless ``pretrained``; such a one keeps its own classes.

    ``name`` is one of pytorchcv or torchvision (``torchvision:resnet18`` where both have it), ``timm:resnet18``, or
    ``FILE.py:FUNCTION``, called with ``num_classes=classes``, or with ``classes``, or without, whichever it takes; the
    file may import its neighbours. Raises UserError if nobody knows the name.
    """
    from pytorchcv.model_provider import _models, get_model
    from torchvision import models as torchvision  # takes a second

    source, _, own = name.rpartition(":")
    head: dict[str, Any] = {} if pretrained else {"num_classes": classes}
    if source.endswith(".py"):
        if not isinstance(made := _from_file(Path(source).expanduser(), own, classes), nn.Module):
            raise UserError(f"{name} returns a {type(made).__name__}, no network")
        return made.eval()
    if name in _models:
        try:
            return get_model(name, pretrained=pretrained, **head).eval()
        except AssertionError:  # pytorchcv's CIFAR networks take 10 or 100 classes only
            model = get_model(name)
            model.output = nn.Linear(model.output.in_features, classes)
            return model.eval()
    if source == "timm":
        require("timm", "timm")
        import timm

        if timm.is_model(own):
            return timm.create_model(own, pretrained=pretrained, **head).eval()
    if source in ("", "torchvision") and own in torchvision.list_models():
        if not pretrained and "weights_backbone" in inspect.signature(torchvision.get_model_builder(own)).parameters:
            head["weights_backbone"] = None  # by default those of segmentation and detection are downloaded
        if own in ("googlenet", "inception_v3"):  # as for its published weights, whose state dict does not say so
            head |= {"transform_input": True, "aux_logits": True, "init_weights": False}
        return torchvision.get_model(own, weights="DEFAULT" if pretrained else None, **head).eval()
    known = "resnet20_cifar10, resnet18, mobilenetv2_w1, torchvision:resnet18, timm:resnet18, FILE.py:FUNCTION"
    raise UserError(f"unknown network {name!r}; known are the names of pytorchcv and torchvision, such as {known}")


def _from_file(path: Path, function: str, classes: int) -> Any:
    if not path.is_file():
        raise UserError(f"file {str(path)!r} of network {function} does not exist")
    sys.path.insert(0, folder := str(path.parent.resolve()))
    try:
        found = runpy.run_path(str(path), run_name=f"network of {path}")
        one_of(f"function of {path}", function, [name for name, value in found.items() if callable(value)])
        parameters = dict(inspect.signature(make := found[function]).parameters)
        given = {"num_classes": classes} if parameters.pop("num_classes", None) else {}
        needed = [p.name for p in parameters.values() if p.kind < p.VAR_POSITIONAL and p.default is p.empty]
        if len(needed) + len(given) > 1:
            raise UserError(f"{function} of {path} also needs {', '.join(needed)}: name a function that does not")
        return make(*[classes] * len(needed), **given)
    finally:
        sys.path.remove(folder)


def save_teacher(path: Path, model: nn.Module, network: str, spec: DataSpec, top1: float) -> None:
    """Write a teacher as safetensors with its provenance (network, data, normalization, accuracy) in the header."""
    info = {"network": network, "top1": top1, "torch": torch.__version__, **spec.facts()}
    write_tensors(path, model.state_dict(), info)


def load_teacher(
    network: str, spec: DataSpec, path: str | Path | None = None, device: str = "cpu"
) -> tuple[nn.Module, DataSpec]:
    """Return a teacher in eval mode, and ``spec`` with the image size, normalization and classes that belong to it.

    ``path`` is a safetensors file or ``torch.save`` of a state dict, alone or under one of ``WRAPPERS``; ``None``
    downloads pretrained weights, but digits have ``digits_teacher``. Mean and deviation are the user's own, if given;
    else those in the file; else those in ``spec``. Raises UserError if the file does not fit.
    """
    if path is None and ".py:" in network:
        raise UserError(f"{network} names no pretrained weights: pass a teacher file")
    path = digits_teacher() if path is None and spec.name == "digits" else path
    state, known = ({}, {}) if path is None else _read_teacher(Path(path))
    if spec.has_imagenet_ids() and any(isinstance(v, Tensor) and v.shape[:1] == (1000,) for v in state.values()):
        spec = spec.fit_classes(1000)
    model = build_network(network, spec.classes, pretrained=path is None)
    own = model.state_dict()
    try:
        model.load_state_dict(own if path is None else _renamed(state, own, path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:250]
        said = f"{network} with {spec.classes} classes, as many as {spec.name} has"
        raise UserError(f"{path} holds no weights of {said}: {reason}") from error
    if ".py:" in network and spec.name != "digits" and not (known or spec.given):
        warnings.warn(f"nothing says how {network} wants its images normalized: give mean and std", stacklevel=2)
    facts = ("image_size", *PREPARATION, *(() if spec.given else ("mean", "std")))
    spec = DataSpec(**dict(spec) | {key: known[key] for key in facts if key in known})
    spec.check_labels(known["labels"] if "labels" in known else ())  # headers of other programs may be lists
    spec = spec.fit_classes(count_classes(model, network, torch.zeros(1, 3, spec.image_size, spec.image_size)))
    return model.to(device), spec


def run_once(model: nn.Module, network: str, images: Tensor) -> Any:
    """Return the output in eval mode. Raises UserError if a network takes no images of this size."""
    try:
        with torch.no_grad(), eval_mode(model):
            return model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{network} takes no RGB images of {images.shape[-1]} pixels: {said}") from error


def faster_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return channels_last, unless a network takes images (N, 3, H, W) in torch's default only: ``x.view(n, -1)``."""
    try:
        run_once(model, "the network", images[:1].contiguous(memory_format=torch.channels_last))
    except UserError:
        return torch.contiguous_format
    return torch.channels_last


def count_classes(model: nn.Module, network: str, images: Tensor) -> int:
    """Return how many logits a network gives. Raises UserError unless they are finite (N, two classes or more)."""
    logits = run_once(model, network, images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2 or not logits.isfinite().all():
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        shown = f"(N, two classes or more), but {given} for {tuple(images.shape)}"
        raise UserError(f"{network} gives no finite logits {shown}")
    return logits.shape[1]


def _read_teacher(path: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return the weights in a file, and what ``save_teacher`` wrote of them."""
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:250] or type(error).__name__
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"only code can read its {refused[1]}; if you trust the author, save the state dict alone"
        raise UserError(f"{path} holds no weights: {reason}") from error
    while isinstance(state, dict) and (inner := [state[k] for k in WRAPPERS if isinstance(state.get(k), dict)]):
        state = inner[0]
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no weights: it is a {type(state).__name__}, not a state dict")
    return state, {}


def _renamed(state: dict[Any, Any], own: Any, path: Any) -> dict[str, Any]:
    """Return weights under the names of a network's ``own``, without the counter of ``AveragedModel``."""
    names = {name: _own_name(name, own) for name in state if name != "n_averaged"}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UserError(f"{path} holds two networks: {twice[0]} is in it more than once; save one of them alone")
    renamed: Any = OrderedDict((own_name, state[name]) for name, own_name in names.items())
    # MNASNet asks of which version it is; norms must not, as old files lack their counters
    renamed._metadata = {"": own._metadata[""]}
    return renamed


def _own_name(name: Any, own: Container[str]) -> str:
    """Return a name without what DataParallel, torch.compile and others put in front, unless it is one of ``own``."""
    rest = re.sub(r"^(module|model|net)\.|_orig_mod\.", "", str(name), count=1)
    return name if name in own or rest == name else _own_name(rest, own)


def top1_on(model: nn.Module, dataset: ImageData, spec: DataSpec) -> float:
    """Return the top-1 accuracy in percent over a dataset of uint8 images, in eval mode, on the model's device."""
    hits = right(model, batches(dataset, spec), total=-(-len(dataset) // 250))
    return 100 * int(hits.sum()) / len(hits)


@torch.inference_mode()
def right(model: nn.Module, pairs: Iterable[Batch], total: int | None = None) -> np.ndarray:
    """Return for every image of ``pairs`` (images, labels) whether it is classified rightly, in eval mode."""
    hits, layout = list[Tensor](), None
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    with eval_mode(model), parametrize.cached():  # weights are quantized once, not once a batch
        for batch in tqdm(pairs, "accuracy", total, unit="batch", leave=False, delay=2):
            images, labels = images_of(batch).to(device), labels_of(batch)
            if labels is None:
                raise UserError("an accuracy needs labels: batches must be pairs (images, labels)")
            layout = layout or faster_layout(model, images)
            hits.append(predictions(model(images.contiguous(memory_format=layout))).cpu() == labels.cpu())
    if not hits:
        raise UserError("there is no image to measure: batches is empty")
    return torch.cat(hits).numpy()


def augment(images: Tensor, flip: bool = True) -> Tensor:
    """Shift each uint8 image (N, 3, H, W) by up to 4 pixels, reflected at the border, and mirror half of them."""
    n, _, h, w = images.shape
    padded = F.pad(images.float(), (4,) * 4, mode="reflect")
    dy, dx = (torch.randint(0, 9, (n, 1), device=images.device) for _ in range(2))
    rows, cols = torch.arange(h, device=images.device) + dy, torch.arange(w, device=images.device).expand(n, -1)
    if flip:
        cols = torch.where(torch.rand(n, 1, device=images.device) < 0.5, cols.flip(1), cols)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, :, rows[:, :, None], (cols + dx)[:, None]].permute(0, 3, 1, 2)


@torch.random.fork_rng()  # the first use of a teacher that is kept must not differ from later ones
def train_teacher(
    network: str, spec: DataSpec, *, epochs: int, lr: float = 0.2, batch_size: int = 128, seed: int = 0,
    flip: bool = True, device: str = "cpu", bf16: bool = False, checkpoint: Path | None = None,
) -> tuple[nn.Module, float]:  # fmt: skip
    """Train a teacher: SGD with Nesterov, OneCycle up to ``lr``, label smoothing, shifts and flips, averaged weights.

    Returns it in eval mode, and its top-1 accuracy in percent on the test split, measured once. ``checkpoint`` is a
    file that every epoch replaces; where there is one, training goes on from it, on the CPU to the same bits. Raises
    UserError if it is of other settings, FloatingPointError if a weight becomes NaN or infinite.
    """
    settings = dict(network=network, data=spec.name, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, bf16=bf16)
    flip &= spec.name != "digits"  # a mirrored 2 is no 2
    settings |= {"flip": flip} | spec.model_dump(include={"image_size", "mean", "std"})
    torch.manual_seed(seed)
    model = build_network(network, spec.classes)
    image = torch.zeros(1, 3, spec.image_size, spec.image_size)
    spec.fit_classes(count_classes(model, network, image))
    layout = faster_layout(model, image)
    train: Any = load_split(spec, "train")
    loader = DataLoader(train, batch_size=batch_size, shuffle=True, drop_last=len(train) > batch_size)
    model = model.to(device).to(memory_format=layout).train()
    averaged = AveragedModel(model, avg_fn=_moving_average, use_buffers=True)
    weights, others = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True), epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.25)
    parts: dict[str, Any] = dict(model=model, averaged=averaged, optimizer=optimizer, schedule=schedule)
    begun = _continue(checkpoint, settings, parts, device) if checkpoint and checkpoint.is_file() else 0
    said = f"teacher {network}" + f", continued from {checkpoint}" * (begun > 0)
    for epoch in tqdm(range(begun, epochs), said, epochs, False, unit="epoch", initial=begun):
        for images, labels in loader:
            images = normalize(augment(images.to(device), flip), spec)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                logits = model(images.contiguous(memory_format=layout))
            logits = logits if isinstance(logits, Tensor) else logits[0]  # GoogLeNet has more, while it is trained
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
        if not all(value.isfinite().all() for value in averaged.state_dict().values()):
            raise FloatingPointError(f"a weight is not finite: the learning rate {lr} is too high")
        if checkpoint:
            now = {name: part.state_dict() for name, part in parts.items()}
            now |= {"settings": settings, "epoch": epoch + 1, "rng": torch.get_rng_state()}
            save_atomically(checkpoint, partial(torch.save, now))
    teacher = averaged.module.eval()
    return teacher, top1_on(teacher, load_split(spec, "test"), spec)


def _continue(checkpoint: Path, settings: dict[str, Any], parts: dict[str, Any], device: str) -> int:
    """Load what ``train_teacher`` saved, and return how many epochs it has."""
    saved = read_checkpoint(checkpoint, device)
    if saved.get("settings") != settings:
        raise UserError(f"{checkpoint} is of another training, {saved.get('settings')}: delete it, or train as it says")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"].cpu())
    return saved["epoch"]


def _moving_average(average: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
    """Average exponentially; the memory grows from 10 steps to 100, so that short trainings are not held back."""
    decay = min(0.99, (1 + int(count)) / (10 + int(count)))
    return average.lerp(value, 1 - decay) if average.is_floating_point() else value  # num_batches_tracked is whole


def digits_teacher() -> Path:
    """Return the file of a teacher of the digits, a ``resnet20_cifar10`` that comes with the package."""
    return Path(__file__).with_name("teachers") / "digits_resnet20.safetensors"
