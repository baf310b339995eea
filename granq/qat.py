"""Zero-shot quantization-aware training: generator and low-bit student play AdaDFQ's game (docs/method.md, section 5).

One step draws images, runs teacher and student once each, and takes both gradients from these two forwards: the
generator's loss with respect to the generator only, the student's with respect to the student only. During the warm-up
the generator learns alone. A *recipe* says what both minimize; ``match`` adds a third one on top of this file.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from granq.config import QATConfig
from granq.convert import calibrate, check_copy, layer_quantizers, quantize_model, tracking
from granq.devices import own_random_state, resolve_device
from granq.errors import UserError
from granq.generator import batchnorm_inputs, batchnorm_loss, build_generator, synthesize
from granq.graph import plain_copy
from granq.losses import agreement_loss, disagreement_loss, gdfq_student_loss, margin_loss, student_loss
from granq.models import count_classes
from granq.quantizer import at_least_float32

CALIBRATION = 20  # batches that set static ranges if there is no warm-up: 1 - 0.9^20, 88 % of the average, are theirs
Evaluate = Callable[[nn.Module], float]


class AdaDFQ:
    """Recipe adadfq: images on which the two disagree, but not too much; the student asks for equal logits."""

    adversarial = True  # the generator's loss looks at the student
    rates: dict[type[nn.Module], int] = {}  # times student_lr, for the parameters of such modules

    def __init__(self, config: QATConfig) -> None:
        self.config = config

    def generator_loss(self, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """Return what the generator minimizes besides the BatchNorm loss. Logits (N, K), labels (N,)."""
        c = self.config
        loss = c.alpha_ds * disagreement_loss(t, s, labels) + c.alpha_as * agreement_loss(t, s, labels)
        return loss + margin_loss(t, s, c.lambda_l, c.lambda_u)

    def student_loss(self, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return student_loss(t, s, self.config.temperature)

    def draw(self, game: "Game") -> tuple[Tensor, Tensor]:
        """Draw images and labels that prepare the student."""
        return synthesize(game.generator, self.config.batch_size, game.classes, game.device)

    def prepare(self, game: "Game") -> None:
        """Make the student ready to be trained when the warm-up ends; its ranges are frozen then."""
        if not self.config.warmup_epochs:  # in which they are tracked
            calibrate(game.student, [self.draw(game)[0] for _ in range(CALIBRATION)])

    def step(self, game: "Game") -> dict[str, Tensor]:
        return game.play(train_student=True)

    def decay(self, done: float) -> float:
        """Return the factor of the learning rates after this share of the student's training."""
        return 1.0

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=1e-4)


class GDFQ(AdaDFQ):
    """Recipe gdfq: images whose label the teacher knows; the student learns labels and the teacher's probabilities."""

    adversarial = False

    def generator_loss(self, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(t, labels)

    def student_loss(self, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return gdfq_student_loss(t, s, labels)


def quantized(model: nn.Module, config: QATConfig) -> fx.GraphModule:
    """Return a copy of ``model`` quantized as the settings say."""
    c = config
    if c.auto_bits and not c.layer_bits:
        raise UserError("auto_bits is a record of how layer_bits were chosen, which are not given; see allocate_bits")
    return quantize_model(model, c.scheme, c.weight_bits, c.act_bits, c.image_bits or None, c.layer_bits)


class Game:
    """One run in memory: networks, optimizers, history. ``play`` is the method.

    Teacher, settings, generator and pixels are those of ``granq.train``. Raises UserError if the teacher cannot take
    such images, gives no logits (N, K), has no BatchNorm2d with running statistics, or if its traced copy computes
    something else.
    """

    def __init__(
        self, teacher: nn.Module, config: QATConfig, recipe: AdaDFQ, generator: nn.Module | None = None,
        pixels: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.recipe = config, recipe
        self.device = resolve_device(config.device)
        self.pixels = (pixels[0].to(self.device), pixels[1].to(self.device)) if pixels else None
        torch.manual_seed(config.seed)  # before the generator is built: its initial weights belong to the seed
        teacher = copy.deepcopy(teacher).to(self.device).eval()
        self.teacher = plain_copy(teacher, traced=True).requires_grad_(False)  # so that both take images in any layout
        self.student = quantized(teacher, config)
        for parameter in self.student.parameters():  # also of a teacher that was frozen
            parameter.requires_grad_(parameter.is_floating_point())
        self.classes = self._check_networks(teacher)
        new = build_generator(self.classes, config.image_size)  # in any case: what is drawn later stays the same
        self.generator: nn.Module = copy.deepcopy(generator) if generator is not None else new
        self.generator.to(self.device).to(memory_format=torch.channels_last)
        size, classes = config.image_size, getattr(self.generator, "classes", self.classes)
        with torch.no_grad(), own_random_state(self.device):  # a network for any size would not notice another
            drawn = synthesize(copy.deepcopy(self.generator), 2, 1, self.device)[0].shape
        if (classes, *drawn) != (self.classes, 2, 3, size, size):
            found = f"{classes} classes and {tuple(drawn)} for two labels"
            raise UserError(f"the generator draws {found}; wanted are {self.classes} classes and {size} pixels")
        self.generator_params = [p for p in self.generator.parameters() if p.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if self.generator_params:  # a frozen one only draws
            adam = torch.optim.Adam(self.generator_params, config.generator_lr, betas=(0.5, 0.999))
            self.optimizers["generator"] = adam
        self.optimize_student()
        self.epoch, self.rows, self.ptq_top1, self.seconds = 0, list[dict[str, float]](), math.nan, 0.0
        self.codes = torch.empty(0)  # of all weights, after the last epoch

    @torch.no_grad()
    def _check_networks(self, teacher: nn.Module) -> int:
        """Return the number of classes; refuse now what no later step would notice."""
        shape = (1, 3, self.config.image_size, self.config.image_size)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)  # the run's state stays
        with batchnorm_inputs(self.teacher) as norms:
            classes = count_classes(self.teacher, "the teacher", image)
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.teacher.modules()):
            raise UserError("the teacher has SyncBatchNorm, which no recipe sees: make BatchNorm2d of it first")
        batchnorm_loss(norms)  # raises if there are none
        check_copy(self.student, teacher, image)
        return classes

    def optimize_student(self) -> None:
        """Build the student's optimizer anew, for the parameters that it has now."""
        owned = [(p, m) for m in self.student.modules() for p in m.parameters(recurse=False) if p.requires_grad]
        faster = self.recipe.rates.items()
        rates = {p: next((rate for kind, rate in faster if isinstance(m, kind)), 1) for p, m in owned}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rates if rates[p] == r], "rate": r} for r in sorted({*rates.values()})
        ]
        self.student_params = [p for group in groups for p in group["params"]]
        self.optimizers["student"] = self.recipe.optimizer(groups, self.config.student_lr)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.bf16)

    def play(self, train_student: bool) -> dict[str, Tensor]:
        """Train the generator for one iteration, and the student, too, if told so; return losses, detached."""
        c, recipe = self.config, self.recipe
        with self.autocast():
            images, labels = synthesize(self.generator, c.batch_size, self.classes, self.device)
            with batchnorm_inputs(self.teacher) as norms:
                t = self.teacher(images)
            with torch.set_grad_enabled(train_student or recipe.adversarial), tracking(self.student, not train_student):
                s = self.student(images)
        t, s = at_least_float32(t), at_least_float32(s)
        bn = batchnorm_loss(norms)
        generator_loss = recipe.generator_loss(t, s, labels) + c.gamma * bn
        student_loss = recipe.student_loss(t.detach(), s, labels)
        if self.generator_params and self.epoch < (c.generator_epochs or c.epochs):
            self.update("generator", self.generator_params, generator_loss, retain_graph=train_student)
        if train_student:
            self.update("student", self.student_params, student_loss)
        losses = {"generator_loss": generator_loss, "student_loss": student_loss, "bn_loss": bn}
        return {k: loss.detach() for k, loss in losses.items()} | describe_images(images, t.detach(), labels)

    def update(self, name: str, params: list[nn.Parameter], loss: Tensor, retain_graph: bool = False) -> None:
        """Take one step of an optimizer; gradients of no other parameters are computed."""
        grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        self.optimizers[name].step()

    def run_epoch(self, evaluate: Evaluate | None) -> dict[str, float]:
        """Run one epoch, measure the student on test images after it, and return its row of the history."""
        c, start = self.config, time.perf_counter()
        training = self.epoch >= c.warmup_epochs
        self.generator.train()
        for network in (self.teacher, self.student):  # whoever looked at them in between
            network.eval()
        if not c.warmup_epochs and self.epoch == 0:
            self._begin_training(evaluate)
        sums: dict[str, Tensor] = {}
        for iteration in range(c.iterations):
            self._set_rates(iteration)
            for key, value in (self.recipe.step(self) if training else self.play(train_student=False)).items():
                sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value
        row = {"epoch": self.epoch + 1, "warmup": not training} | {k: v.item() / c.iterations for k, v in sums.items()}
        if not all(math.isfinite(row.get(loss, 0.0)) for loss in ("generator_loss", "student_loss")):
            raise FloatingPointError(f"a loss is not finite in epoch {self.epoch + 1}; lower the learning rates")
        self.epoch += 1
        row["codes_changed"] = self._codes_changed()
        row["test_top1"] = self._measure(evaluate) if training else math.nan
        if self.epoch == c.warmup_epochs:
            self._begin_training(evaluate)
            row["test_top1"] = self.ptq_top1
        self.seconds += time.perf_counter() - start
        self.rows.append(row)
        return row

    @torch.no_grad()
    def _codes_changed(self) -> float:
        """Return the percentage of weights whose code changed in this epoch; NaN where there is nothing to compare."""
        layers = [(q.weight, q.original) for q in layer_quantizers(self.student).values()]
        rows = [quantizer.codes(weight).flatten().to(torch.int16) for quantizer, weight in layers if quantizer]
        before, self.codes = self.codes, torch.cat([torch.empty(0, dtype=torch.int16, device=self.device), *rows])
        return 100 * (self.codes != before).float().mean().item() if len(before) else math.nan

    def _set_rates(self, iteration: int) -> None:
        """Learning rates decay tenfold at the milestones, and as the recipe says."""
        c = self.config
        decay = 0.1 ** sum(self.epoch >= milestone for milestone in c.milestones)
        done = (self.epoch + iteration / c.iterations - c.warmup_epochs) / (c.epochs - c.warmup_epochs or 1)
        decay *= self.recipe.decay(max(done, 0))
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = (c.student_lr if name == "student" else c.generator_lr) * decay * group.get("rate", 1)

    def _begin_training(self, evaluate: Evaluate | None) -> None:
        """Prepare the student and measure it: ranges stay from here on."""
        with torch.no_grad():
            self.recipe.prepare(self)
        self.optimize_student()
        self.ptq_top1 = self._measure(evaluate)

    def _measure(self, evaluate: Evaluate | None) -> float:
        """Evaluate a copy of the student: modes, statistics and ranges stay, and the random numbers of a run, too."""
        with own_random_state(self.device):
            return float(evaluate(copy.deepcopy(self.student))) if evaluate else math.nan

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue, as tensors and plain values."""
        return {
            "student": self.student.state_dict(),
            "generator": self.generator.state_dict(),
            **{f"{k}_optimizer": o.state_dict() for k, o in self.optimizers.items()},
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if self.device.startswith("cuda") else None,
            **{k: getattr(self, k) for k in ("epoch", "rows", "ptq_top1", "seconds", "codes")},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])  # with learned steps, if there were
        self.optimize_student()
        self.generator.load_state_dict(state["generator"])
        for k, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[f"{k}_optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"].cpu())
        for k in ("epoch", "rows", "ptq_top1", "seconds", "codes"):
            setattr(self, k, state[k])


def describe_images(images: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return what a history says of images: the teacher's accuracy in percent, and their diversity."""
    hits = (teacher.argmax(1) == labels).float().mean() * 100
    return {"teacher_top1": hits, "diversity": diversity(images.detach())}


def diversity(images: Tensor) -> Tensor:
    """Share of the variance of images (N, C, H, W) that is between images: 1 - 1/N of noise, NaN of one image."""
    whole = images.var((0, 2, 3), correction=0).mean().clamp_min(1e-12)
    return images.var(0, correction=0).mean() / whole if len(images) > 1 else whole * math.nan
