"""The settings of a run: everything that decides it besides the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from torch import fx, nn

from granq.checks import check_image_size, one_of
from granq.convert import Scheme, get_scheme, quantize_model

RECIPES = ("adadfq", "gdfq", "layers")


@dataclass(frozen=True)
class QATConfig:
    """Everything that decides a run besides the teacher. Defaults: CIFAR, docs/method.md section 6, a short budget."""

    scheme: str | Scheme = "release"
    weight_bits: int = 3
    act_bits: int = 3
    image_bits: int = 0  # of the image, with static ranges best beside pixel_range=1; 0: act_bits
    recipe: str = "adadfq"
    epochs: int = 10
    iterations: int = 100  # per epoch
    batch_size: int = 64
    warmup_epochs: int = 4  # the generator alone
    student_lr: float = 1e-4
    generator_lr: float = 1e-3
    milestones: tuple[int, ...] = ()
    range_quantile: float = 1.0  # of static ranges, set anew before the student trains if below 1; see calibrate
    pixel_range: float = 0.0  # static range of the image: this share of that of all pixels; 0: of generated images
    reestimate_batchnorm: bool = False  # before the student trains; see calibration
    refined_images: int = 0  # recipe layers trains on this many, made once (generator.refine); 0: on new ones each time
    random_shapes: bool = False  # every other batch of refined images is made from generator.random_shapes
    learned_steps: bool = False  # quantization steps are trained too; see calibration
    temperature: float = 20.0
    alpha_ds: float = 0.2
    alpha_as: float = 0.1
    lambda_l: float = 0.1
    lambda_u: float = 0.8
    gamma: float = 1.0
    image_size: int = 32
    seed: int = 0
    device: str = "auto"
    deterministic: bool = False  # on CUDA; on the CPU every run is
    bf16: bool = False  # training computes under bfloat16 autocast; weights, ranges, losses and tests stay in float32

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits = isinstance(value, (int, float) if kind is float else kind)
            fits &= kind is bool or not isinstance(value, bool)
            if kind is tuple:
                fits = isinstance(value, tuple) and all(type(v) is int for v in value)
            if field.name == "scheme":
                fits = isinstance(value, str | Scheme)
            if not fits:
                raise TypeError(f"{field.name} must be {kind.__name__}, such as {field.default!r}; got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value}")
        one_of("recipe", self.recipe, RECIPES)
        scheme = get_scheme(self.scheme)
        for name in ("weight_bits", "act_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise ValueError(f"{name} must be from 2 to 8, got {getattr(self, name)}")
        if self.image_bits and not (2 <= self.image_bits <= 8 and scheme.activations and scheme.places == "inputs"):
            raise ValueError(
                f"image_bits must be from 2 to 8, with a scheme that quantizes the image, or 0; got {self.image_bits} "
                f"and {self.scheme}"
            )
        for name in ("epochs", "iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("student_lr", "generator_lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0.5 < self.range_quantile <= 1:
            raise ValueError(f"range_quantile must be above 0.5 and at most 1, got {self.range_quantile}")
        if not 0 <= self.pixel_range <= 1:
            raise ValueError(f"pixel_range must be from 0 to 1, got {self.pixel_range}")
        if self.pixel_range and not (scheme.tracked and scheme.places == "inputs"):
            raise ValueError(f"pixel_range needs a scheme with a static range for the image; {self.scheme} has none")
        if self.refined_images < 0 or self.refined_images % self.batch_size:
            raise ValueError(
                f"refined_images must be a multiple of the batch size {self.batch_size}, got {self.refined_images}"
            )
        if self.refined_images and self.recipe != "layers":
            raise ValueError("refined_images is for recipe layers: in the others the generator trains on")
        if self.random_shapes and not self.refined_images:
            raise ValueError("random_shapes are images to refine: needs refined_images above 0")
        if self.learned_steps and not scheme.clamp:
            raise ValueError(f"learned_steps needs a scheme that clamps its codes, which {self.scheme} does not")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs must be from 0 to epochs = {self.epochs}, got {self.warmup_epochs}")
        check_image_size(self.image_size)

    def quantized(self, model: nn.Module) -> fx.GraphModule:
        """A copy of ``model`` quantized as these settings say: ``quantize_model``."""
        return quantize_model(model, self.scheme, self.weight_bits, self.act_bits, self.image_bits or None)

    @classmethod
    def paper(cls, dataset: str, network: str, bits: int, **changes: Any) -> QATConfig:
        """The published settings (docs/method.md section 6) for CIFAR ResNet-20, ResNet-18/50 and MobileNetV2."""
        common: dict[str, Any] = {"weight_bits": bits, "act_bits": bits, "iterations": 200}
        if dataset in ("cifar10", "cifar100", "digits") or "cifar" in network:
            chosen = dict(epochs=200, batch_size=200, milestones=(100, 200, 300))
        else:
            chosen = dict(
                epochs=400,
                batch_size=16,
                temperature=5.0,
                student_lr=1e-5,
                milestones=(350, 400),
                image_size=224,
            )
            if "resnet50" in network:
                steps = {3: (150, 300, 400), 4: (200, 300, 400)}.get(bits, (350, 400))
                chosen |= dict(student_lr=1e-4, milestones=steps, warmup_epochs=50)
                chosen |= dict(lambda_l=0.4 if bits == 3 else 0.3, alpha_ds=0.1 if bits == 4 else 0.2)
            elif "mobilenet" in network:
                chosen |= dict(alpha_ds=0.3 if bits == 4 else 0.2)
            else:
                chosen |= dict(warmup_epochs=50, alpha_ds=0.3 if bits == 5 else 0.2, lambda_l=0.1 if bits == 3 else 0.3)
        return cls(**(common | chosen | changes))

    @classmethod
    def layers(cls, **changes: Any) -> QATConfig:
        """Recipe ``layers`` with what belongs to it where the scheme allows; what each buys: ``docs/moonshot.md``."""
        scheme = get_scheme(changes.get("scheme", cls.scheme))
        chosen: dict[str, Any] = {"recipe": "layers", "student_lr": 5e-4, "reestimate_batchnorm": True}
        chosen["refined_images"] = 32 * changes.get("batch_size", cls.batch_size)
        chosen["random_shapes"] = bool(changes.get("refined_images", chosen["refined_images"]))
        chosen |= {"learned_steps": scheme.clamp, "range_quantile": 0.99 if scheme.tracked else 1.0}
        return cls(**(chosen | changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QATConfig:
        """From parsed JSON; unknown keys are refused."""
        if not isinstance(values, dict):
            raise TypeError(f"settings are a dictionary, got {type(values).__name__}")
        if unknown := values.keys() - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        steps, scheme = values.get("milestones", ()), values.get("scheme", cls.scheme)
        if isinstance(scheme, dict):  # one of the user's own
            scheme = Scheme(**(scheme | {"skip": tuple(scheme.get("skip", ()))}))
        read = {"milestones": tuple(steps) if isinstance(steps, list) else steps, "scheme": scheme}
        return cls(**(values | read))
