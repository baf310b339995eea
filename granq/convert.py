"""Put quantizers into a model, and keep their state: everything that knows a quantizer's ranges is in this file.

Weights become parametrizations of their layer. Activations become ``ActQuantizer`` modules in a rewritten ``torch.fx``
graph, so that a ReLU module used twice, ``F.relu`` and ``x.relu_()`` each count as the place they are.
"""

import copy
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from granq.errors import UserError
from granq.graph import LAYERS, calls_of_layers, find_places, insert_call, layer_input, module_of, to_module, trace
from granq.hooks import Batch, eval_mode, images_of, temporarily
from granq.quantizer import QParams, at_least_float32, fake_quantize, fake_quantize_with, min_max, qparams_from_range
from granq.ranges import LearnedSteps, fake_quantize_learned, quantile_range
from granq.schemes import Scheme, check_bits, get_scheme


class Quantizer(nn.Module):
    """What quantizers of weights and activations share: steps that may be learned."""

    def __init__(self, bits: int, granularity: str, scheme: Scheme) -> None:
        super().__init__()
        self.bits, self.granularity, self.clamp, self.promote = bits, granularity, scheme.clamp, scheme.promote
        self.learned: LearnedSteps | None = None
        self.bypassed = False  # nothing is quantized

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}learned.log_step")
        if saved is not None:  # a student whose steps were learned
            self.learned = LearnedSteps(saved.exp(), torch.empty_like(saved)).to(saved.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class WeightQuantizer(Quantizer):
    """Parametrization of a layer's weight: (O, I, kh, kw) or (O, I) -> the same, fake-quantized.

    With ``source``, the quantizer of the layer's input, the weight is quantized in units of the input's steps: the
    integers of ``qparams`` are then all that an integer convolution needs.
    """

    source: "ActQuantizer | None"

    def __init__(self, bits: int, scheme: Scheme, groups: int, source: "ActQuantizer | None" = None) -> None:
        super().__init__(bits, cast(str, scheme.weights), scheme)
        self.groups = groups
        object.__setattr__(self, "source", source)  # the quantizer of the layer's input does not become our submodule

    def forward(self, weight: Tensor) -> Tensor:
        if self.bypassed:
            return weight
        if self.learned is None and self.source is None:
            return fake_quantize(weight, self.bits, self.granularity, self.clamp, promote=self.promote)
        step = self.input_step(weight)
        if self.learned is not None:  # the input's step learns from here too: folded, it scales the grid of the weight
            value = fake_quantize_learned(weight * step, self.learned(), self.bits)
        else:
            value = fake_quantize_with(weight * step, self.qparams(weight), self.bits, self.clamp)
        return (value / step).to(weight.dtype)

    def qparams(self, weight: Tensor) -> QParams:
        """Return the parameters of ``weight * input_step``; ranges hold zero: ``q + z`` then fits k bits and a sign."""
        if self.learned is not None:
            return self.learned()
        low, high = min_max(weight * self.input_step(weight), self.granularity)
        return qparams_from_range(low.clamp_max(0), high.clamp_min(0), self.bits, promote=self.promote)

    def input_step(self, weight: Tensor) -> Tensor:
        """Return the step of every input channel, laid out against ``weight``: (1 or O, I/groups, 1, 1) or (1, I)."""
        source = self.source
        if source is None or not source.seen:
            return weight.new_ones((1,) * weight.dim())  # no batch has set the ranges yet
        step = source.qparams().scale
        if step.numel() == 1 or self.groups == 1:
            return step.reshape(1, -1, *(1,) * (weight.dim() - 2))
        per_group = step.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, 0)
        return per_group.reshape(*per_group.shape, *(1,) * (weight.dim() - 2))


class ActQuantizer(Quantizer):
    """Fake quantization of one activation place, (N, C, H, W) or (..., F) rows in front of a Linear.

    With ``tracked`` ranges every forward updates the moving average until ``freeze_ranges``; the first batch sets it.
    """

    MOMENTUM = 0.9
    running_min: Tensor
    running_max: Tensor

    def __init__(self, bits: int, scheme: Scheme, rows: bool = False) -> None:
        super().__init__(bits, cast(str, scheme.activations), scheme)
        self.tracked, self.fold, self.rows = scheme.tracked, scheme.fold, rows
        self.frozen, self.quantile = False, 1.0
        if self.tracked:
            self.register_buffer("running_min", torch.empty(0))  # shaped by the first batch
            self.register_buffer("running_max", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.groups(x)
        value = self._quantize(grouped)
        return value if grouped is x else value.view_as(x)

    def groups(self, x: Tensor) -> Tensor:
        """Return ``x`` as it is grouped: (N, C, H, W) or (N, F) itself, (..., F) as rows (N, F)."""
        return x if x.dim() == 2 or (x.dim() == 4 and not self.rows) else x.reshape(-1, x.shape[-1])

    def _quantize(self, x: Tensor) -> Tensor:
        if self.tracked and self.learned is None and not self.frozen:
            self._observe(x)
        if self.bypassed:
            return x.clone()  # as the quantized value: another tensor than the one that may be changed in place
        if self.learned is not None:
            return fake_quantize_learned(x, self.learned(), self.bits)
        if self.tracked:
            return fake_quantize_with(x, self.qparams(), self.bits, self.clamp)
        # training under autocast asks for speed, not for the release's arithmetic in half precision
        promote = self.promote or torch.is_autocast_enabled(x.device.type)
        return fake_quantize(x, self.bits, self.granularity, self.clamp, promote=promote)

    @property
    def seen(self) -> bool:
        """Whether tracked ranges exist."""
        return self.tracked and bool(self.running_min.numel())

    def qparams(self) -> QParams:
        """Return learned parameters, or those of the tracked ranges. Raises UserError before the first batch."""
        if self.learned is not None:
            return self.learned()
        if not self.seen:
            raise UserError("the activation ranges were never set; run granq.calibrate or train the student first")
        low, high = self.running_min, self.running_max
        if self.fold:  # zero padding then has an exact code
            low, high = low.clamp_max(0), high.clamp_min(0)
        return qparams_from_range(low, high, self.bits, promote=self.promote)

    def _observe(self, x: Tensor) -> None:
        extremes = self.quantile == 1
        found = min_max(x, self.granularity) if extremes else quantile_range(x, self.granularity, self.quantile)
        low, high = map(at_least_float32, found)
        if not self.seen:
            self.running_min, self.running_max = low.clone(), high.clone()
        else:
            self.running_min = self.running_min.lerp(low, 1 - self.MOMENTUM)
            self.running_max = self.running_max.lerp(high, 1 - self.MOMENTUM)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("running_min", "running_max") if self.tracked else ():
            # a teacher's checkpoint has no ranges: keep ours; a student's has them in their own shape
            saved = state_dict.setdefault(prefix + name, getattr(self, name))
            setattr(self, name, torch.empty_like(saved).copy_(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_model(
    model: nn.Module, scheme: str | Scheme, weight_bits: int, act_bits: int, image_bits: int | None = None
) -> fx.GraphModule:
    """Return a fake-quantized copy of ``model``; the model itself is not touched.

    Every Conv2d and Linear keeps its name and its state-dict keys, so a teacher's state dict loads into the copy. A
    layer that is never called but whose weight is read (``F.linear(x, self.head.weight)``) stays in full precision.

    ``scheme`` is a name in ``SCHEMES`` or a ``Scheme``; widths are 2 to 8 bits. ``image_bits`` is ``act_bits`` unless
    given: hardware for k bits runs the first layer on 2k as two passes, one for each half of the bits, and adds them
    shifted (as Hubara et al., NeurIPS 2016, do with 8).

    Raises:
        UserError: unknown scheme or width, nothing to quantize, a weight that is parametrized already, a forward that
            cannot be traced, or ``image_bits`` where the image is not quantized.
    """
    scheme = get_scheme(scheme)
    check_bits(weight_bits, act_bits, image_bits or act_bits)
    student = copy.deepcopy(model).eval()
    layers = _layers_to_quantize(student, scheme)
    graph = trace(student)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    layers = {name: layer for name, layer in layers.items() if name in called or name not in read}
    quantizers = nn.ModuleDict()
    for node in find_places(graph, student, scheme.places, set(layers)) if scheme.activations else ():
        rows = any(isinstance(module_of(student, user), nn.Linear) for user in node.users)
        bits = image_bits if image_bits and node.op == "placeholder" else act_bits
        place = f"{node.name}_" if hasattr(quantizers, node.name) else node.name  # values, keys: a dictionary's own
        quantizers[place] = ActQuantizer(bits, scheme, rows)
        insert_call(graph, node, f"act_quant.{place}", scheme.places, set(layers))
    student.act_quant = quantizers
    quantized = to_module(student, graph)
    if image_bits:
        image_place(quantized)  # refuses a model that does not quantize its image
    if scheme.weights is not None:
        _quantize_weights(quantized, layers, weight_bits, scheme)
    return quantized.eval()


def _layers_to_quantize(model: nn.Module, scheme: Scheme) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    layers: dict[str, nn.Module] = {n: m for n, m in modules.items() if isinstance(m, LAYERS) and n not in scheme.skip}
    if model._forward_pre_hooks or model._forward_hooks:
        warnings.warn(f"hooks of {type(model).__name__} itself are not in the quantized copy", stacklevel=3)
    if not layers:
        raise UserError(f"{type(model).__name__} has no Conv2d or Linear layer to quantize")
    if unknown := set(scheme.skip) - modules.keys():
        raise UserError(f"scheme.skip names layers the model does not have: {', '.join(sorted(unknown))}")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise UserError(
                f"the weight of {name} is parametrized already: use parametrize.remove_parametrizations first"
            )
    return layers


def _quantize_weights(model: fx.GraphModule, layers: dict[str, nn.Module], bits: int, scheme: Scheme) -> None:
    sources: dict[nn.Module, ActQuantizer] = {}
    for name, source in calls_of_layers(model) if scheme.fold else ():
        if isinstance(source, ActQuantizer) and name in layers:
            if sources.setdefault(layers[name], source) is not source:
                raise UserError(f"layer {name} is called on two inputs: the scales of both cannot fold into it")
    for layer in dict.fromkeys(layers.values()):  # a layer under two names once
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        quantizer = WeightQuantizer(bits, scheme, groups, sources.get(layer))
        parametrize.register_parametrization(layer, "weight", quantizer)
        layer.register_load_state_dict_pre_hook(_rename_on_load)
        layer.register_state_dict_post_hook(_rename_on_save)


_STORED = "parametrizations.weight.original"


def _rename_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + "weight" in state_dict:
        state_dict[prefix + _STORED] = state_dict.pop(prefix + "weight")


def _rename_on_save(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + _STORED in state_dict:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + _STORED)


class LayerQuantizers(NamedTuple):
    """What quantizes one layer."""

    weight: WeightQuantizer | None  #: ``None``: full precision
    original: Tensor  #: the weight before quantization
    inputs: tuple[ActQuantizer | None, ...]  #: the quantizer directly in front of each call, in order


def layer_quantizers(model: nn.Module) -> dict[str, LayerQuantizers]:
    """Return what quantizes every Conv2d and Linear of ``model``, by name; without a traced graph it has no inputs."""
    inputs: dict[str, list[ActQuantizer | None]] = {}
    for name, source in calls_of_layers(model):
        inputs.setdefault(name, []).append(source if isinstance(source, ActQuantizer) else None)
    return {
        name: LayerQuantizers(weight_quantizer(layer), original_weight(layer), tuple(inputs.get(name, ())))
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LAYERS)
    }


def weight_quantizer(layer: nn.Module) -> WeightQuantizer | None:
    """Return the quantizer of a layer's weight, if it has one."""
    steps = cast(Any, layer.parametrizations).weight if parametrize.is_parametrized(layer, "weight") else ()
    return next((step for step in steps if isinstance(step, WeightQuantizer)), None)


def original_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer before quantization."""
    weight = cast(Any, layer).parametrizations.weight.original if weight_quantizer(layer) else layer.weight
    return cast(Tensor, weight).detach()


def activation_places(model: nn.Module) -> dict[str, ActQuantizer]:
    """Return the quantized activation places of a quantized model by name."""
    return {n.removeprefix("act_quant."): m for n, m in model.named_modules() if isinstance(m, ActQuantizer)}


def image_place(model: nn.Module) -> ActQuantizer:
    """Return the place where a quantized model quantizes the image. Raises UserError if it does not."""
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else []:
        place = module_of(model, node)
        if isinstance(place, ActQuantizer) and layer_input(node).op == "placeholder":
            return place
    raise UserError("the image is not quantized: needs a scheme with places 'inputs' and a layer that reads the image")


def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Stop (or resume) the tracking of activation ranges."""
    for place in activation_places(model).values():
        place.frozen = frozen


def frozen_ranges(model: nn.Module) -> AbstractContextManager[None]:
    """Update no range within a block: test images must not move them."""
    return temporarily(activation_places(model).values(), frozen=True)


def bypassed(model: nn.Module, bypass: bool = True) -> AbstractContextManager[None]:
    """Quantize nothing within a block; ranges are tracked as always."""
    return temporarily([m for m in model.modules() if isinstance(m, Quantizer)], bypassed=bypass)


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Batch], quantile: float = 1.0, *, full_precision: bool = False
) -> None:
    """Track activation ranges over batches of images, then freeze them. Nothing to do for dynamic schemes.

    Args:
        model: of ``quantize_model``.
        batches: images (N, 3, H, W), or pairs (images, labels).
        quantile: share of the values inside the range (``ranges.quantile_range``), above 0.5 to 1, the extremes.
        full_precision: track what the network holds without quantization, to which ``reestimate_batchnorm`` brings
            activations back.
    """
    places = [place for place in activation_places(model).values() if place.tracked]
    if any(place.learned for place in places):
        raise UserError("the steps of this model are learned: they no longer follow ranges")
    freeze_ranges(model, False)
    with eval_mode(model), temporarily(places, quantile=quantile), bypassed(model, full_precision):
        for place in places if quantile < 1 else ():  # ranges tracked before were extremes
            place.running_min = place.running_max = torch.empty(0)
        for batch in batches:
            model(images_of(batch))
    if not all(place.seen for place in places):
        raise UserError("no images to calibrate on")
    freeze_ranges(model)


def set_image_range(model: nn.Module, low: Tensor, high: Tensor) -> None:
    """Set the static range of the image, which is known without any: pixels end at black and white.

    ``low`` and ``high`` are (1, C, 1, 1), such as ``data.pixel_bounds`` gives; ``model`` is calibrated.
    """
    place = image_place(model)
    if place.granularity == "per_tensor":
        low, high = low.amin().view(1, 1, 1, 1), high.amax().view(1, 1, 1, 1)
    if place.learned is not None or not place.seen or not low.shape == high.shape == place.running_min.shape:
        raise UserError("the image needs a calibrated static range, and low and high of its shape")
    place.running_min, place.running_max = low.to(place.running_min), high.to(place.running_max)
