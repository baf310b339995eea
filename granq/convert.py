"""Put quantizers into a model, and keep their state.

Weights become parametrizations of their layer. Activations become ``ActQuantizer`` modules in a rewritten ``torch.fx``
graph, so that a ReLU module used twice, ``F.relu`` and ``x.relu_()`` each count as the place they are.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from granq.errors import UserError
from granq.graph import calls_of_layers, find_places, insert_call, is_image, layer_names, quantizable, to_module, trace
from granq.hooks import Batch, eval_mode, images_of, temporarily
from granq.plain import LAYERS, is_plain, is_rows, module_of
from granq.quantizer import QParams, at_least_float32, fake_quantize_with, float_codes, min_max, qparams_from_range
from granq.ranges import LearnedStep, LearnedSteps, best_quantile, quantile_range
from granq.schemes import Scheme, check_bits, get_scheme

MOMENTUM = 0.9  # of tracked ranges


class Quantizer(nn.Module):
    """What quantizers of weights and activations share: from a range, or learned steps, to values."""

    def __init__(self, bits: int, granularity: str | None, scheme: Scheme, fold: bool) -> None:
        super().__init__()
        self.bits, self.granularity, self.fold = bits, cast(str, granularity), fold
        self.clamp, self.promote = scheme.clamp, scheme.promote
        self.learned: LearnedSteps | None = None
        self.bypassed = False  # nothing is quantized

    def from_range(self, low: Tensor, high: Tensor) -> QParams:
        """Return the parameters of a range. One that folds holds zero: zero padding has a code, ``q + z`` k bits."""
        if self.fold:
            low, high = low.clamp_max(0), high.clamp_min(0)
        # training under autocast asks for speed, not for the release's arithmetic in half precision
        promote = self.promote or torch.is_autocast_enabled(low.device.type)
        return qparams_from_range(low, high, self.bits, promote=promote)

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        if self.learned is not None:
            return LearnedStep.apply(x, *qparams, self.bits)
        return fake_quantize_with(x, qparams, self.bits, self.clamp)

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
        super().__init__(bits, scheme.weights, scheme, source is not None)
        self.groups = groups
        object.__setattr__(self, "source", source)  # the quantizer of the layer's input does not become our submodule

    def forward(self, weight: Tensor) -> Tensor:
        if self.bypassed:
            return weight
        step = self.input_step(weight)  # if it is learned, it learns from here too: it scales the grid of the weight
        return (self.fake_quantize(weight * step, self.qparams(weight)) / step).to(weight.dtype)

    def qparams(self, weight: Tensor) -> QParams:
        """Return the parameters of ``weight * input_step``."""
        if self.learned is not None:
            return self.learned()
        return self.from_range(*min_max(weight * self.input_step(weight), self.granularity))

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes in floating point, in the shape of ``weight``."""
        return float_codes(weight * self.input_step(weight), *self.qparams(weight), self.bits, self.clamp)

    def input_step(self, weight: Tensor) -> Tensor:
        """Return the step of every input channel, laid out against ``weight``: (1 or O, I/groups, 1, 1) or (1, I)."""
        source = self.source
        if source is None or not source.seen:
            return weight.new_ones((1,) * weight.dim())  # no batch has set the ranges yet
        step = source.qparams().scale
        if step.numel() > 1 and self.groups > 1:
            step = step.reshape(self.groups, -1).repeat_interleave(len(weight) // self.groups, 0)
        else:
            step = step.reshape(1, -1)
        return step.reshape(*step.shape, *(1,) * (weight.dim() - 2))


class ActQuantizer(Quantizer):
    """Fake quantization of one activation place: rows (..., F) if ``rows``, (N, C, ...) if not; ``None``: unknown.

    Tracked ranges are a moving average, which forwards move while ``tracking`` only. They belong to the state dict.
    """

    def __init__(self, bits: int, scheme: Scheme, rows: bool | None) -> None:
        super().__init__(bits, scheme.activations, scheme, scheme.fold)
        self.rows, self.tracked, self.tracking, self.quantile = rows, scheme.tracked, False, 1.0
        if self.tracked:
            self.running_min: Tensor = nn.Buffer(torch.empty(0))
            self.running_max: Tensor = nn.Buffer(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.groups(x)
        if self.tracking and self.tracked and self.learned is None:
            self._observe(grouped)
        if self.bypassed:
            return x.clone()  # as the quantized value: another tensor than the one that may be changed in place
        qparams = self.qparams() if self.tracked else self.from_range(*min_max(grouped, self.granularity))
        return self.fake_quantize(grouped, qparams).view_as(x)

    def groups(self, x: Tensor) -> Tensor:
        """Return ``x`` as it is grouped: (N, C, H, W), or (N, C, values, 1) of other maps, or rows (N, F)."""
        if self.rows or x.dim() < (4 if self.rows is None else 3):
            return x.reshape(-1, x.shape[-1])
        return x if x.dim() == 4 else x.flatten(2)[..., None]

    @property
    def seen(self) -> bool:
        """Whether tracked ranges exist."""
        return self.tracked and bool(self.running_min.numel())

    def _observe(self, x: Tensor) -> None:
        share = self.quantile or best_quantile(self.bits)
        found = min_max(x, self.granularity) if share == 1 else quantile_range(x, self.granularity, share)
        low, high = map(at_least_float32, found)
        if self.seen:
            low = self.running_min.lerp(low, 1 - MOMENTUM)
            high = self.running_max.lerp(high, 1 - MOMENTUM)
        self.running_min, self.running_max = low, high

    def qparams(self) -> QParams:
        """Return learned parameters, or those of the tracked ranges. Raises UserError before the first batch."""
        if self.learned is not None:
            return self.learned()
        if not self.seen:
            raise UserError("the activation ranges were never set; run granq.calibrate or train the student first")
        return self.from_range(self.running_min, self.running_max)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, own in (("running_min", self.running_min), ("running_max", self.running_max)) if self.tracked else ():
            # a teacher's checkpoint has no ranges: keep ours; a student's has them in their own shape
            setattr(self, name, found := state_dict.setdefault(prefix + name, own).to(own.device, copy=True))
            if self.granularity == "per_tensor" and found.numel() > 1:
                args[-1].append(f"{prefix}{name} holds the ranges of channels, not of the tensor")
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_model(
    model: nn.Module, scheme: str | Scheme, weight_bits: int, act_bits: int, image_bits: int | None = None,
    bits: Mapping[str, tuple[int, int]] | None = None,
) -> fx.GraphModule:  # fmt: skip
    """Return a fake-quantized copy of ``model``, into which state dicts of ``model`` load.

    ``check_copy`` finds what torch.fx did not see, such as ``+=`` on a tensor of two names. Layers that compute
    something else (``granq.plain``), or are only read (``self.fc.weight``), stay as they are; a warning names them.

    ``scheme`` is a name in ``SCHEMES`` or a ``Scheme``; widths are 2 to 8 bits. ``bits`` gives layers their own,
    ``{layer: (weight, activation)}``, 0 for full precision; layers that read one place share its width. The image has
    ``image_bits``, if given: hardware for k bits reads 2k in two passes (as Hubara et al., NeurIPS 2016, do with 8).

    Raises UserError for a model that cannot be traced, and for names and widths that it or the scheme does not have.
    """
    scheme = get_scheme(scheme)
    widths = check_bits(weight_bits), check_bits(act_bits)
    names = quantizable(model, scheme.skip)
    student = copy.deepcopy(model).eval()
    graph = trace(student)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    full_precision = [name for name in names if name in read - called or not is_plain(student.get_submodule(name))]
    layers = {name: student.get_submodule(name) for name in names if name not in full_precision}
    given = {name: (w and check_bits(w), a and check_bits(a)) for name, (w, a) in (bits or {}).items()}
    if unknown := [name for name in given if name not in (layers if any(given[name]) else layer_names(model))]:
        raise UserError(f"bits name what is no layer that can be quantized: {', '.join(unknown)}")
    if scheme.weights is None and any(w for w, _ in given.values()):
        raise UserError("bits ask for low-bit weights, but the scheme quantizes none")
    _quantize_activations(student, graph, set(layers), given, act_bits, image_bits, scheme)
    low_bit = [name for name in layers if scheme.weights and scheme.activations and given.get(name, widths)[0]]
    if unseen := [name for name in low_bit if any(name.startswith(f"{outer}.") for outer in called)]:
        warnings.warn(f"only weights are quantized, as fx does not see the input: {', '.join(unseen)}", stacklevel=2)
    if full_precision:
        warnings.warn(f"in full precision, as they compute something else: {', '.join(full_precision)}", stacklevel=2)
    if scheme.activations and scheme.places == "relu" and not student.act_quant:
        warnings.warn(f"the scheme quantizes no activation of {type(model).__name__}: it has no ReLU", stacklevel=2)
    quantized = to_module(student, graph)
    if image_bits:
        image_places(quantized)  # refuses a model that does not quantize its image
    if scheme.weights:
        _quantize_weights(quantized, {layer: given.get(name, widths)[0] for name, layer in layers.items()}, scheme)
    return quantized.eval()


def _quantize_activations(
    student: Any, graph: fx.Graph, layers: set[str], own: dict[str, tuple[int, int]], act_bits: int,
    image_bits: int | None, scheme: Scheme,
) -> None:  # fmt: skip
    """Put a quantizer at every place: of the image's width, of the one that its layers have, or of ``act_bits``."""
    student.act_quant = quantizers = nn.ModuleDict()
    places = find_places(graph, student, scheme.places, layers) if scheme.activations else []
    if lacking := {name for name in own if own[name][1]} - {user.target for node in places for user in node.users}:
        raise UserError(f"the scheme has no quantizer directly in front of {min(lacking)}: its activations take 0 bits")
    for node, rows in [(node, is_rows(student, node)) for node in places]:  # of the graph before it has quantizers
        asked = {own[user.target][1]: user.target for user in node.users if user.target in own}
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked.values())} read one place, which cannot have {set(asked)} bits")
        if width := image_bits if image_bits and is_image(student, node) else next(iter(asked), act_bits):
            name = f"{node.name}_" if hasattr(quantizers, node.name) else node.name  # values, keys: a dictionary's own
            quantizers[name] = ActQuantizer(check_bits(width), scheme, rows).to(next(student.parameters()).device)
            insert_call(graph, node, f"act_quant.{name}", scheme.places, layers)


def _quantize_weights(model: fx.GraphModule, widths: dict[nn.Module, int], scheme: Scheme) -> None:
    sources: dict[nn.Module, ActQuantizer] = {}
    for name, source in calls_of_layers(model) if scheme.fold else ():
        layer = model.get_submodule(name)
        if isinstance(source, ActQuantizer) and layer in widths:
            if sources.setdefault(layer, source) is not source:
                raise UserError(f"layer {name} is called on two inputs: the scales of both cannot fold into it")
    for layer in (layer for layer in widths if widths[layer]):
        quantizer = WeightQuantizer(widths[layer], scheme, getattr(layer, "groups", 1), sources.get(layer))
        parametrize.register_parametrization(layer, "weight", quantizer)
        layer.register_load_state_dict_pre_hook(partial(_rename, "weight", _STORED))
        layer.register_state_dict_post_hook(partial(_rename, _STORED, "weight"))


_STORED = "parametrizations.weight.original"


def _rename(old: str, new: str, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + old in state_dict:
        state_dict[prefix + new] = state_dict.pop(prefix + old)


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


def original_weight(layer: Any) -> Tensor:
    """Return the weight of a layer before quantization."""
    return (layer.parametrizations.weight.original if weight_quantizer(layer) else layer.weight).detach()


def activation_places(model: nn.Module) -> dict[str, ActQuantizer]:
    """Return the quantized activation places of a quantized model by name."""
    return {n.removeprefix("act_quant."): m for n, m in model.named_modules() if isinstance(m, ActQuantizer)}


def image_places(model: nn.Module) -> list[ActQuantizer]:
    """Return the places where a quantized model quantizes the image. Raises UserError if there are none."""
    calls = [(module_of(model, n), n) for n in (model.graph.nodes if isinstance(model, fx.GraphModule) else ())]
    places = [m for m, n in calls if isinstance(m, ActQuantizer) and is_image(model, n.all_input_nodes[0])]
    if places:
        return places
    raise UserError("the image is not quantized: needs places 'inputs' and a layer that reads it, bare or padded")


def tracking(model: nn.Module, on: bool = True) -> AbstractContextManager[None]:
    """Move static ranges with every batch within a block; no forward outside of one does."""
    return temporarily(activation_places(model).values(), tracking=on)


def bypassed(model: nn.Module, bypass: bool = True) -> AbstractContextManager[None]:
    """Quantize nothing within a block."""
    return temporarily([m for m in model.modules() if isinstance(m, Quantizer)], bypassed=bypass)


@torch.no_grad()
def check_copy(copied: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Raise UserError if a traced copy gives other values than ``model`` even without quantization."""
    images = images.to(next(model.parameters()).device)
    with eval_mode(model, copied), bypassed(copied):  # the copy in the faster layout, which ``synthesize`` draws in
        outputs = model(images), copied(images.contiguous(memory_format=torch.channels_last))
    for wanted, got in zip(*map(tree_leaves, outputs), strict=True):
        if isinstance(wanted, Tensor) and wanted.is_floating_point() and wanted.numel():
            near = 1e-3 * float(wanted.nan_to_num(0, 0, 0).abs().max())
            if not torch.allclose(got, wanted, 0, near, equal_nan=True):
                raise UserError(
                    f"the copy of {type(model).__name__} computes something else even without quantization: the network"
                    " may change its images or a tensor in place, ask for the type of a value, or draw random numbers"
                )


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Batch], quantile: float | None = 1.0, *, full_precision: bool = False
) -> None:
    """Set the static activation ranges of ``model`` to a moving average over batches; learned ones stay.

    Batches are images (N, 3, H, W) or pairs (images, labels). ``quantile`` is the share of the values inside the range
    (``ranges.quantile_range``), 1 for the extremes, ``None`` for the best at its bits (``ranges.best_quantile``). With
    ``full_precision`` ranges are those without quantization, to which ``reestimate_batchnorm`` brings values back.
    """
    if quantile is not None and not 0.5 < quantile <= 1:
        raise UserError(f"quantile is a share of the values, above 0.5 and up to 1, got {quantile}")
    if isinstance(batches, Tensor):
        raise UserError("batches is one tensor, whose parts are single images: pass a list of batches")
    places = [place for place in activation_places(model).values() if place.tracked and place.learned is None]
    for place in places:
        place.running_min = place.running_max = place.running_min.new_empty(0)
    with eval_mode(model), temporarily(places, tracking=True, quantile=quantile), bypassed(model, full_precision):
        for images in filter(len, map(images_of, batches if places else ())):
            model(images.to(next(model.parameters()).device))
    if not all(place.seen and (place.running_max - place.running_min).isfinite().all() for place in places):
        raise UserError("no images to calibrate on, or activations of them that are not finite")


def set_image_range(model: nn.Module, low: Tensor, high: Tensor) -> None:
    """Set the static range of the image (1, C, 1, 1), known without any: pixels end at black and white."""
    for place in image_places(model):
        if not place.tracked or place.learned is not None:
            raise UserError("the image has no static range to set: its range is dynamic, or its steps are learned")
        if place.granularity == "per_tensor":
            low, high = low.amin().expand(1, 1, 1, 1), high.amax().expand(1, 1, 1, 1)
        place.running_min, place.running_max = low.to(place.running_min), high.to(place.running_max)
