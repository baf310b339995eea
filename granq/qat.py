"""Zero-shot quantization-aware training: the generator and the low-bit student play AdaDFQ's game.

One step draws images, runs teacher and student once each, and takes both gradients from these two forwards:
the generator's loss with respect to the generator only, the student's with respect to the student only.

Recipe ``gdfq`` has losses of its own. In recipe ``layers`` the game is over when the student's training begins: images
are drawn once and refined, and the student follows the teacher in every BatchNorm; ``docs/moonshot.md`` says why.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from granq.calibration import calibrate, learn_steps, reestimate_batchnorm, set_image_range
from granq.checks import expect_bfloat16, forward, resolve_device, typed
from granq.config import QATConfig
from granq.convert import LearnedSteps, bypassed, freeze_ranges, frozen_ranges, image_place, relu_ceilings
from granq.distributed import average_gradients, from_first, gather, own_part, world
from granq.generator import (
    Generator,
    batchnorm_inputs,
    batchnorm_loss,
    batchnorm_outputs,
    build_generator,
    random_shapes,
    refine,
    synthesize,
    vary,
)
from granq.losses import (
    agreement_loss,
    disagreement_loss,
    gdfq_student_loss,
    layer_loss,
    margin_loss,
    soft_label_loss,
    student_loss,
)
from granq.quantizer import at_least_float32
from granq.runs import RunFolder, fingerprint, versions

REESTIMATION = 8  # batches from which reestimate_batchnorm takes its statistics
STEP_RATE = 20  # times student_lr for learned steps, whose logarithms move by shares, weights by absolute amounts
NORM_RATE = 4  # recipe layers: times student_lr for the scale and shift of BatchNorm
Bounds = tuple[Tensor, Tensor]  # low and high, of each channel
SPREAD = 0.5  # of contrast and brightness before images are refined; half of it whenever they are drawn
SOFT_LABELS, SOFT_TEMPERATURE = 0.1, 4.0  # of recipe layers: weight and temperature of the soft labels
CALIBRATION = 20  # batches that set static ranges if there is no warm-up: of a moving average of 0.9, 88 percent


def diversity(images: Tensor) -> Tensor:
    """Share of the variance of images (N, C, H, W) that is between images: 1 - 1/N of noise, 0 of one image N times."""
    return images.var(0, correction=0).mean() / images.var((0, 2, 3), correction=0).mean().clamp_min(1e-12)


#: below these the run says so; what a healthy run shows is in ``docs/reliability.md``
LOW_DIVERSITY, LOW_RECOGNITION = 0.1, 2.0  # share of the variance; times the accuracy of guessing, half way up at most


def generator_trouble(row: dict[str, float], classes: int) -> str:
    """What is wrong with the generated images of a finished epoch, in one sentence; empty if nothing is."""
    if row["diversity"] < LOW_DIVERSITY:
        return (
            f"the generator has collapsed: only {row['diversity']:.0%} of the variance is between its images; "
            "lower generator_lr or take another seed"
        )
    guess = 100 / classes
    if not row["warmup"] and row["teacher_top1"] < min(LOW_RECOGNITION * guess, (100 + guess) / 2):
        return (
            f"the teacher gives only {row['teacher_top1']:.0f} % of the generated images the label they were drawn for "
            f"(guessing gives {guess:.0f} %); train the generator longer (warmup_epochs, iterations)"
        )
    return ""


@dataclass
class Result:
    """A finished run. ``best_top1`` is the best epoch *on the test split*, a selection; ``last_top1`` is not."""

    student: nn.Module
    generator: Generator
    config: QATConfig
    history: pd.DataFrame
    ptq_top1: float
    last_top1: float
    best_top1: float
    seconds: float

    def row(self, dataset: str, network: str, teacher_top1: float, test_images: int) -> dict[str, Any]:
        """What a results table keeps of a run: accuracies, every setting that ``granq rerun`` needs, versions."""
        c = self.config
        settings = {k: v for k, v in asdict(c).items() if k not in ("scheme", "weight_bits", "act_bits", "device")}
        return {
            "dataset": dataset, "network": network, "scheme": c.scheme, "bits": f"W{c.weight_bits}A{c.act_bits}",
            "recipe": c.recipe, "seed": c.seed, "teacher_top1": teacher_top1, "ptq_top1": self.ptq_top1,
            "last_top1": self.last_top1, "best_top1": self.best_top1, "seconds": round(self.seconds, 1),
            "test_images": test_images, **settings, **versions(resolve_device(c.device)),
        }  # fmt: skip


class Trainer:
    """State of one run: networks, optimizers, history. ``step`` is the method, ``run`` the bookkeeping."""

    def __init__(
        self, teacher: nn.Module, config: QATConfig, generator: Generator | None = None, pixels: Bounds | None = None
    ) -> None:
        self.config, self.device, self.pixels = config, resolve_device(config.device), pixels
        if config.pixel_range and pixels is None:
            raise ValueError("pixel_range is a share of what pixels can be: pass pixels, see granq.data.pixel_bounds")
        if config.bf16:
            expect_bfloat16(self.device)
        if config.batch_size % world()[1]:
            raise ValueError(f"batch_size {config.batch_size} does not divide among {world()[1]} processes")
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)  # whose random state belongs to the run
        torch.manual_seed(config.seed)  # before the generator is built: its initial weights belong to the seed
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self.student = config.quantized(self.teacher).requires_grad_(True)
        self.relu_ceilings = relu_ceilings(self.student)
        if config.pixel_range:
            image_place(self.student)  # tells now what the end of the warm-up would
        classes = self._try_networks()
        self.generator = build_generator(classes, config.image_size)
        if generator is not None:
            if (generator.classes, generator.size) != (classes, self.generator.size):
                raise ValueError(
                    f"the generator draws {generator.classes} classes at {4 * generator.size} pixels, "
                    f"but this run needs {classes} classes at {config.image_size}"
                )
            self.generator.load_state_dict(generator.state_dict())
        self.generator.to(self.device).to(memory_format=torch.channels_last)
        self.generator_params = list(self.generator.parameters())
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "generator": torch.optim.Adam(self.generator_params, config.generator_lr, betas=(0.5, 0.999)),
        }
        self._optimize_student()
        self.refined: Tensor | None = None  # images, and their labels
        self.refined_labels = torch.empty(0, dtype=torch.long, device=self.device)
        self.epoch = 0
        self.rows: list[dict[str, float]] = []
        self.ptq_top1 = math.nan
        self.seconds = 0.0

    @torch.no_grad()
    def _try_networks(self) -> int:
        """Number of classes. Raises ValueError now for what the first step would, or what no step would notice."""
        shape = (1, 3, self.config.image_size, self.config.image_size)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)  # the run's state stays
        try:
            with batchnorm_inputs(self.teacher) as norms:
                logits = forward(self.teacher, image)
        except ValueError as error:
            raise ValueError(f"generated images have 3 channels, but {error}") from error
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"a teacher gives one tensor of logits (N, classes), got {got}")
        if not logits.isfinite().all():
            raise ValueError("the teacher's logits are not finite: its weights are damaged")
        batchnorm_loss(norms)
        with frozen_ranges(self.student), bypassed(self.student):
            difference = (self.student(image) - logits).abs().max()
        if difference > 1e-3 * logits.abs().max():
            raise ValueError(
                f"the copy of {type(self.teacher).__name__} computes something else even without quantization: its "
                "forward may change a tensor in place that is read again, which torch.fx does not see"
            )
        return logits.shape[1]

    def _optimize_student(self) -> None:
        """The student's optimizer, with rates of their own for learned steps and, in recipe ``layers``, BatchNorm."""
        c, rates = self.config, dict.fromkeys(self.student.parameters(), 1)
        layers = c.recipe == "layers"
        for module in self.student.modules():
            if isinstance(module, LearnedSteps):
                rates[module.log_step] = STEP_RATE
            elif layers and isinstance(module, nn.BatchNorm2d):
                rates |= dict.fromkeys(module.parameters(), NORM_RATE)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rates if rates[p] == r], "rate": r} for r in sorted(set(rates.values()))
        ]
        self.student_params = [p for group in groups for p in group["params"]]
        if layers:
            self.optimizers["student"] = torch.optim.Adam(groups, c.student_lr)
        else:
            self.optimizers["student"] = torch.optim.SGD(
                groups, c.student_lr, momentum=0.9, nesterov=True, weight_decay=1e-4
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.bf16)

    def step(self, train_student: bool) -> dict[str, Tensor]:
        """One iteration; returns detached losses and the teacher's accuracy on the images in percent."""
        c = self.config
        if c.recipe == "layers" and train_student:
            return self._match_layers()
        with self._autocast():
            images, labels = synthesize(self.generator, c.batch_size, self.device)
            with batchnorm_inputs(self.teacher) as norms:
                t = self.teacher(images)
            with torch.set_grad_enabled(train_student or c.recipe == "adadfq"):
                s = self.student(images)
        t, s, labels = gather(at_least_float32(t)), gather(at_least_float32(s)), gather(labels)
        bn = batchnorm_loss(norms)
        if c.recipe == "adadfq":
            loss_g = c.alpha_ds * disagreement_loss(t, s, labels) + c.alpha_as * agreement_loss(t, s, labels)
            loss_g = loss_g + margin_loss(t, s, c.lambda_l, c.lambda_u) + c.gamma * bn
            loss_s = student_loss(t.detach(), s, c.temperature)
        else:
            loss_g = F.cross_entropy(t, labels) + c.gamma * bn
            loss_s = gdfq_student_loss(t.detach(), s, labels)
        self._update("generator", self.generator_params, loss_g, retain_graph=train_student)
        if train_student:
            self._update("student", self.student_params, loss_s)
        losses = {"generator_loss": loss_g.detach(), "student_loss": loss_s.detach()}
        return losses | self._seen(images, t.detach(), labels, bn)

    def _match_layers(self) -> dict[str, Tensor]:
        """One iteration of recipe ``layers``: the generator stays, the student follows the teacher layer by layer."""
        with torch.no_grad(), self._autocast():
            images, labels = self._draw()
            with batchnorm_inputs(self.teacher) as norms, batchnorm_outputs(self.teacher) as wanted:
                t = at_least_float32(self.teacher(images))
        with batchnorm_outputs(self.student) as got, self._autocast():
            s = at_least_float32(self.student(images))
        loss = layer_loss(wanted, got, self.relu_ceilings) + SOFT_LABELS * soft_label_loss(t, s, SOFT_TEMPERATURE)
        self._update("student", self.student_params, loss)
        with torch.no_grad():
            joint = gather(loss.detach()[None]).mean()  # of equal parts
            return {"student_loss": joint} | self._seen(images, gather(t), gather(labels), batchnorm_loss(norms))

    @torch.no_grad()
    def _draw(self) -> tuple[Tensor, Tensor]:
        """A batch of images for the student alone, with labels: refined ones, or new ones of the generator."""
        c = self.config
        if self.refined is None:
            return synthesize(self.generator, c.batch_size, self.device)
        chosen = torch.randint(0, len(self.refined), (c.batch_size,))
        return own_part(vary(self.refined[chosen], SPREAD / 2)), own_part(self.refined_labels[chosen])

    @torch.no_grad()
    def _draw_varied(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """A batch of generated images as smooth as photographs are, in different light."""
        with self._autocast():
            images, labels = synthesize(generator, self.config.batch_size, self.device)
        smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
        return own_part(vary(gather((images + smooth) / 2), SPREAD)), labels

    def _refine_images(self) -> None:
        """Images to train on; the same in a run that was resumed, for they depend on seed and generator only."""
        c, generator = self.config, copy.deepcopy(self.generator)  # drawing moves the running statistics of its norms
        cuda = [torch.cuda.current_device()] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(c.seed)
            batches = []
            for number in range(c.refined_images // c.batch_size):
                if c.random_shapes and number % 2:
                    images = own_part(random_shapes(c.batch_size, c.image_size, self.device))
                    labels = own_part(torch.randint(0, generator.classes, (c.batch_size,), device=self.device))
                else:
                    images, labels = self._draw_varied(generator)
                with self._autocast():
                    images = refine(self.teacher, images, labels)
                batches.append((gather(images), gather(labels)))
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.refined, self.refined_labels = images.contiguous(memory_format=torch.channels_last), labels

    @staticmethod
    def _seen(images: Tensor, teacher: Tensor, labels: Tensor, bn: Tensor) -> dict[str, Tensor]:
        """What a history says of the images: teacher's accuracy on them in percent, distance to the statistics."""
        hits = (teacher.argmax(1) == labels).float().mean() * 100
        return {"bn_loss": bn.detach(), "teacher_top1": hits, "diversity": diversity(images.detach())}

    def _update(self, name: str, params: list[nn.Parameter], loss: Tensor, retain_graph: bool = False) -> None:
        # autograd.grad computes what leads to these parameters and fills no other .grad
        grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
        average_gradients([g for g in grads if g is not None])
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        self.optimizers[name].step()

    def run_epoch(self, evaluate: Callable[[nn.Module], float] | None) -> dict[str, float]:
        """One epoch of iterations, the test accuracy behind it, and a row in the history."""
        c, start = self.config, time.perf_counter()
        training = self.epoch >= c.warmup_epochs
        self.generator.train()
        if not c.warmup_epochs and self.epoch == 0:
            self._begin_training(evaluate)
        sums: dict[str, Tensor] = {}
        for iteration in range(c.iterations):
            self._set_rates(iteration)
            for key, value in self.step(training).items():
                sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value
        row = {"epoch": self.epoch + 1, "warmup": not training} | {k: v.item() / c.iterations for k, v in sums.items()}
        if not all(math.isfinite(row.get(loss, 0.0)) for loss in ("generator_loss", "student_loss")):
            raise FloatingPointError(f"a loss is not finite in epoch {self.epoch + 1}; lower the learning rates")
        self.epoch += 1
        row["test_top1"] = self._measure(evaluate) if training else math.nan
        if self.epoch == c.warmup_epochs:
            self._begin_training(evaluate)
            row["test_top1"] = self.ptq_top1
        self.seconds += time.perf_counter() - start
        self.rows.append(row)
        return row

    def _set_rates(self, iteration: int) -> None:
        """Learning rates decay tenfold at the milestones; in recipe ``layers`` also as a cosine (SGDR, 2017)."""
        c = self.config
        decay = 0.1 ** sum(self.epoch >= milestone for milestone in c.milestones)
        if c.recipe == "layers":
            done = (self.epoch + iteration / c.iterations - c.warmup_epochs) / (c.epochs - c.warmup_epochs or 1)
            decay *= (1 + math.cos(math.pi * max(done, 0))) / 2
        for name, lr in (("student", c.student_lr), ("generator", c.generator_lr)):
            for group in self.optimizers[name].param_groups:
                group["lr"] = lr * decay * group.get("rate", 1)

    def _begin_training(self, evaluate: Callable[[nn.Module], float] | None) -> None:
        """The student as its training finds it: ranges frozen, accuracy measured."""
        c = self.config

        def draw(count: int) -> list[Tensor]:
            return [self._draw()[0] for _ in range(count)]

        if c.refined_images:
            self._refine_images()
        if not c.warmup_epochs or c.range_quantile < 1:  # ranges of other values than a warm-up tracks, or of none yet
            calibrate(self.student, draw(CALIBRATION), c.range_quantile, full_precision=c.recipe == "layers")
        freeze_ranges(self.student)
        if c.pixel_range and self.pixels:
            low, high = self.pixels
            outside = (1 - c.pixel_range) / 2 * (high - low)
            set_image_range(self.student, low + outside, high - outside)
        if c.reestimate_batchnorm:
            reestimate_batchnorm(self.student, self.teacher, torch.cat(draw(REESTIMATION)))
        if c.learned_steps:
            learn_steps(self.student)
            self._optimize_student()
        self.ptq_top1 = self._measure(evaluate)

    def _measure(self, evaluate: Callable[[nn.Module], float] | None) -> float:
        """``evaluate(student)`` in the first process, known to all; what it draws is undone, as a DataLoader draws."""
        cuda = [torch.cuda.current_device()] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(cuda), frozen_ranges(self.student):
            return float(from_first(evaluate(self.student) if evaluate and world()[0] == 0 else math.nan))

    def state(self) -> dict[str, Any]:
        """Everything needed to continue, as tensors and plain values."""
        return {
            "epoch": self.epoch,
            "student": self.student.state_dict(),
            "generator": self.generator.state_dict(),
            **{f"{k}_optimizer": o.state_dict() for k, o in self.optimizers.items()},
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if self.device.startswith("cuda") else None,
            "rows": self.rows,
            "ptq_top1": self.ptq_top1,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])  # with learned steps, if there were
        self._optimize_student()
        self.generator.load_state_dict(state["generator"])
        if self.config.refined_images and state["epoch"] >= self.config.warmup_epochs:
            self._refine_images()
        for k in self.optimizers:
            self.optimizers[k].load_state_dict(state[f"{k}_optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"].cpu())
        self.epoch, self.rows, self.ptq_top1 = state["epoch"], state["rows"], state["ptq_top1"]
        self.seconds = state["seconds"]
        freeze_ranges(self.student, self.epoch >= self.config.warmup_epochs)


@typed
def train(
    teacher: nn.Module,
    config: QATConfig,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    facts: dict[str, Any] | None = None,
    generator: Generator | None = None,
    pixels: Bounds | None = None,
) -> Result:
    """Quantize ``teacher`` without data and fine-tune the student on generated images.

    Args:
        teacher: network with BatchNorm2d layers; a copy of it is used, the caller's stays as it is.
        config: the settings.
        evaluate: student -> test accuracy in percent, called at the end of the warm-up and after every epoch behind it;
            it never influences training.
        out: run folder (``granq.runs``), new or empty; checkpoint and history are replaced after every epoch.
        resume: continue the run in ``out``; the end is bit for bit that of an uninterrupted run on the CPU.
        facts: what ``config.json`` keeps besides the settings.
        generator: start from a copy of this one, such as ``load_generator`` gives, instead of a new one. With
            ``warmup_epochs=0`` several schemes then start from the same images.
        pixels: lowest and highest value of each channel of an image (1, 3, 1, 1), for ``config.pixel_range``.

    Within a process group (``granq.distributed``) the processes share every batch; the first one measures and writes.

    Raises:
        ValueError: ``out`` holds files and ``resume`` is False, is in use, or belongs to another run; ``teacher``
            cannot take images of 3 channels, gives no logits (N, classes), or has no BatchNorm2d with running
            statistics; or its traced copy computes something else.
        FloatingPointError: a loss became NaN or infinite; the last checkpoint stays.
    """
    folder = RunFolder(out) if out and world()[0] == 0 else None
    if folder:
        folder.check_free(resume)
    with folder.claimed() if folder else nullcontext(), _deterministic(config.deterministic):
        trainer = Trainer(teacher, config, generator, pixels)
        identity = fingerprint(asdict(config), trainer.teacher, *([generator] if generator else [])) if folder else ""
        saved = from_first(folder.load(identity, trainer.device) if folder and resume else None)
        if saved:
            trainer.restore(saved)
        here = versions(trainer.device)
        if folder and saved is None:  # nothing is trained yet: a config that is there may be of another teacher
            folder.write_config(asdict(config), (facts or {}) | {"versions": here})
        elif folder and (began := folder.read_config().get("versions")) != here:
            warnings.warn(f"{out} began with {began} and goes on with {here}: the last bits may differ", stacklevel=2)
        name = f"{config.scheme} W{config.weight_bits}A{config.act_bits} seed {config.seed}"
        silent, troubled = world()[0] > 0, False
        with tqdm(total=config.epochs, initial=trainer.epoch, desc=name, unit="epoch", disable=silent) as progress:
            while trainer.epoch < config.epochs:
                row = trainer.run_epoch(evaluate)
                test, top1, bn = (row[k] for k in ("test_top1", "teacher_top1", "bn_loss"))
                progress.set_postfix(test=f"{test:.1f}%", teacher=f"{top1:.0f}%", bn=f"{bn:.2f}")
                progress.update()
                trouble = generator_trouble(row, trainer.generator.classes)
                if trouble and not troubled and not silent:  # said when it begins, not in every epoch
                    progress.write(f"epoch {trainer.epoch}: {trouble}", file=sys.stderr)
                troubled = bool(trouble)
                if folder:
                    folder.save(trainer.state() | {"fingerprint": identity}, trainer.rows)
    history = pd.DataFrame(trainer.rows)
    trained = history.loc[~history.warmup.astype(bool), "test_top1"]
    last, best = (trained.iloc[-1], trained.max()) if len(trained) else (trainer.ptq_top1,) * 2
    return Result(
        trainer.student,
        trainer.generator,
        config,
        history,
        trainer.ptq_top1,
        float(last),
        float(best),
        trainer.seconds,
    )


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(wanted or before, warn_only=warns and not wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
