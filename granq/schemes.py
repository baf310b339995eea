"""Schemes: what is quantized, and how, as data. Imports no torch, so that the command line answers at once."""

import operator
from typing import Literal, SupportsIndex, get_args

from pydantic import BaseModel, model_validator

from granq.errors import UserError, one_of

#: Which values share a range; ``quantizer._KEPT_DIMS`` says which dimensions that leaves apart.
Granularity = Literal["per_tensor", "per_channel", "per_sample", "per_sample_channel", "per_out_channel", "per_kernel"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


class Scheme(BaseModel, frozen=True, extra="forbid"):
    """What is quantized, and how. Two schemes differ in what their fields say and in nothing else."""

    #: of weights; None leaves them in full precision
    weights: Literal["per_tensor", "per_out_channel", "per_kernel"] | None
    #: of activations, likewise
    activations: Literal["per_tensor", "per_channel", "per_sample", "per_sample_channel"] | None
    tracked: bool = False  #: ranges are a moving average, then frozen (static); otherwise each tensor's own (dynamic)
    places: Literal["relu", "inputs"] = "inputs"  #: after every ReLU and ReLU6, or in front of every layer
    clamp: bool = True  #: keep codes within their range
    promote: bool = True  #: compute the ranges of half-precision tensors in float32
    skip: tuple[str, ...] = ()  #: layers whose weights (and own ``inputs``) stay, or modules with all that they hold
    fold: bool = False  #: multiply weights by the steps of their inputs before they are quantized: integer convolutions

    @model_validator(mode="after")
    def _consistent(self) -> "Scheme":
        static = self.tracked and self.activations in ("per_channel", "per_tensor")
        if self.tracked and self.activations and not static:
            raise ValueError(f"{self.activations} ranges belong to single images: only per_channel or per_tensor track")
        folds = static and self.clamp and self.places == "inputs" and self.weights in ("per_out_channel", "per_tensor")
        if self.fold and not folds:
            raise ValueError("only clamped, tracked inputs fold, into weights per_out_channel or per_tensor")
        return self


#: docs/method.md, section 2. ``layerwise`` and ``per_channel`` quantize where ``granq`` does, so that they differ from
#: it in granularity and tracking only; ``strict`` and ``foldable`` quantize the input of every layer.
SCHEMES: dict[str, Scheme] = {
    "granq": Scheme(weights="per_kernel", activations="per_sample_channel", places="relu", clamp=False, promote=False),
    "strict": Scheme(weights="per_out_channel", activations="per_sample_channel"),
    "layerwise": Scheme(weights="per_out_channel", activations="per_tensor", tracked=True, places="relu"),
    "per_channel": Scheme(weights="per_out_channel", activations="per_channel", tracked=True, places="relu"),
    "foldable": Scheme(weights="per_out_channel", activations="per_channel", tracked=True, fold=True),
}


def get_scheme(scheme: str | Scheme) -> Scheme:
    """Look a scheme up by name; a ``Scheme`` is returned as it is. Raises UserError that lists the known names."""
    if isinstance(scheme, Scheme):
        return scheme
    one_of("scheme", scheme, SCHEMES)
    return SCHEMES[scheme]


def check_bits(bits: SupportsIndex) -> int:
    """Return a width as Python's int, whose powers do not overflow. Raises UserError unless it is from 2 to 8."""
    if not 2 <= operator.index(bits) <= 8:
        raise UserError(f"bits must be an integer from 2 to 8, got {bits}")
    return operator.index(bits)
