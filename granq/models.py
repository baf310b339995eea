"""Teachers by name: networks of pytorchcv, torchvision, timm or a file of yours; pretrained, read, or trained here."""

import importlib.util
import inspect
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from granq.data import DataSpec, ImageData, batches, load_split, normalize
from granq.devices import expect_bfloat16
from granq.errors import UserError, one_of, require
from granq.hooks import eval_mode


def build_network(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """Return a network in eval mode, with random weights unless ``pretrained``; such a one keeps its own classes.

    ``name`` is one of pytorchcv or torchvision (``torchvision:resnet18`` where both have it), ``timm:resnet18``, or
    ``FILE.py:FUNCTION``, called with ``num_classes=classes``, or with ``classes``, or without, whichever it takes.
    Raises UserError if nobody knows the name.
    """
    from pytorchcv.model_provider import _models, get_model
    from torchvision import models as torchvision  # takes a second

    source, _, own = name.rpartition(":")
    head: dict[str, Any] = {} if pretrained else {"num_classes": classes}
    if source.endswith(".py"):
        return _from_file(Path(source).expanduser(), own, classes).eval()
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

        return timm.create_model(own, pretrained=pretrained, **head).eval()
    if source in ("", "torchvision") and own in torchvision.list_models():
        if not pretrained and "weights_backbone" in inspect.signature(torchvision.get_model_builder(own)).parameters:
            head["weights_backbone"] = None  # by default those of segmentation and detection are downloaded
        return torchvision.get_model(own, weights="DEFAULT" if pretrained else None, **head).eval()
    known = "resnet20_cifar10, resnet18, mobilenetv2_w1, torchvision:resnet18, timm:resnet18, FILE.py:FUNCTION"
    raise UserError(f"unknown network {name!r}; known are the names of pytorchcv and torchvision, such as {known}")


def _from_file(path: Path, function: str, classes: int) -> nn.Module:
    if not path.is_file():
        raise UserError(f"file {str(path)!r} of network {function} does not exist")
    spec = cast(Any, importlib.util.spec_from_file_location(f"network of {path}", path))
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    one_of(f"function of {path}", function, [name for name, value in vars(module).items() if callable(value)])
    parameters = inspect.signature(make := getattr(module, function)).parameters
    if "num_classes" in parameters:
        return make(num_classes=classes)
    needed = [p for p in parameters.values() if p.kind < p.VAR_POSITIONAL and p.default is p.empty]
    return make(classes) if len(needed) == 1 else make()


def save_teacher(path: Path, model: nn.Module, network: str, spec: DataSpec, top1: float) -> None:
    """Write a teacher as safetensors with its provenance (network, data, normalization, accuracy) in the header."""
    # where a folder lay on this machine is nobody's business
    facts = spec.model_dump(exclude={"root"}) | {"name": spec.name.split(":")[0]}
    info = {"network": network, "top1": top1, "torch": torch.__version__, **facts}
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}  # tied ones, apart
    save_file(state, str(path), metadata={"granq": json.dumps(info)})


def load_teacher(
    network: str, spec: DataSpec, path: str | Path | None = None, device: str = "cpu"
) -> tuple[nn.Module, DataSpec]:
    """Return a teacher in eval mode, and ``spec`` with the image size and normalization that belong to it.

    ``path`` is a safetensors file or ``torch.save`` of a state dict; ``None`` downloads pretrained weights. Raises
    UserError if it is missing or damaged, or is of another network or number of classes.
    """
    if path is None and ".py:" in network:
        raise UserError(f"{network} names no pretrained weights: pass a teacher file")
    model = build_network(network, spec.classes, pretrained=path is None)
    known = getattr(model, "pretrained_cfg", {})  # timm's; all others saw what spec says
    try:
        if path is not None:
            state, known = _read_teacher(Path(path))
            model.load_state_dict(state)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:250]
        raise UserError(f"{path} holds no weights of {network} with {spec.classes} classes: {reason}") from error
    spec = DataSpec(**dict(spec) | {key: known[key] for key in ("image_size", "mean", "std") if key in known})
    with torch.no_grad():
        classes = model(torch.zeros(1, 3, spec.image_size, spec.image_size)).shape[1]
    if classes != spec.classes:
        raise UserError(f"the weights of {network} tell {classes} classes apart, but {spec.name} has {spec.classes}")
    return model.to(device), spec


def _read_teacher(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    info: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        with safe_open(str(path), "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            info = json.loads((file.metadata() or {}).get("granq", "{}"))
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
    # what DataParallel and torch.compile put in front of names
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}, info


@torch.inference_mode()
def top1_on(model: nn.Module, dataset: ImageData, spec: DataSpec, device: str = "cpu") -> float:
    """Return the top-1 accuracy in percent over a dataset of uint8 images, in eval mode."""
    right = total = 0
    with eval_mode(model), parametrize.cached():  # weights are quantized once, not once a batch
        for images, labels in batches(dataset, spec):
            right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100 * right / max(total, 1)


def augment(images: Tensor, flip: bool = True) -> Tensor:
    """Shift each uint8 image (N, 3, H, W) by up to 4 pixels, reflected at the border, and mirror half of them."""
    n, _, h, w = images.shape
    padding = min(4, h - 1, w - 1)  # a border cannot reflect more than there is
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect")
    dy, dx = (torch.randint(0, 2 * padding + 1, (n, 1), device=images.device) for _ in range(2))
    rows, cols = torch.arange(h, device=images.device) + dy, torch.arange(w, device=images.device).expand(n, -1)
    if flip:
        cols = torch.where(torch.rand(n, 1, device=images.device) < 0.5, cols.flip(1), cols)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, :, rows[:, :, None], (cols + dx)[:, None]].permute(0, 3, 1, 2)


def train_teacher(
    network: str,
    spec: DataSpec,
    *,
    epochs: int,
    lr: float = 0.2,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool = False,
    init: Path | None = None,
) -> tuple[nn.Module, float]:
    """Train a teacher: SGD with Nesterov, OneCycle up to ``lr``, label smoothing, shifts and flips, averaged weights.

    Returns it in eval mode, and its top-1 accuracy in percent on the test split, measured once. ``seed`` decides the
    initial weights (unless ``init`` is a teacher file to start from), the order and the shifts. ``bf16`` is autocast,
    about 1.9 times faster on a CPU with AVX512-BF16. Raises FloatingPointError if a weight becomes NaN or infinite.
    """
    if bf16:
        expect_bfloat16(device)
    torch.manual_seed(seed)
    model = load_teacher(network, spec, init)[0] if init else build_network(network, spec.classes)
    train = load_split(spec, "train")
    loader = DataLoader(cast(Any, train), batch_size=batch_size, shuffle=True, drop_last=len(train) > batch_size)
    parts = _training(model.to(device), lr, epochs * len(loader))
    for _ in tqdm(range(epochs), desc=f"teacher {network}", unit="epoch", leave=False):
        for images, labels in loader:
            _step(parts, images.to(device), labels.to(device), spec, bf16)
        if not all(value.isfinite().all() for value in parts["averaged"].state_dict().values()):
            raise FloatingPointError(f"a weight is not finite: the learning rate {lr} is too high")
    teacher = parts["averaged"].module.eval()
    return teacher, top1_on(teacher, load_split(spec, "test"), spec, device)


def _training(model: nn.Module, lr: float, steps: int) -> dict[str, Any]:
    """Return what changes while a teacher is trained."""
    model = model.to(memory_format=torch.channels_last).train()
    decay, plain = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decay, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    rise = 0.25 if steps != 4 else 0.5  # of four steps a quarter is one, and OneCycleLR divides by one less
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise)
    averaged = AveragedModel(model, avg_fn=_moving_average, use_buffers=True)
    return {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}


def _moving_average(average: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
    """Average exponentially; the memory grows from 10 steps to 100, so that short trainings are not held back."""
    decay = min(0.99, (1 + int(count)) / (10 + int(count)))
    return average.lerp(value, 1 - decay) if average.is_floating_point() else value  # num_batches_tracked is whole


def _step(parts: dict[str, Any], images: Tensor, labels: Tensor, spec: DataSpec, bf16: bool) -> None:
    images = normalize(augment(images, flip=spec.name != "digits"), spec)  # a flipped 2 is no 2
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = parts["model"](images.to(memory_format=torch.channels_last))
    logits = logits if isinstance(logits, Tensor) else logits[0]  # GoogLeNet has more, while it is trained
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    parts["optimizer"].zero_grad()
    loss.backward()
    parts["optimizer"].step()
    parts["schedule"].step()
    parts["averaged"].update_parameters(parts["model"])


def digits_teacher() -> Path:
    """Return the file of a teacher of the digits, a ``resnet20_cifar10`` that comes with the package."""
    return Path(__file__).with_name("teachers") / "digits_resnet20.safetensors"
