"""Timings: alternating, warmed up, with spread; ratios within one run. Milliseconds of a shared machine mean little."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from granq import qat, scaling
from granq.convert import ActQuantizer, WeightQuantizer, calibrate, quantize_model
from granq.generator import Generator, batchnorm_inputs, batchnorm_loss, synthesize, upsample_conv_plain
from granq.qat import versions
from granq.quantizer import choose_qparams, compile_quantizer, fake_quantize

#: ``measure_latency_<name>``, in the order of ``granq bench all``
BENCHMARKS = ("quantizer", "scaling", "step", "evaluation", "analysis")

#: Activations of ResNet-20 at batch 200 and of ResNet-50 at batch 16, and two tensors over 50 MB.
SHAPES = (
    (200, 16, 32, 32), (200, 32, 16, 16), (200, 64, 8, 8), (16, 64, 56, 56), (16, 512, 7, 7),
    (200, 64, 32, 32), (16, 256, 56, 56),
)  # fmt: skip


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


class PlainTrainer(qat.Trainer):
    """The baseline of a training step: ``release`` as it is commonly written.

    Default layout, the textbook quantizer, one student forward for each of the two losses, and ``backward`` that also
    fills the gradients of teacher and student which the generator's step then throws away.
    """

    def __init__(self, teacher: nn.Module, config: qat.QATConfig) -> None:
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
        loss = c.alpha_ds * qat.disagreement_loss(t, s, labels) + c.alpha_as * qat.agreement_loss(t, s, labels)
        loss = loss + qat.margin_loss(t, s, c.lambda_l, c.lambda_u) + c.gamma * batchnorm_loss(norms)
        self._descend("generator", loss)
        loss_s = qat.student_loss(t.detach(), self.student(images.detach()), c.temperature)
        self._descend("student", loss_s)
        return {"generator_loss": loss.detach(), "student_loss": loss_s.detach()}

    def _descend(self, name: str, loss: Tensor) -> None:
        for network in (self.teacher, self.student, self.generator):
            network.zero_grad()
        loss.backward()
        self.optimizers[name].step()


def compiled_release(x: Tensor, bits: int) -> Tensor:
    """The library's quantizer under ``torch.compile``."""
    compile_quantizer()
    try:
        return fake_quantize(x, bits, "per_sample_channel", clamp=False)
    finally:
        compile_quantizer(False)


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "layerwise": lambda x, bits: fake_quantize(x, bits, "per_tensor", clamp=False),
    "channel loop": channel_loop,
    "textbook": textbook_chain,
    "release": lambda x, bits: fake_quantize(x, bits, "per_sample_channel", clamp=False),
    "release, compiled": compiled_release,
    "copy": lambda x, bits: x.clone(),
}


def measure_latency_quantizer(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    bits: int = 3,
    *,
    repetitions: int = 30,
    device: str = "cpu",
    backward: bool = True,
) -> pd.DataFrame:
    """Time of fake quantization per method and activation shape, float32, forward and (by default) backward.

    Every repetition runs each method once, in turn, so that a disturbance meets all of them.

    Returns:
        Columns method, shape, bytes, bits, backward, repetitions, median_ms, q25_ms, q75_ms, ratio_to_textbook and
        ratio_to_copy (medians of the ratios within one repetition, with their quartiles ``..._q25`` and ``..._q75``),
        threads, torch, device. ``release`` is the library's vectorized quantizer, ``copy`` the floor: ``x.clone()``.
    """
    facts = versions(device)
    frames = []
    for shape in tqdm(shapes, desc="quantizer", unit="shape"):
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(shape, generator=generator, device=device).requires_grad_(backward)
        gradient = torch.ones_like(x)

        def once(method: Callable[[Tensor, int], Tensor], x: Tensor, gradient: Tensor) -> None:
            output = method(x, bits)
            if backward:
                torch.autograd.grad(output, x, gradient)

        runs = {name: partial(once, method, x, gradient) for name, method in METHODS.items()}
        times = _alternate(runs, repetitions)
        for name in METHODS:
            row: dict[str, object] = {
                "method": name, "shape": str(shape), "bytes": x.numel() * x.element_size(), "bits": bits,
                "backward": backward, "repetitions": repetitions, **_quartiles(times[name]),
            }  # fmt: skip
            for reference in ("textbook", "copy"):
                ratios = times[name] / times[reference]
                row[f"ratio_to_{reference}"] = ratios.median()
                row[f"ratio_to_{reference}_q25"] = ratios.quantile(0.25)
                row[f"ratio_to_{reference}_q75"] = ratios.quantile(0.75)
            frames.append(row | {"threads": torch.get_num_threads()} | _only(facts, "torch", "device"))
    return pd.DataFrame(frames)


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
    facts = versions(device)
    shapes = list(dict.fromkeys([(c, fixed[1]) for c in channels] + [(fixed[0], n) for n in batches]))
    frames = []
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
            values = dict(execution=name, channels=c, batch=n, size=size, bits=bits)
            values |= _quartiles(times[name]) | {"peak_mb": _peak_mb(run, device)}
            count = counts.loc[name.removesuffix(", float32")]
            values |= dict(
                scale_multiplications=count.scale_multiplications, bytes=count.bytes, repetitions=repetitions
            )
            frames.append(values | {"threads": torch.get_num_threads()} | _only(facts, "torch", "device"))
    return pd.DataFrame(frames)


def measure_latency_step(
    teacher: nn.Module | None = None,
    batches: Sequence[int] = (64, 200),
    *,
    bits: int = 3,
    image_size: int = 32,
    repetitions: int = 30,
    device: str = "cpu",
    compiled: bool = True,
) -> pd.DataFrame:
    """One training step (generator and student, scheme ``release``) beside the plain step, taking turns.

    Args:
        teacher: ResNet-20 for CIFAR-10 with random weights by default; times do not depend on them.
        batches: images per step.
        bits: of weights and activations.
        image_size: of the generated images.
        repetitions: of each step.
        device: cpu or cuda.
        compiled: also with ``compile_quantizer``.

    Returns:
        Columns method (plain, granq, granq compiled), batch, median_ms, q25_ms, q75_ms, speedup (plain over this,
        median of the ratios within a repetition) with quartiles, repetitions, threads, torch, device.
    """
    from granq.models import build_network

    torch.manual_seed(0)
    teacher = teacher or build_network("resnet20_cifar10", 10)
    facts, frames = versions(device), []
    for batch in tqdm(batches, desc="step", unit="batch size"):
        config = qat.QATConfig(
            weight_bits=bits, act_bits=bits, batch_size=batch, image_size=image_size, device=device, seed=0
        )
        plain, ours = PlainTrainer(teacher, config), qat.Trainer(teacher, config)

        def compiled_step(trainer: qat.Trainer = ours) -> None:
            compile_quantizer()
            try:
                trainer.step(True)
            finally:
                compile_quantizer(False)

        runs: dict[str, Callable[[], object]] = {"plain": partial(plain.step, True), "granq": partial(ours.step, True)}
        times = _alternate(runs | ({"granq compiled": compiled_step} if compiled else {}), repetitions)
        for name in times:
            ratio = times.plain / times[name]
            row: dict[str, object] = {"method": name, "batch": batch, "bits": bits, "image_size": image_size}
            for column, values in (("ms", times[name]), ("speedup", ratio)):
                low, middle, high = (f"{q}_{column}" for q in ("q25", "median", "q75"))
                row |= {middle: values.median(), low: values.quantile(0.25), high: values.quantile(0.75)}
            frames.append(
                row | {"repetitions": repetitions, "threads": torch.get_num_threads()} | _only(facts, "torch", "device")
            )
    return pd.DataFrame(frames).rename(columns=lambda c: c.replace("median_speedup", "speedup"))


def measure_latency_evaluation(
    model: nn.Module | None = None, batch: int = 250, *, scheme: str = "release", bits: int = 3, image_size: int = 32,
    repetitions: int = 30, device: str = "cpu",
) -> pd.DataFrame:  # fmt: skip
    """Forward of a quantized network beside the full-precision one, both as they are and under ``torch.compile``.

    The student's weights are quantized once, before the clock starts, as they are while accuracy is measured.

    Args:
        model: ResNet-20 for CIFAR-10 with random weights by default.
        batch: images.
        scheme: of the student.
        bits: of weights and activations.
        image_size: of the images.
        repetitions: of each forward.
        device: cpu or cuda.

    Returns:
        Columns method (full precision, quantized; each also compiled), batch, scheme, bits, median_ms, q25_ms, q75_ms,
        ratio_to_full_precision (of the same kind, median within repetitions), repetitions, threads, torch, device.
    """
    from granq.models import build_network

    torch.manual_seed(0)
    model = (model or build_network("resnet20_cifar10", 10)).to(device).eval()
    student = quantize_model(model, scheme, bits, bits).to(device)
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    calibrate(student, [images])
    for layer in [m for m in student.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    networks: dict[str, Any] = {"full precision": model, "quantized": student}
    networks |= {f"{name}, compiled": torch.compile(network) for name, network in networks.items()}

    @torch.inference_mode()
    def run(network: Callable[[Tensor], object]) -> object:
        return network(images)

    times = _alternate({name: partial(run, network) for name, network in networks.items()}, repetitions)
    facts, frames = _only(versions(device), "torch", "device"), []
    for name in networks:
        kind = ", compiled" if name.endswith("compiled") else ""
        ratio = (times[name] / times["full precision" + kind]).median()
        row: dict[str, object] = {"method": name, "batch": batch, "scheme": scheme, "bits": bits}
        row |= _quartiles(times[name]) | {"ratio_to_full_precision": ratio, "repetitions": repetitions}
        frames.append(row | {"threads": torch.get_num_threads()} | facts)
    return pd.DataFrame(frames)


def measure_latency_analysis(
    network: str = "resnet50", images: int = 8, *, batch: int = 4, image_size: int = 224, bits: int = 3,
    repetitions: int = 3, device: str = "cpu",
) -> pd.DataFrame:  # fmt: skip
    """The layer error of one scheme, all layers, beside the plain forwards that it cannot do without.

    Measuring one scheme locally and accumulated takes three forwards: full precision, quantized, and each layer on its
    clean input. Weights are random.

    Args:
        network: name in pytorchcv or torchvision.
        images: how many.
        batch: at once.
        image_size: of the images.
        bits: of weights and activations.
        repetitions: of each.
        device: cpu or cuda.

    Returns:
        Columns method (forwards, layer_error), network, images, median_ms, q25_ms, q75_ms, ratio_to_forwards (three
        plain forwards; median within repetitions), repetitions, threads, torch, device.
    """
    from granq.analysis import measure_layer_error
    from granq.models import build_network

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
        "layer_error": partial(measure_layer_error, model, data, ["strict"], bits),
    }
    times = _alternate(runs, repetitions)
    facts, frames = _only(versions(device), "torch", "device"), []
    for name in times:
        ratio = {"ratio_to_forwards": (times[name] / times.forwards).median(), "repetitions": repetitions}
        row = {"method": name, "network": network, "images": len(data) * batch} | _quartiles(times[name])
        frames.append(row | ratio | {"threads": torch.get_num_threads()} | facts)
    return pd.DataFrame(frames)


def _quartiles(times: pd.Series) -> dict[str, float]:
    return {name: float(times.quantile(q)) for name, q in (("median_ms", 0.5), ("q25_ms", 0.25), ("q75_ms", 0.75))}


def profile_step(
    teacher: nn.Module | None = None, batch: int = 64, *, device: str = "cpu", top: int = 12
) -> pd.DataFrame:
    """Where one training step spends its time: the ``top`` operators by their own time, and the rest as ``others``.

    Returns:
        Columns operator, calls, self_ms, share (0 to 1).
    """
    from granq.models import build_network

    torch.manual_seed(0)
    trainer = qat.Trainer(
        teacher or build_network("resnet20_cifar10", 10), qat.QATConfig(batch_size=batch, device=device)
    )
    for _ in range(2):
        trainer.step(True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        trainer.step(True)
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [(e.key, e.count, getattr(e, time) / 1e3) for e in profiler.key_averages()]
    frame = pd.DataFrame(rows, columns=["operator", "calls", "self_ms"]).sort_values("self_ms", ascending=False)
    rest = frame.iloc[top:]
    frame = pd.concat(
        [frame.head(top), pd.DataFrame([("others", rest.calls.sum(), rest.self_ms.sum())], columns=frame.columns)]
    )
    return frame.assign(share=frame.self_ms / frame.self_ms.sum()).reset_index(drop=True)


def _only(facts: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: facts[name] for name in names}


def growth(
    frame: pd.DataFrame, quantities: Sequence[str] = ("median_ms", "bytes", "scale_multiplications")
) -> pd.DataFrame:
    """How cost grows: slopes of log quantity over log channels and log batch; 1 is linear, 2 quadratic.

    Args:
        frame: of ``measure_latency_scaling``; along each of the two, the other is at its most frequent value.
        quantities: columns; one that is 0 somewhere has no slope.

    Returns:
        Columns execution, against (channels, batch), points, and a slope for each quantity.
    """
    rows = []
    for against, other in (("channels", "batch"), ("batch", "channels")):
        part = frame[frame[other] == frame[other].mode().iloc[0]]
        for execution, line in part.groupby("execution", sort=False):
            line = line.drop_duplicates(against)
            row: dict[str, object] = {"execution": execution, "against": against, "points": len(line)}
            for name in quantities:
                positive = len(line) > 1 and (line[name] > 0).all()
                row[name] = np.polyfit(np.log(line[against]), np.log(line[name]), 1)[0] if positive else math.nan
            rows.append(row)
    return pd.DataFrame(rows)


def _alternate(runs: Mapping[str, Callable[[], object]], repetitions: int) -> pd.DataFrame:
    """Milliseconds, a column for each run and a row for each repetition, in which the runs take turns."""
    threads = torch.get_num_threads()  # torch's own timer: it synchronizes CUDA and would take one thread
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    for timer in timers.values():
        timer.timeit(2)  # warm-up
    return pd.DataFrame([{n: t.timeit(1).mean * 1e3 for n, t in timers.items()} for _ in range(repetitions)])


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
