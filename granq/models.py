"""Teachers by name: pytorchcv and torchvision networks, pretrained, from a checkpoint file, or trained here."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from granq.checks import expect_bfloat16, forward, typed
from granq.data import DataSpec, ImageData, batches, data_root, describe_data, load_split, normalize
from granq.files import read_checkpoint, save_atomically, write_checkpoint


def build_network(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """Network ``name`` of pytorchcv or torchvision with ``classes`` outputs, in eval mode.

    Raises:
        ValueError: neither library knows the name.
        OSError: ``pretrained`` weights cannot be downloaded.
    """
    from pytorchcv.model_provider import _models as pytorchcv_models
    from pytorchcv.model_provider import get_model
    from torchvision.models import get_model as torchvision_model
    from torchvision.models import list_models

    if name in pytorchcv_models:
        if pretrained:
            return get_model(name, pretrained=True).eval()
        try:
            return get_model(name, num_classes=classes).eval()
        except AssertionError:  # pytorchcv's CIFAR networks take 10 or 100 classes only
            model = get_model(name)
            model.output = nn.Linear(model.output.in_features, classes)
            return model.eval()
    if (ours := name.removeprefix("torchvision:")) in list_models():
        options = {"weights": "DEFAULT"} if pretrained else {"num_classes": classes}
        return torchvision_model(ours, **options).eval()
    if name.startswith("timm:"):
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"{name} needs the package timm: pip install timm") from error
        if name.removeprefix("timm:") in timm.list_models():
            head: Any = {} if pretrained else {"num_classes": classes}  # pretrained, others would be drawn at random
            return timm.create_model(name.removeprefix("timm:"), pretrained=pretrained, **head).eval()
    raise ValueError(
        f"unknown network {name!r}; known are pytorchcv's and torchvision's names, such as resnet20_cifar10, "
        "resnet20_cifar100, resnet18, resnet50, mobilenetv2_w1; torchvision:resnet18 where both have one; timm:resnet18"
    )


def save_teacher(path: Path, model: nn.Module, network: str, spec: DataSpec, top1: float) -> None:
    """Write a teacher as safetensors with its provenance (network, data, normalization, accuracy) in the header."""
    from safetensors.torch import save_file

    # where a folder lay on this machine is nobody's business
    facts = asdict(spec) | {"name": spec.name.split(":")[0]}
    del facts["root"]
    info = {"network": network, "top1": top1, "torch": torch.__version__, **facts}
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}  # tied ones, apart
    save_file(state, str(path), metadata={"granq": json.dumps(info)})


def load_teacher(
    network: str, spec: DataSpec, path: str | Path | None = None, device: str = "cpu"
) -> tuple[nn.Module, DataSpec]:
    """A teacher in eval mode, and the data specification with the normalization that belongs to it.

    Args:
        network: name in pytorchcv or torchvision.
        spec: the data it will see.
        path: checkpoint, safetensors or ``torch.save`` of a state dict; ``None`` downloads pretrained weights.
        device: where to put it.

    Raises:
        ValueError: the file is missing or corrupt, or file or download are of another network or number of classes.
    """
    if path is None:
        try:
            model = build_network(network, spec.classes, pretrained=True)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot download weights of {network}: {error}; pass a checkpoint file") from error
        if known := getattr(model, "pretrained_cfg", None):  # timm's; all others are trained on what spec says
            spec = replace(spec, mean=tuple(known["mean"]), std=tuple(known["std"]))
        classes = forward(model, torch.zeros(1, 3, spec.image_size, spec.image_size)).shape[1]
        if classes != spec.classes:
            raise ValueError(
                f"the weights of {network} tell {classes} classes apart, but {spec.name} has {spec.classes}"
            )
        return model.to(device), spec
    model = build_network(network, spec.classes)
    state, info = _read_checkpoint(Path(path))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit {network} with {spec.classes} classes: {reason[:200]}") from error
    if info:
        spec = replace(spec, image_size=info["image_size"], mean=tuple(info["mean"]), std=tuple(info["std"]))
    return model.to(device), spec


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        raise ValueError(f"teacher file {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                info = json.loads((file.metadata() or {}).get("granq", "{}"))
        else:
            state, info = torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # every reader has its own exceptions; the user needs one sentence
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"teacher file {str(path)!r} is not a readable checkpoint: {first}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"teacher file {str(path)!r} holds no state dict (parameter names with tensors)")
    known = isinstance(info, dict) and {"image_size", "mean", "std"} <= info.keys()
    # what DataParallel and torch.compile put in front of names
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}, info if known else {}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` is in eval mode; every module then gets back the mode it had."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.inference_mode()
@typed
def top1_on(model: nn.Module, dataset: ImageData, spec: DataSpec, device: str = "cpu") -> float:
    """Top-1 accuracy in percent over a dataset of uint8 images, in eval mode."""
    right = total = 0
    with eval_mode(model), parametrize.cached():  # weights are quantized once, not once a batch
        for images, labels in batches(dataset, spec):
            images = images.to(device)
            right += int((model(images).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100 * right / max(total, 1)


def augment(images: Tensor, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crop from a reflected border, and a random horizontal flip, both drawn per image. uint8 (N, 3, H, W)."""
    n, _, h, w = images.shape
    padding = min(padding, h - 1, w - 1)  # a border cannot reflect more than there is
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect")
    dy, dx = (torch.randint(0, 2 * padding + 1, (n, 1), device=images.device) for _ in range(2))
    rows = (torch.arange(h, device=images.device) + dy)[:, None, :, None].expand(-1, 3, -1, padded.shape[3])
    padded = padded.gather(2, rows)
    cols = torch.arange(w, device=images.device).expand(n, -1)
    if flip:
        cols = torch.where(torch.rand(n, 1, device=images.device) < 0.5, cols.flip(1), cols)
    return padded.gather(3, (cols + dx)[:, None, None, :].expand(-1, 3, h, -1))


def _moving_average(average: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
    """Exponential moving average whose memory grows from 10 steps to 100, so that short trainings are not held back."""
    decay = min(0.99, (1 + int(count)) / (10 + int(count)))
    # Integer buffers (num_batches_tracked) are not averaged.
    return average.lerp(value, 1 - decay) if average.is_floating_point() else value


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
    checkpoint: Path | None = None,
) -> tuple[nn.Module, float]:
    """Train a full-precision teacher: SGD with Nesterov, OneCycle, label smoothing, crops and flips, averaged weights.

    Args:
        network: name in pytorchcv or torchvision.
        spec: the data; its train split trains, its test split is measured once, at the end.
        epochs: passes over the train split.
        lr: peak of the OneCycle schedule.
        batch_size: images per step.
        seed: of the initial weights, the order and the augmentation.
        device: cpu, cuda or mps.
        bf16: forward under bfloat16 autocast: about 1.9 times faster on a CPU with AVX512-BF16; weights stay float32.
        init: teacher file whose weights training starts from; ``None`` starts from random weights.
        checkpoint: file rewritten after every epoch; if it is there already, training continues from it, and ends on
            the CPU bit for bit where an uninterrupted one ends.

    Returns:
        The exponential moving average (0.99 per step) of the weights in eval mode, and its top-1 accuracy on the test
        split in percent. No epoch is selected by its accuracy.

    Raises:
        ValueError: ``lr`` is not above 0, the network cannot take images of this size, or ``checkpoint`` is damaged or
            of another training.
        FloatingPointError: the weights became NaN or infinite; the checkpoint of the epoch before stays.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0 and finite, got {lr}")
    if bf16:
        expect_bfloat16(device)
    torch.manual_seed(seed)
    model = load_teacher(network, spec, init)[0] if init else build_network(network, spec.classes)
    forward(model, torch.zeros(1, 3, spec.image_size, spec.image_size))  # told before any image is read
    model = model.to(device).to(memory_format=torch.channels_last).train()
    averaged = AveragedModel(model, avg_fn=_moving_average, use_buffers=True)
    train = load_split(spec, "train")
    loader: DataLoader[Any] = DataLoader(
        cast(Any, train), batch_size=batch_size, shuffle=True, drop_last=len(train) > batch_size
    )
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        momentum=0.9,
        nesterov=True,
    )
    total = epochs * len(loader)
    rise = 0.25 if total != 4 else 0.5  # of four steps a quarter is one, and OneCycleLR divides by one less
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=rise)
    parts: dict[str, Any] = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    settings = repr((network, spec, epochs, lr, batch_size, seed, bf16, init))
    first = 0
    if checkpoint and checkpoint.is_file():
        try:
            state = read_checkpoint(checkpoint, {*parts, "settings", "rng", "epoch"}, device)
            if state["settings"] != settings:
                raise ValueError("it belongs to a training with other settings")
        except ValueError as error:
            raise ValueError(f"cannot continue from {checkpoint}: {error}; remove it to start again") from error
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"].cpu())
        first = state["epoch"]
    progress = tqdm(range(first, epochs), desc=f"teacher {network}", unit="epoch", initial=first, total=epochs)
    for epoch in progress:
        for images, labels in loader:
            # Digits are not mirrored: a flipped 2 is no 2.
            images = normalize(augment(images.to(device), flip=spec.name != "digits"), spec)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                logits = model(images.to(memory_format=torch.channels_last))
            logits = logits if isinstance(logits, Tensor) else logits[0]  # GoogLeNet has more, while it is trained
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
        if not all(value.isfinite().all() for value in averaged.state_dict().values()):
            raise FloatingPointError(f"a weight is not finite in epoch {epoch + 1}: the learning rate {lr} is too high")
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if checkpoint:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"settings": settings, "epoch": epoch + 1, "rng": torch.get_rng_state()}
            write_checkpoint(checkpoint, state)
    teacher = averaged.module.eval()
    return teacher, top1_on(teacher, load_split(spec, "test"), spec, device)


def digits_teacher(network: str = "resnet20_cifar10") -> Path:
    """File of a teacher of the digits, trained at first use (about 25 s on two cores) and kept under ``data_root()``.

    Args:
        network: name in pytorchcv or torchvision.
    """
    path = data_root() / f"digits-{network.replace(':', '-')}-epochs12-batch64-seed0.safetensors"
    if not path.is_file():
        spec = describe_data("digits", network)
        model, top1 = train_teacher(network, spec, epochs=12, batch_size=64)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, lambda temporary: save_teacher(temporary, model, network, spec, top1))
    return path
