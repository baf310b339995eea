"""The settings of a run. Imports no torch.

``QATConfig`` has all of them, flat: ``QATConfig(epochs=4)``, ``--epochs 4``, CSV column ``epochs``.
"""

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from granq.schemes import Scheme, get_scheme

Bits = Annotated[int, Field(ge=2, le=8)]
Rate = Annotated[float, Field(gt=0)]


class Run(BaseModel):
    """How long a run is, and where it computes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    epochs: int = Field(10, ge=1, description="epochs in all")
    iterations: int = Field(100, ge=1, description="iterations of an epoch")
    batch_size: int = Field(64, ge=1, description="generated images of an iteration")
    warmup_epochs: int = Field(4, ge=0, description="epochs at the start in which the generator learns alone")
    image_size: int = Field(32, ge=4, multiple_of=4, description="side of the images in pixels")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything that draws")
    device: str = Field("auto", description="auto, cpu, cuda or mps")
    bf16: bool = Field(False, description="train under bfloat16 autocast; accuracies stay those of float32")


class Quantization(BaseModel):
    """What the student's numbers may be."""

    scheme: str | Scheme = Field("granq", description="granq, strict, layerwise, per_channel or foldable")
    weight_bits: Bits = Field(3, description="width of weights")
    act_bits: Bits = Field(3, description="width of activations")
    image_bits: Bits | Literal[0] = Field(
        0, description="the image's own width, such as 6, whatever the other widths are; 0: as activations"
    )
    layer_bits: dict[str, tuple[Bits | Literal[0], Bits | Literal[0]]] = Field(
        {}, description="widths of single layers, such as conv1 8 8 fc 4 3: weights, activations; 0: full precision"
    )
    auto_bits: float = Field(0.0, ge=0, le=8, description="average for which layer_bits were chosen; 0: by hand")

    @property
    def bits(self) -> str:
        """Return a name: W3A3, W2.5A2.5 for an average, W3A32 for weights alone."""
        scheme = get_scheme(self.scheme)
        given = ((scheme.weights, self.weight_bits), (scheme.activations, self.act_bits))
        weights, activations = (self.auto_bits or bits if quantized else 32 for quantized, bits in given)
        return f"W{weights:g}A{activations:g}"


class Losses(BaseModel):
    """What generator and student minimize, and how fast. Weights as in docs/method.md, section 5."""

    recipe: Literal["adadfq", "gdfq", "match"] = Field("adadfq", description="whose losses; match is our own")
    student_lr: Rate = Field(1e-4, description="peak learning rate of the student; of match 5e-4")
    generator_lr: Rate = Field(1e-3, description="learning rate of the generator")
    generator_epochs: int = Field(0, ge=0, description="epochs after which the generator no longer learns; 0: never")
    milestones: tuple[int, ...] = Field((), description="epochs at which both rates fall to a tenth")
    temperature: Rate = Field(20.0, description="of the student's loss")
    alpha_ds: float = Field(0.2, description="weight of the disagreement loss")
    alpha_as: float = Field(0.1, description="weight of the agreement loss")
    lambda_l: float = Field(0.1, description="lower margin of the entropy")
    lambda_u: float = Field(0.8, description="upper margin of the entropy")
    gamma: float = Field(1.0, description="weight of the BatchNorm loss")
    refined_images: int = Field(0, ge=0, description="match: images refined once, by default 32 batches; 0: drawn anew")


class QATConfig(Losses, Quantization, Run):
    """Everything that decides a run besides the teacher. Defaults: CIFAR, a short budget.

    Raises pydantic's ValidationError, a ValueError, for a wrong type, range or name, and for what contradicts itself.
    """

    @model_validator(mode="after")
    def _consistent(self) -> "QATConfig":
        if self.recipe == "match":
            own = {"student_lr": 5e-4, "refined_images": 32 * self.batch_size}
            vars(self).update({name: own[name] for name in own.keys() - self.model_fields_set})
        scheme, refined = get_scheme(self.scheme), self.refined_images
        image = scheme.activations and scheme.places == "inputs"
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must be at most epochs, {self.epochs}")
        if self.image_bits and not image:
            raise ValueError(f"image_bits needs a scheme that quantizes the image, not {self.scheme}")
        if refined % self.batch_size:
            raise ValueError(f"refined_images must be a multiple of batch_size, {self.batch_size}")
        if refined and self.recipe != "match":
            raise ValueError("refined_images is for recipe match: in others the generator learns")
        return self

    def change(self, **changes: Any) -> Self:
        """Return these settings with other values, checked again; what was never set follows the recipe."""
        return type(self)(**({name: getattr(self, name) for name in self.model_fields_set} | changes))

    @classmethod
    def paper(cls, data: str, network: str, bits: int, **changes: Any) -> "QATConfig":
        """Return the published settings (docs/method.md, section 6), by data, network, width and image size."""
        chosen: dict[str, Any] = {"weight_bits": bits, "act_bits": bits, "iterations": 200}
        holds = PurePath(data).name + network  # a folder is called as what it holds
        if "cifar" in holds or data == "digits" or changes.get("image_size", 224) <= 64:
            batch = 200 if "cifar100" in holds else 16
            chosen |= dict(epochs=200, batch_size=batch, milestones=(100, 200, 300))
            return cls(**(chosen | changes))
        chosen |= dict(epochs=400, batch_size=16, image_size=224, temperature=5.0, student_lr=1e-5)
        chosen["milestones"] = (350, 400)
        if "resnet50" in network:
            chosen |= dict(student_lr=1e-4, warmup_epochs=50, lambda_l=0.4 if bits == 3 else 0.3)
            chosen["milestones"] = {3: (150, 300, 400), 4: (200, 300, 400)}.get(bits, (350, 400))
            chosen["alpha_ds"] = 0.1 if bits == 4 else 0.2
        elif "mobilenet" in network:
            chosen["alpha_ds"] = 0.3 if bits == 4 else 0.2
        else:
            chosen |= dict(warmup_epochs=50, alpha_ds=0.3 if bits == 5 else 0.2, lambda_l=0.1 if bits == 3 else 0.3)
        return cls(**(chosen | changes))
