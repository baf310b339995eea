"""Predicted next to measured time: every layer and quantizer of a student, and the parts of a training step.

The prediction is a roofline: the longer of operations over the rate of a matrix product and of bytes over the rate of a
copy, both rates measured here. A layer reads input and weight and writes its output; a quantizer (that of the weight
counts to its layer) reads twice and writes once. A part of the step moves inputs and outputs of its modules once in
each of its passes: 3 of the generator (forward, gradients of input and weight), 2 of the teacher, 4 of the student.
What the prediction leaves out (calls, layouts, caches) is the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from granq.config import QATConfig
from granq.convert import ActQuantizer, WeightQuantizer
from granq.generator import LATENT, batchnorm_inputs, batchnorm_loss, synthesize
from granq.hooks import watch
from granq.measure.latency import alternate, quartiles, timings
from granq.models import build_network
from granq.plain import LAYERS
from granq.qat import AdaDFQ, Game


class Part(NamedTuple):
    """Something to time, and what its row says of it before."""

    facts: dict[str, Any]
    run: Callable[[], object]


class Operations(TorchDispatchMode):
    """Count by torch's formulas; its ``FlopCounterMode`` refuses ``autograd.grad`` where a module takes a leaf."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def measure_latency_cost(
    model: nn.Module | None = None, batch: int = 64, *, image_size: int = 32, repetitions: int = 30, device: str = "cpu"
) -> pd.DataFrame:
    """Time the layers of a ``granq`` student of ResNet-20 for CIFAR-10, and a training step, next to a prediction.

    The whole forward is also measured at half and a quarter of the images, and at half and double the ``image_size``
    (a multiple of 8).

    Returns:
        Columns part (forward, step), name, kind (Conv2d, Linear, ActQuantizer; network, part, step), batch, size,
        operations (2 a product), bytes, predicted_ms, median_ms, q25_ms, q75_ms, predicted_share and measured_share (of
        all layers and quantizers, or of the step's parts; NaN for totals), repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    if model is None:
        model = build_network("resnet20_cifar10", 10)
        model.get_submodule("features").final_pool = nn.AdaptiveAvgPool2d(1)  # the same at 32 pixels; takes any size
    config = QATConfig(batch_size=batch, image_size=image_size, device=device)
    game = Game(model, config, AdaDFQ(config))
    parts = forward_parts(game.student, batch, image_size, device) + step_parts(game)
    speed, bandwidth = machine_rates(device)
    frame = quartiles(alternate({str(i): part.run for i, part in enumerate(parts)}, repetitions))
    facts = []
    for part in parts:
        with Operations() as counter:
            part.run()
        predicted = max(counter.total / speed, part.facts["bytes"] / bandwidth) * 1e3
        facts.append(part.facts | {"operations": counter.total, "predicted_ms": predicted})
    order = ["part", "kind", "batch", "size", "operations", "bytes", "predicted_ms"]
    frame = pd.DataFrame(facts).set_index("name")[order].join(frame.set_axis([f["name"] for f in facts]))
    single = frame[~frame.kind.isin(["network", "step"])]
    for share, column in (("predicted_share", "predicted_ms"), ("measured_share", "median_ms")):
        frame[share] = single[column] / single.groupby("part")[column].transform("sum")
    return timings([frame], "name", repetitions, device)


def machine_rates(device: str) -> tuple[float, float]:
    """Return operations a second of a matrix product, and bytes a second of a copy."""
    square, large = torch.randn(1024, 1024, device=device), torch.randn(2, 200, 64, 32, 32, device=device)
    times = alternate({"product": lambda: square @ square, "copy": lambda: large[0].copy_(large[1])}, 10).median()
    return 2 * 1024**3 / times["product"] * 1e3, large.nbytes / times["copy"] * 1e3


def forward_parts(student: nn.Module, batch: int, image_size: int, device: str) -> list[Part]:
    """Return every layer and quantizer at full batch and size, and the whole forward also at others."""

    @torch.no_grad()
    def forward(module: nn.Module, x: Tensor) -> object:
        return module(x)

    parts = []
    shapes = [(batch, image_size), (batch // 2, image_size), (batch // 4, image_size)]
    for n, size in [*shapes, (batch, image_size // 2), (batch, 2 * image_size)]:
        images = torch.randn(n, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        shared, total = {"part": "forward", "batch": n, "size": size}, 0.0
        for name, module, x, y in calls(student, images):
            if isinstance(module, ActQuantizer):
                moved = 3.0 * x.nbytes
            elif isinstance(module, LAYERS):
                moved = x.nbytes + 4.0 * module.weight.nbytes + y.nbytes
            else:
                continue
            total += moved
            if (n, size) == shapes[0]:
                kind = type(module).__name__.removeprefix("Parametrized")
                parts.append(Part(shared | {"name": name, "kind": kind, "bytes": moved}, partial(forward, module, x)))
        whole = {"name": f"{n} images, {size} x {size}", "kind": "network", "bytes": total}
        parts.append(Part(shared | whole, partial(forward, student, images)))
    return parts


def step_parts(game: Game) -> list[Part]:
    """Return generator, teacher and student as a training step runs them, and the whole step."""
    n, size, device = game.config.batch_size, game.config.image_size, game.device
    leaf = torch.randn(n, 3, size, size, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()

    def generate() -> None:
        images, _ = synthesize(game.generator, n, device=device)
        torch.autograd.grad(images, game.generator_params, leaf.detach())

    def teach() -> None:
        with batchnorm_inputs(game.teacher) as norms:
            logits = game.teacher(leaf)
        torch.autograd.grad(logits.sum() + batchnorm_loss(norms), leaf)

    def study() -> None:
        logits = game.student(leaf)
        torch.autograd.grad(logits.sum(), leaf, retain_graph=True)
        torch.autograd.grad(logits.sum(), game.student_params)

    latent = torch.randn(n, LATENT, device=device), torch.zeros(n, dtype=torch.long, device=device)
    moved = {
        "generator": 3.0 * touched(game.generator, *latent),
        "teacher": 2.0 * touched(game.teacher, leaf),
        "student": 4.0 * touched(game.student, leaf),
    }
    moved["whole step"] = sum(moved.values())
    runs: tuple[Callable[[], object], ...] = (generate, teach, study, partial(game.play, True))
    shared = {"part": "step", "batch": n, "size": size}
    return [
        Part(shared | {"name": name, "kind": "step" if name == "whole step" else "part", "bytes": bytes_}, run)
        for (name, bytes_), run in zip(moved.items(), runs, strict=True)
    ]


def touched(network: nn.Module, *inputs: Tensor) -> int:
    """Return the bytes of inputs and outputs of all modules."""
    return sum(x.nbytes + y.nbytes for _, _, x, y in calls(network, *inputs))


@torch.no_grad()
def calls(network: nn.Module, *inputs: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Return name, module, input and output of every call of a module without children (parametrizations are none)."""
    modules = {
        name: module
        for name, module in network.named_modules()
        if (isinstance(module, LAYERS) or not list(module.children())) and not isinstance(module, WeightQuantizer)
    }
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    with watch(network, modules, lambda name, x, y: seen.append((name, modules[name], x, y.detach()))):
        network(*inputs)
    return seen


if __name__ == "__main__":
    common.run(measure_latency_cost)
