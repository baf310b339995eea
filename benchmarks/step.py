"""One training step, generator and student, next to the same step as it is commonly written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import common
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from granq import losses
from granq.config import QATConfig
from granq.convert import Quantizer
from granq.generator import Generator, batchnorm_inputs, synthesize
from granq.match import Match
from granq.measure.latency import alternate, quartiles, textbook_chain, timings
from granq.models import build_network
from granq.qat import AdaDFQ, Game


class PlainGenerator(Generator):
    """The generator as it is written down: nearest x2, then a convolution, in PyTorch's default layout."""

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(self.embedding(labels) * noise).view(-1, 128, self.size, self.size)
        x = self.conv1(F.interpolate(self.norm0(x), scale_factor=2.0))
        x = self.conv2(F.interpolate(F.leaky_relu(self.norm1(x), 0.2), scale_factor=2.0))
        return self.norm3(torch.tanh(self.conv3(F.leaky_relu(self.norm2(x), 0.2))))


def has_bfloat16(device: str) -> bool:
    """Say whether ``device`` computes in bfloat16: GPUs do, and x86 processors with AVX512."""
    return not device.startswith("cpu") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def plain_batchnorm_loss(inputs: list[tuple[nn.BatchNorm2d, Tensor]]) -> Tensor:
    """Return ``batchnorm_loss`` as it is written down: torch's mean and variance, and the gradient autograd finds."""
    terms = [
        F.mse_loss(x.mean((0, 2, 3)), norm.running_mean) + F.mse_loss(x.var((0, 2, 3), correction=0), norm.running_var)
        for norm, x in inputs
        if norm.running_mean is not None and norm.running_var is not None
    ]
    return torch.stack(terms).mean()


class PlainGame(Game):
    """The baseline: scheme ``granq`` as it is commonly written.

    Default layout, the textbook quantizer, one student forward for each of the two losses, and ``backward`` that also
    fills the gradients of teacher and student, which the generator's step then throws away.
    """

    def __init__(self, teacher: nn.Module, config: QATConfig) -> None:
        super().__init__(teacher, config, AdaDFQ(config))
        self.teacher.requires_grad_(True)
        self.generator = PlainGenerator(self.classes, config.image_size).to(self.device)
        self.optimizers["generator"] = torch.optim.Adam(self.generator.parameters(), config.generator_lr)
        for module in self.student.modules():
            if isinstance(module, Quantizer):
                module.forward = partial(textbook_chain, bits=module.bits)

    def play(self, train_student: bool = True) -> dict[str, Tensor]:
        c = self.config
        images, labels = synthesize(self.generator, c.batch_size, device=self.device)
        with batchnorm_inputs(self.teacher) as norms:
            t = self.teacher(images)
        s = self.student(images)
        loss = self.recipe.generator_loss(t, s, labels) + c.gamma * plain_batchnorm_loss(norms)
        self._descend("generator", loss)
        loss_s = losses.student_loss(t.detach(), self.student(images.detach()), c.temperature)
        self._descend("student", loss_s)
        return {"generator_loss": loss.detach(), "student_loss": loss_s.detach()}

    def _descend(self, name: str, loss: Tensor) -> None:
        for network in (self.teacher, self.student, self.generator):
            network.zero_grad()
        loss.backward()
        self.optimizers[name].step()


class GraphedGame(Game):
    """A CUDA graph of the step: recorded once, then replayed by one launch instead of some thousand.

    Three calls run as they are, in which libraries choose their algorithms and optimizers make their state; the fourth
    is recorded. A learning rate that is a number is part of a recording, so a new one is made when it changes; recipe
    match, whose rate changes in every step, gets them as tensors. Random numbers go on.
    """

    WARM = 3

    def __init__(self, teacher: nn.Module, config: QATConfig, recipe: AdaDFQ | None = None, **more: Any) -> None:
        super().__init__(teacher, config, recipe or AdaDFQ(config), **more)
        rates: Any = dict(lr=config.generator_lr, betas=(0.5, 0.999), capturable=True)
        self.optimizers["generator"] = torch.optim.Adam(self.generator_params, **rates)
        self.calls, self.recorded, self.stream = 0, (), torch.cuda.Stream()
        if isinstance(self.recipe, Match):
            self.matched, self.recipe.step = self.recipe.step, self.match  # type: ignore[method-assign]

    def optimize_student(self) -> None:
        super().optimize_student()
        if isinstance(self.recipe, Match):
            groups = self.optimizers["student"].param_groups
            rates = [{"lr": torch.tensor(float(group["lr"]), device=self.device)} for group in groups]
            self.optimizers["student"] = torch.optim.Adam([g | r for g, r in zip(groups, rates, strict=True)])
            for group in self.optimizers["student"].param_groups:
                group["capturable"] = True

    def _set_rates(self, iteration: int) -> None:
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        tensors = [group["lr"] for group in groups]
        super()._set_rates(iteration)
        for group, tensor in zip(groups, tensors, strict=True):
            if isinstance(tensor, Tensor):
                group["lr"] = tensor.fill_(group["lr"])

    def match(self, game: Game) -> dict[str, Tensor]:
        return self.replayed(lambda: self.matched(game), "match")

    def play(self, train_student: bool = True) -> dict[str, Tensor]:
        return self.replayed(lambda: super(GraphedGame, self).play(train_student), train_student)

    def replayed(self, step: Callable[[], dict[str, Tensor]], kind: object) -> dict[str, Tensor]:
        """Do ``step``; what it returns is overwritten by the next one."""
        rates = [group["lr"] for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        rates = [rate for rate in rates if not isinstance(rate, Tensor)]
        frozen = self.epoch >= (self.config.generator_epochs or self.config.epochs)
        if self.recorded != (now := (kind, frozen, id(self.optimizers["student"]), *rates)):
            self.recorded, self.calls = now, 0
        self.calls += 1
        if self.calls <= self.WARM:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.calls == self.WARM + 1:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.losses = step()
        self.graph.replay()
        return self.losses  # of this step until the next


def compiled_game(teacher: nn.Module, config: QATConfig) -> Game:
    """Return a game whose student and generator are compiled; into the teacher the BatchNorm loss hangs its hooks."""
    game = Game(teacher, config, AdaDFQ(config))
    game.student, game.generator = (cast(Any, torch.compile(m, dynamic=False)) for m in (game.student, game.generator))
    return game


def measure_latency_step(
    teacher: nn.Module | None = None,
    batches: tuple[int, ...] = (64, 200),
    *,
    image_size: int = 32,
    repetitions: int = 30,
    device: str = "cpu",
    compiled: bool = False,
) -> pd.DataFrame:
    """Time one training step of ResNet-20 for CIFAR-10, scheme ``granq``, against the plain step.

    Returns:
        Columns method (plain; granq; granq bf16 where the device has it; each of granq's also as CUDA graph where there
        is CUDA; compiled if asked for), batch, bits, image_size, median_ms, q25_ms, q75_ms,
        speedup (plain over this, median of the ratios within a repetition) with quartiles ``speedup_q25`` and
        ``speedup_q75``, repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    teacher = teacher or build_network("resnet20_cifar10", 10)  # times do not depend on the weights
    frames = []
    for batch in tqdm(batches, desc="step", unit="batch size"):
        config = QATConfig(batch_size=batch, image_size=image_size, device=device)
        games: dict[str, Game] = {"plain": PlainGame(teacher, config)}
        for name, bf16 in {"granq": False, "granq bf16": True}.items():
            if not bf16 or has_bfloat16(device):
                games[name] = Game(teacher, config.change(bf16=bf16), AdaDFQ(config))
                if device.startswith("cuda"):
                    games[f"{name}, CUDA graph"] = GraphedGame(teacher, config.change(bf16=bf16))
        if compiled:
            games["granq, compiled"] = compiled_game(teacher, config)
        runs: dict[str, Any] = {name: partial(game.play, True) for name, game in games.items()}
        times = alternate(runs, repetitions)
        frame = quartiles(times, batch=batch, bits=config.act_bits, image_size=image_size)
        frames.append(frame.join(quartiles(1 / times.div(times.plain, axis=0), "speedup")))
    return timings(frames, "method", repetitions, device)


if __name__ == "__main__":
    common.run(measure_latency_step)
