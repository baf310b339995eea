"""Timings: alternating, warmed up, with spread; ratios within one run. Milliseconds of a shared machine mean little."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

from granq import losses, qat, scaling
from granq.analysis import layer_calls, measure_layer_error
from granq.checks import has_bfloat16, typed
from granq.config import QATConfig
from granq.convert import LAYERS, ActQuantizer, WeightQuantizer, quantize_model
from granq.generator import LATENT, Generator, batchnorm_inputs, batchnorm_loss, synthesize, upsample_conv_plain
from granq.models import build_network
from granq.quantizer import ANY_THREADS, choose_qparams, compile_quantizer, fake_quantize
from granq.runs import versions

#: Activations of ResNet-20 at batch 200 and of ResNet-50 at batch 16, and two tensors over 50 MB.
SHAPES = (
    (200, 16, 32, 32), (200, 32, 16, 16), (200, 64, 8, 8), (16, 64, 56, 56), (16, 512, 7, 7),
    (200, 64, 32, 32), (16, 256, 56, 56),
)  # fmt: skip

UNCACHED = 50e6  # bytes that no cache holds: nothing is left there by a run before


class _TextbookRound(torch.autograd.Function):
    """Rounding with the straight-through gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def textbook_chain(x: Tensor, bits: int) -> Tensor:
    """The baseline: the per-sample-channel formula written out, every operation a pass over memory and a graph node."""
    rows = x.reshape(x.shape[0] * x.shape[1] if x.dim() == 4 else len(x), -1)
    low, high = rows.min(1, keepdim=True).values.detach(), rows.max(1, keepdim=True).values.detach()
    scale_inv = (2**bits - 1) / (high - low).clamp_min(1e-8)
    zero_point = torch.round(scale_inv * low) + 2 ** (bits - 1)
    codes = _TextbookRound.apply(scale_inv * rows - zero_point)
    return ((codes + zero_point) / scale_inv).view_as(x)


def channel_loop(x: Tensor, bits: int) -> Tensor:
    """One call per channel, as conventional per-channel quantization does; (N, 1, H, W) slices, joined again."""
    parts = [fake_quantize(x[:, c : c + 1], bits, "per_sample_channel", clamp=False) for c in range(x.shape[1])]
    return torch.cat(parts, 1)


class PlainGenerator(Generator):
    """The generator as it is written down: nearest x2, then a convolution, in PyTorch's default layout."""

    upsample = staticmethod(upsample_conv_plain)

    def _grid(self, latent: Tensor) -> Tensor:
        return self.linear(latent).view(-1, 128, self.size, self.size)


def plain_batchnorm_loss(inputs: list[tuple[nn.BatchNorm2d, Tensor]]) -> Tensor:
    """``batchnorm_loss`` as it is written down: mean and variance of torch, and the gradient autograd finds."""
    terms = [
        F.mse_loss(x.mean((0, 2, 3)), norm.running_mean) + F.mse_loss(x.var((0, 2, 3), correction=0), norm.running_var)
        for norm, x in inputs
        if norm.running_mean is not None and norm.running_var is not None
    ]
    return torch.stack(terms).mean()


class PlainTrainer(qat.Trainer):
    """The baseline of a training step: ``release`` as it is commonly written.

    Default layout, the textbook quantizer, one student forward for each of the two losses, and ``backward`` that also
    fills the gradients of teacher and student which the generator's step then throws away.
    """

    def __init__(self, teacher: nn.Module, config: QATConfig) -> None:
        super().__init__(teacher, config)
        self.teacher.requires_grad_(True)
        self.generator = PlainGenerator(self.generator.classes, config.image_size).to(self.device)
        self.optimizers["generator"] = torch.optim.Adam(self.generator.parameters(), config.generator_lr)
        for module in self.student.modules():
            if isinstance(module, ActQuantizer | WeightQuantizer):
                module.forward = partial(textbook_chain, bits=module.bits)  # type: ignore[method-assign]

    def step(self, train_student: bool) -> dict[str, Tensor]:
        c = self.config
        images, labels = synthesize(self.generator, c.batch_size, self.device)
        with batchnorm_inputs(self.teacher) as norms:
            t = self.teacher(images)
        s = self.student(images)
        loss = c.alpha_ds * losses.disagreement_loss(t, s, labels) + c.alpha_as * losses.agreement_loss(t, s, labels)
        loss = loss + losses.margin_loss(t, s, c.lambda_l, c.lambda_u) + c.gamma * plain_batchnorm_loss(norms)
        self._descend("generator", loss)
        loss_s = losses.student_loss(t.detach(), self.student(images.detach()), c.temperature)
        self._descend("student", loss_s)
        return {"generator_loss": loss.detach(), "student_loss": loss_s.detach()}

    def _descend(self, name: str, loss: Tensor) -> None:
        for network in (self.teacher, self.student, self.generator):
            network.zero_grad()
        loss.backward()
        self.optimizers[name].step()


def release(x: Tensor, bits: int) -> Tensor:
    """The library's vectorized quantizer, as scheme ``release`` uses it."""
    return fake_quantize(x, bits, "per_sample_channel", clamp=False)


def under_compile(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the library's quantizer under ``torch.compile``."""

    def compiled(*args: Any) -> Any:
        before = compile_quantizer()
        try:
            return run(*args)
        finally:
            compile_quantizer(before)

    return compiled


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "layerwise": lambda x, bits: fake_quantize(x, bits, "per_tensor", clamp=False),
    "channel loop": channel_loop,
    "textbook": textbook_chain,
    "release": release,
    "release, compiled": under_compile(release),
    "release, NHWC": release,
    "release, compiled, NHWC": under_compile(release),
    "copy": lambda x, bits: x.clone(),
}


@typed
def measure_latency_quantizer(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    bits: int = 3,
    *,
    repetitions: int = 30,
    device: str = "cpu",
) -> pd.DataFrame:
    """Time of fake quantization per method and activation shape, float32, forward and backward.

    Every repetition runs each method once, in turn, so that a disturbance meets all of them.

    Returns:
        Columns method, shape, bytes, bits, repetitions, median_ms, q25_ms, q75_ms, ratio_to_textbook and
        ratio_to_copy (medians of the ratios within one repetition, with their quartiles ``..._q25`` and ``..._q75``),
        threads, torch, device. ``release`` is the library's vectorized quantizer, ``copy`` the floor: ``x.clone()``.
        Methods that end in ``NHWC`` get the tensor in that layout (channels_last), all others as (N, C, H, W).
    """
    rows = []
    for shape in tqdm(shapes, desc="quantizer", unit="shape"):
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(shape, generator=generator, device=device)
        layouts = {False: x, True: x.contiguous(memory_format=torch.channels_last)}
        inputs = {nhwc: (x.requires_grad_(), torch.ones_like(x)) for nhwc, x in layouts.items()}

        def once(method: Callable[[Tensor, int], Tensor], x: Tensor, gradient: Tensor) -> None:
            torch.autograd.grad(method(x, bits), x, gradient)

        runs = {name: partial(once, method, *inputs[name.endswith("NHWC")]) for name, method in METHODS.items()}
        times = _alternate(runs, repetitions, warm=2 if _bytes(x) < UNCACHED else 0)
        for name in METHODS:
            row: dict[str, object] = {"method": name, "shape": str(shape), "bytes": _bytes(x), "bits": bits}
            row |= _quartiles(times[name])
            for ratio in ("ratio_to_textbook", "ratio_to_copy"):
                reference = times[ratio.removeprefix("ratio_to_")]
                row |= _quartiles(times[name] / reference, (ratio, f"{ratio}_q25", f"{ratio}_q75"))
            rows.append(row)
    return _table(rows, repetitions, device)


@typed
def measure_latency_scaling(
    channels: Sequence[int] = (8, 16, 32, 64, 128),
    batches: Sequence[int] = (1, 4, 16, 64),
    *,
    fixed: tuple[int, int] = (32, 16),
    size: int = 16,
    bits: int = 3,
    repetitions: int = 30,
    device: str = "cpu",
) -> pd.DataFrame:
    """Time, memory and counts of the executions of one quantized 3x3 convolution, from integers to the float output.

    Input and output have the same channels, and padding keeps the ``size`` x ``size`` pixels. Executions take turns in
    every repetition. Scales: one in all (layer-wise), static for each channel (folded), for each channel of each image
    (the others); finding them is not timed. Sums are int32 on the CPU, whose integer convolutions PyTorch does not
    optimize: ``layer-wise, float32`` holds the same exact integers as floats. Elsewhere all sums are float32.

    Args:
        channels: measured at the fixed batch.
        batches: measured at the fixed channels.
        fixed: (channels, batch).
        size: height and width.
        bits: of input and weight.
        repetitions: of each execution.
        device: cpu or cuda.

    Returns:
        Columns execution, channels, batch, size, bits, median_ms, q25_ms, q75_ms, peak_mb (10^6 bytes that PyTorch
        allocates at most beyond the operands), scale_multiplications, bytes (of ``count_scaling``), repetitions,
        threads, torch, device.
    """
    integer = torch.int32 if device == "cpu" else torch.float32
    shapes = list(dict.fromkeys([(c, fixed[1]) for c in channels] + [(fixed[0], n) for n in batches]))
    rows = []
    for c, n in tqdm(shapes, desc="scaling", unit="shape"):
        rng = torch.Generator(device).manual_seed(0)
        x = torch.randn(n, c, size, size, generator=rng, device=device).relu()
        kernels = torch.randn(c, c, 3, 3, generator=rng, device=device)
        one, static, own = (
            scaling.to_integers(x, choose_qparams(x, bits, granularity), bits)
            for granularity in ("per_tensor", "per_channel", "per_sample_channel")
        )
        weight = scaling.to_integers(kernels, choose_qparams(kernels, bits, "per_out_channel"), bits)
        conv = scaling.Conv(padding=(1, 1))
        dense, folded = weight.dequantize(), scaling.fold(weight, static.scale_inv, conv)
        runs = {
            "layer-wise": partial(scaling.layerwise, one, weight, conv, integer),
            "layer-wise, float32": partial(scaling.layerwise, one, weight, conv, torch.float32),
            "accumulation-time, loop": partial(scaling.accumulation_time, own, weight, conv, False, integer),
            "accumulation-time, grouped": partial(scaling.accumulation_time, own, weight, conv, True, integer),
            "pre-scaled": partial(scaling.prescaled, own, dense, conv),
            "folded": partial(scaling.folded, static, folded, conv),
        }
        times = _alternate(runs, repetitions)
        counts = scaling.count_scaling(tuple(x.shape), tuple(weight.values.shape), conv).set_index("execution")
        for name, run in runs.items():
            values: dict[str, Any] = dict(execution=name, channels=c, batch=n, size=size, bits=bits)
            values |= _quartiles(times[name]) | {"peak_mb": _peak_mb(run, device)}
            count = counts.loc[name.removesuffix(", float32")]
            rows.append(values | dict(scale_multiplications=count.scale_multiplications, bytes=count.bytes))
    return _table(rows, repetitions, device)


def measure_latency_step(
    teacher: nn.Module | None = None,
    batches: Sequence[int] = (64, 200),
    *,
    image_size: int = 32,
    repetitions: int = 30,
    device: str = "cpu",
    compiled: bool = True,
) -> pd.DataFrame:
    """One training step (generator and student, scheme ``release``) beside the plain step, taking turns.

    Args:
        teacher: ResNet-20 for CIFAR-10 with random weights by default; times do not depend on them.
        batches: images per step.
        image_size: of the generated images.
        repetitions: of each step.
        device: cpu or cuda.
        compiled: also with ``compile_quantizer``, and with it and ``QATConfig(bf16=True)``.

    Returns:
        Columns method (plain; granq; granq bf16 where the device has it; the latter compiled), batch, bits, image_size,
        median_ms, q25_ms, q75_ms, speedup (plain over this, median of the ratios within a repetition) with quartiles,
        repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    teacher = teacher or build_network("resnet20_cifar10", 10)
    rows = []
    for batch in tqdm(batches, desc="step", unit="batch size"):
        config = QATConfig(batch_size=batch, image_size=image_size, device=device)
        trainers = {"plain": PlainTrainer(teacher, config), "granq": qat.Trainer(teacher, config)}
        if has_bfloat16(device):
            trainers["granq bf16"] = qat.Trainer(teacher, replace(config, bf16=True))
        runs: dict[str, Callable[[], object]] = {name: partial(t.step, True) for name, t in trainers.items()}
        if compiled:
            runs |= {f"{name} compiled": under_compile(runs[name]) for name in [*runs][1:]}
        times = _alternate(runs, repetitions, warm=0)
        for name in times:
            row: dict[str, object] = {"method": name, "batch": batch, "bits": config.act_bits, "image_size": image_size}
            speedup = _quartiles(times.plain / times[name], ("speedup", "q25_speedup", "q75_speedup"))
            rows.append(row | _quartiles(times[name]) | speedup)
    return _table(rows, repetitions, device)


def measure_latency_evaluation(*, repetitions: int = 30, device: str = "cpu") -> pd.DataFrame:
    """Forward of a quantized network beside the full-precision one, both as they are and under ``torch.compile``.

    ResNet-20 for CIFAR-10 with random weights, scheme ``release``, 3 bits, 250 images. The student's weights are
    quantized once, before the clock starts, as they are while accuracy is measured.

    Returns:
        Columns method (full precision, quantized; each also compiled), batch, scheme, bits, median_ms, q25_ms, q75_ms,
        ratio_to_full_precision (of the same kind, median within repetitions), repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    scheme, bits, model = "release", 3, build_network("resnet20_cifar10", 10).to(device)
    student = quantize_model(model, scheme, bits, bits)
    images = torch.randn(250, 3, 32, 32, device=device)
    for layer in [m for m in student.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    networks: dict[str, Any] = {"full precision": model, "quantized": student}
    networks |= {f"{name}, compiled": torch.compile(network, options=ANY_THREADS) for name, network in networks.items()}

    @torch.inference_mode()
    def run(network: Callable[[Tensor], object]) -> object:
        return network(images)

    times = _alternate({name: partial(run, network) for name, network in networks.items()}, repetitions)
    rows = []
    for name in networks:
        kind = ", compiled" if name.endswith("compiled") else ""
        ratio = (times[name] / times["full precision" + kind]).median()
        row: dict[str, object] = {"method": name, "batch": len(images), "scheme": scheme, "bits": bits}
        rows.append(row | _quartiles(times[name]) | {"ratio_to_full_precision": ratio})
    return _table(rows, repetitions, device)


def measure_latency_analysis(
    network: str = "resnet50",
    images: int = 256,
    *,
    batch: int = 4,
    image_size: int = 224,
    repetitions: int = 3,
    device: str = "cpu",
) -> pd.DataFrame:
    """The layer error of one scheme, all layers, beside the plain forwards that it cannot do without.

    Measuring one scheme locally and accumulated takes three forwards: full precision, quantized, and each layer on its
    clean input. Weights are random.

    Args:
        network: name in pytorchcv or torchvision.
        images: how many.
        batch: at once.
        image_size: of the images.
        repetitions: of each.
        device: cpu or cuda.

    Returns:
        Columns method (forwards, layer_error), network, images, median_ms, q25_ms, q75_ms, ratio_to_forwards (three
        plain forwards; median within repetitions), repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    model = build_network(network, 10 if "cifar10" in network else 1000).to(device)
    data = [torch.randn(batch, 3, image_size, image_size, device=device) for _ in range(-(-images // batch))]

    @torch.inference_mode()
    def forwards() -> None:
        for _ in range(3):
            for x in data:
                model(x)

    runs: dict[str, Callable[[], object]] = {
        "forwards": forwards,
        "layer_error": partial(measure_layer_error, model, data, ["strict"], 3),
    }
    measure_layer_error(model, data[:1], ["strict"], 3)  # warm-up, in place of a whole run
    times = _alternate(runs, repetitions, warm=0)
    rows = []
    for name in times:
        row = {"method": name, "network": network, "images": len(data) * batch} | _quartiles(times[name])
        rows.append(row | {"ratio_to_forwards": (times[name] / times.forwards).median()})
    return _table(rows, repetitions, device)


def measure_latency_cost(
    model: nn.Module | None = None, batch: int = 64, *, image_size: int = 32, repetitions: int = 30, device: str = "cpu"
) -> pd.DataFrame:
    """Predicted beside measured time: every layer and quantizer of a ``release`` student, and a training step.

    The prediction is a roofline: the longer of operations over the rate of a matrix product and of bytes over the rate
    of a copy, both rates measured here. A layer reads input and weight and writes its output; a quantizer (that of the
    weight counts to its layer) reads twice and writes once. A part of the step moves inputs and outputs of its modules
    once in each of its passes: 3 of the generator (forward, gradients of input and weight), 2 of the teacher, 4 of the
    student. What the prediction leaves out (calls, layouts, caches) is the difference.

    Args:
        model: ResNet-20 for CIFAR-10 with random weights by default.
        batch: images; the whole forward is also measured at a half and a quarter of them.
        image_size: side of the images, a multiple of 8; the whole forward is also measured at a half and the double.
        repetitions: of each.
        device: cpu or cuda.

    Returns:
        Columns part (forward, step), name, kind (Conv2d, Linear, ActQuantizer; network, step), batch, size, operations
        (2 a product), bytes, predicted_ms, median_ms, q25_ms, q75_ms, predicted_share and measured_share (of all layers
        and quantizers, or of the step's parts; NaN for totals), repetitions, threads, torch, device. The log-log slopes
        of the totals are ``growth(frame[frame.kind == "network"], ("median_ms", "operations", "bytes"), ("batch",
        "size"))``.
    """
    torch.manual_seed(0)
    if model is None:
        model = build_network("resnet20_cifar10", 10)
        model.get_submodule("features").final_pool = nn.AdaptiveAvgPool2d(1)  # the same at 32 pixels; takes any size
    config = QATConfig(batch_size=batch, image_size=image_size, device=device)
    trainer = qat.Trainer(model, config)
    parts = _forward_parts(trainer.student, batch, image_size, device) + _step_parts(trainer)
    speed, bandwidth = _machine_rates(device)
    times = _alternate({part.key: part.run for part in parts}, repetitions)
    rows = []
    for part in parts:
        with _Operations() as counter:
            part.run()
        predicted = max(counter.total / speed, part.facts["bytes"] / bandwidth) * 1e3
        facts = part.facts | {"operations": counter.total, "predicted_ms": predicted}
        rows.append(facts | _quartiles(times[part.key]))
    order = ["part", "name", "kind", "batch", "size", "operations", "bytes"]
    frame = _table(rows, repetitions, device).set_index(order).reset_index()
    single = frame[~frame.kind.isin(["network", "step"])]
    for share, column in (("predicted_share", "predicted_ms"), ("measured_share", "median_ms")):
        frame[share] = single[column] / single.groupby("part")[column].transform("sum")
    return frame


class _Part(NamedTuple):
    """Something ``measure_latency_cost`` times, and what its row says of it before."""

    facts: dict[str, Any]
    run: Callable[[], object]

    @property
    def key(self) -> str:
        return f"{self.facts['part']} {self.facts['name']}"


def _machine_rates(device: str) -> tuple[float, float]:
    """Operations a second of a matrix product, bytes a second of a copy."""
    square, large = torch.randn(1024, 1024, device=device), torch.randn(2, 200, 64, 32, 32, device=device)
    times = _alternate({"product": lambda: square @ square, "copy": lambda: large[0].copy_(large[1])}, 10).median()
    return 2 * 1024**3 / times["product"] * 1e3, _bytes(large) / times["copy"] * 1e3


def _forward_parts(student: nn.Module, batch: int, image_size: int, device: str) -> list[_Part]:
    """Every layer and quantizer at full batch and size; the whole forward also at other batches and sizes."""

    @torch.no_grad()
    def forward(module: nn.Module, x: Tensor) -> object:
        return module(x)

    parts = []
    shapes = [(batch, image_size), (batch // 2, image_size), (batch // 4, image_size)]
    for n, size in [*shapes, (batch, image_size // 2), (batch, 2 * image_size)]:
        images = torch.randn(n, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        common, total = {"part": "forward", "batch": n, "size": size}, 0.0
        for name, module, x, y in _calls(student, images):
            if isinstance(module, ActQuantizer):
                moved = 3.0 * _bytes(x)
            elif isinstance(module, LAYERS):
                moved = _bytes(x) + 4.0 * _bytes(module.weight) + _bytes(y)
            else:
                continue
            total += moved
            if (n, size) == shapes[0]:
                kind = type(module).__name__.removeprefix("Parametrized")
                parts.append(_Part(common | {"name": name, "kind": kind, "bytes": moved}, partial(forward, module, x)))
        whole = {"name": f"{n} images, {size} x {size}", "kind": "network", "bytes": total}
        parts.append(_Part(common | whole, partial(forward, student, images)))
    return parts


def _step_parts(trainer: qat.Trainer) -> list[_Part]:
    """Generator, teacher and student as a training step runs them, and the whole step."""
    c, device = trainer.config, trainer.device
    generator, teacher, student = trainer.generator, trainer.teacher, trainer.student
    leaf = torch.randn(c.batch_size, 3, c.image_size, c.image_size, device=device)
    leaf = leaf.contiguous(memory_format=torch.channels_last).requires_grad_()

    def generate() -> None:
        images, _ = synthesize(generator, c.batch_size, device)
        torch.autograd.grad(images, trainer.generator_params, leaf.detach())

    def teach() -> None:
        with batchnorm_inputs(teacher) as norms:
            logits = teacher(leaf)
        torch.autograd.grad(logits.sum() + batchnorm_loss(norms), leaf)

    def study() -> None:
        logits = student(leaf)
        torch.autograd.grad(logits.sum(), leaf, retain_graph=True)
        torch.autograd.grad(logits.sum(), trainer.student_params)

    noise = torch.randn(c.batch_size, LATENT, device=device)
    labels = torch.zeros(c.batch_size, dtype=torch.long, device=device)
    common = {"part": "step", "batch": c.batch_size, "size": c.image_size}
    parts, whole = [], 0.0
    for name, run, passes, network, inputs in (
        ("generator", generate, 3, generator, (noise, labels)),
        ("teacher", teach, 2, teacher, (leaf,)),
        ("student", study, 4, student, (leaf,)),
    ):
        touched = passes * float(sum(_bytes(x) + _bytes(y) for _, _, x, y in _calls(network, *inputs)))
        parts.append(_Part(common | {"name": name, "kind": "part", "bytes": touched}, run))
        whole += touched
    step = common | {"name": "whole step", "kind": "step", "bytes": whole}
    return [*parts, _Part(step, partial(trainer.step, True))]


class _Operations(TorchDispatchMode):
    """Counts by torch's formulas; its ``FlopCounterMode`` refuses ``autograd.grad`` where a module takes a leaf."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@torch.no_grad()
def _calls(network: nn.Module, *inputs: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, module, input and output of every call of a module without children (parametrizations are none)."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    names = [
        name
        for name, module in network.named_modules()
        if (isinstance(module, LAYERS) or not list(module.children())) and not isinstance(module, WeightQuantizer)
    ]

    def visit(name: str, x: Tensor, y: Tensor) -> None:
        seen.append((name, network.get_submodule(name), x, y.detach()))

    with layer_calls(network, names, visit):
        network(*inputs)
    return seen


IMPORTS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import granq": ["-c", "import granq"],
    "import torch, use granq": ["-c", "import torch, granq; granq.quantize_model, granq.train"],
    "granq --help": ["-m", "granq.cli", "--help"],
}


def measure_latency_import(*, repetitions: int = 30, device: str = "cpu") -> pd.DataFrame:
    """Whole processes that import, taking turns.

    Returns:
        Columns command, median_ms, q25_ms, q75_ms, more_than_torch_ms (median of the differences to ``import torch``
        within a repetition), repetitions, torch, device.
    """
    runs = {
        name: partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        for name, arguments in IMPORTS.items()
    }
    times = _alternate(runs, repetitions, warm=0)
    more = times.sub(times["import torch"], axis=0).median()
    rows = [{"command": n} | _quartiles(times[n]) | {"more_than_torch_ms": more[n]} for n in IMPORTS]
    return _table(rows, repetitions, device)


def _quartiles(values: pd.Series, names: tuple[str, str, str] = ("median_ms", "q25_ms", "q75_ms")) -> dict[str, float]:
    return dict(zip(names, values.quantile([0.5, 0.25, 0.75]), strict=True))


def _table(rows: Sequence[Mapping[str, object]], repetitions: int, device: str) -> pd.DataFrame:
    """Rows of timings with what it takes to trust them."""
    facts = versions(device)
    return pd.DataFrame(rows).assign(
        repetitions=repetitions, threads=torch.get_num_threads(), torch=facts["torch"], device=facts["device"]
    )


def growth(
    frame: pd.DataFrame,
    quantities: Sequence[str] = ("median_ms", "bytes", "scale_multiplications"),
    axes: tuple[str, str] = ("channels", "batch"),
) -> pd.DataFrame:
    """How cost grows: slopes of log quantity over log channels and log batch; 1 is linear, 2 quadratic.

    Args:
        frame: of ``measure_latency_scaling``; along each of the two axes, the other is at its most frequent value. Of
            ``measure_latency_cost`` the rows of kind ``network``, whose axes are batch and size.
        quantities: columns; one that is 0 somewhere has no slope.
        axes: columns.

    Returns:
        Columns execution (or kind), against (one of the axes), points, and a slope for each quantity.
    """
    rows = []
    subject = "execution" if "execution" in frame else "kind"
    for against, other in (axes, axes[::-1]):
        part = frame[frame[other] == frame[other].mode().iloc[0]]
        for execution, line in part.groupby(subject, sort=False):
            line = line.drop_duplicates(against)
            row: dict[str, object] = {subject: execution, "against": against, "points": len(line)}
            for name in quantities:
                positive = len(line) > 1 and (line[name] > 0).all()
                row[name] = np.polyfit(np.log(line[against]), np.log(line[name]), 1)[0] if positive else math.nan
            rows.append(row)
    return pd.DataFrame(rows)


def _alternate(runs: Mapping[str, Callable[[], object]], repetitions: int, *, warm: int = 2) -> pd.DataFrame:
    """Milliseconds, a column for each run and a row for each repetition, in which the runs take turns.

    Each is timed behind ``warm`` runs of its own, which leave in the caches what it needs there; where a run touches
    far more than a cache holds, one before the first repetition is enough (0).
    """

    def once(run: Callable[[], object]) -> float:
        for _ in range(warm):
            run()
        start = timer()  # waits for the device
        run()
        return (timer() - start) * 1e3

    for run in runs.values():
        run()
    return pd.DataFrame([{name: once(run) for name, run in runs.items()} for _ in range(repetitions)])


def _peak_mb(run: Callable[[], object], device: str = "cpu") -> float:
    """The most bytes that PyTorch's allocator holds at once during ``run``, beyond those before it, in 10^6."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events)) / 1e6
