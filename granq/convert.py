"""Schemes, and putting their quantizers into a model.

Weights become parametrizations of their layer; activations become ``ActQuantizer`` modules in a rewritten
``torch.fx`` graph, so that a ReLU module used twice, ``F.relu`` and ``x.relu_()`` each count as the place they are.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from granq.checks import one_of, typed
from granq.distributed import gather, joint_range
from granq.quantizer import (
    GRANULARITIES,
    QParams,
    at_least_float32,
    check_bits,
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_with,
    min_max,
    qparams_from_range,
)

LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and how. Two schemes differ in what their fields say and in nothing else.

    Attributes:
        weights: granularity of weights, or ``None`` for full precision.
        activations: granularity of activations, or ``None``.
        tracked: ranges are a moving average, frozen after calibration (static); otherwise taken anew from every tensor.
        places: ``"relu"`` quantizes behind every ReLU and ReLU6; ``"inputs"`` at the input of every Conv2d and Linear.
        clamp: keep codes within their range.
        promote: half-precision ranges are computed in float32.
        skip: names of layers left in full precision, such as ``("features.init_block.conv",)``.
        fold: multiply each layer's weight by the steps of its input channels before it is quantized, so that the layer
            is one integer convolution and one rescale (``granq.integer``). Needs static ranges, at most one a channel.
    """

    weights: str | None
    activations: str | None
    tracked: bool = False
    places: str = "inputs"
    clamp: bool = True
    promote: bool = True
    skip: tuple[str, ...] = ()
    fold: bool = False

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) is not None:
                one_of(f"{name} granularity", getattr(self, name), GRANULARITIES)
        one_of("places", self.places, ("relu", "inputs"))
        static = self.tracked and self.activations in ("per_channel", "per_tensor")
        if self.tracked and self.activations and not static:
            raise ValueError(f"{self.activations} ranges belong to single images: only per_channel or per_tensor track")
        if self.fold and not (static and self.places == "inputs" and self.weights in ("per_out_channel", "per_tensor")):
            raise ValueError(
                "scales fold into weights only if activation ranges are tracked, per_channel or per_tensor, at the "
                "inputs, and weight scales are per_out_channel or per_tensor"
            )


#: docs/method.md section 2. ``layerwise`` and ``per_channel`` quantize where ``release`` does, so that granularity and
#: range tracking are what differs; ``strict`` quantizes every layer's input.
SCHEMES: dict[str, Scheme] = {
    "release": Scheme("per_kernel", "per_sample_channel", places="relu", clamp=False, promote=False),
    "strict": Scheme("per_out_channel", "per_sample_channel"),
    "layerwise": Scheme("per_out_channel", "per_tensor", tracked=True, places="relu"),
    "per_channel": Scheme("per_out_channel", "per_channel", tracked=True, places="relu"),
    "foldable": Scheme("per_out_channel", "per_channel", tracked=True, fold=True),
}


def get_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme by name; a ``Scheme`` is returned as it is. Raises ValueError listing the known names."""
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[scheme]


class LearnedSteps(nn.Module):
    """Quantization parameters whose steps are learned, as logarithms: a gradient step then changes them by a share.

    Zero points stay, so the range grows and shrinks around zero.
    """

    zero_point: Tensor

    def __init__(self, scale_inv: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.log_step = nn.Parameter(-scale_inv.detach().log())
        self.register_buffer("zero_point", zero_point.clone())

    def forward(self) -> QParams:
        return QParams(torch.exp(-self.log_step), self.zero_point)


class Quantizer(nn.Module):
    """What quantizers of weights and activations share: steps that may be learned (``learn_steps``)."""

    def __init__(self) -> None:
        super().__init__()
        self.learned: LearnedSteps | None = None
        self.bypassed = False  # nothing is quantized

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}learned.log_step")
        if saved is not None:  # a student whose steps were learned
            self.learned = LearnedSteps(saved.exp(), torch.empty_like(saved)).to(saved.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class WeightQuantizer(Quantizer):
    """Parametrization of a layer's weight: (O, I, kh, kw) or (O, I) -> the same, fake-quantized.

    With ``source``, the quantizer of the layer's input, the weight is quantized in units of its steps: the integers
    ``folded`` returns are then all that an integer convolution needs.
    """

    def __init__(
        self, bits: int, granularity: str, clamp: bool, promote: bool, groups: int, source: ActQuantizer | None = None
    ) -> None:
        super().__init__()
        self.bits, self.granularity, self.clamp, self.promote = bits, granularity, clamp, promote
        self.groups = groups
        self._source = (source,)  # in a tuple, so that the input's quantizer does not become our submodule

    def forward(self, weight: Tensor) -> Tensor:
        if self.bypassed:
            return weight
        if self.learned is None and self.source is None:
            return fake_quantize(weight, self.bits, self.granularity, self.clamp, promote=self.promote)
        step = self.input_step(weight)
        if self.learned is not None:  # the input's step learns from here too: folded, it scales the grid of the weight
            value = fake_quantize_learned(weight * step, self.learned(), self.bits)
        else:
            value = fake_quantize_with(weight * step, self.folded_qparams(weight), self.bits, self.clamp)
        return (value / step).to(weight.dtype)

    @property
    def source(self) -> ActQuantizer | None:
        """The quantizer of the layer's input, if its steps are folded into the weight."""
        return self._source[0]

    def folded_qparams(self, weight: Tensor) -> QParams:
        """Parameters of ``weight * input_step``; ranges hold zero, so that ``q + z`` fits k bits and a sign."""
        if self.learned is not None:
            return self.learned()
        low, high = min_max(weight * self.input_step(weight), self.granularity)
        return qparams_from_range(low.clamp_max(0), high.clamp_min(0), self.bits, promote=self.promote)

    def input_step(self, weight: Tensor) -> Tensor:
        """The step of every input channel, laid out against ``weight``: (1 or O, I/groups, 1, 1) or (1, I)."""
        source = self.source
        if source is None or not source.seen:
            return weight.new_ones((1,) * weight.dim())  # no batch has set the ranges yet
        step = source.qparams().scale
        if step.numel() == 1 or self.groups == 1:
            return step.reshape(1, -1, *(1,) * (weight.dim() - 2))
        per_group = step.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, 0)
        return per_group.reshape(*per_group.shape, *(1,) * (weight.dim() - 2))

    def extra_repr(self) -> str:
        folded = ", folded" if self.source is not None else ""
        return f"bits={self.bits}, granularity={self.granularity}, clamp={self.clamp}{folded}"


class ActQuantizer(Quantizer):
    """Fake quantization of one activation place, (N, C, H, W) or (..., F) rows in front of a Linear.

    With ``tracked`` ranges every forward updates the moving average until ``freeze_ranges``; the first batch sets it.
    """

    MOMENTUM = 0.9
    running_min: Tensor
    running_max: Tensor

    def __init__(self, bits: int, scheme: Scheme, rows: bool = False) -> None:
        super().__init__()
        if scheme.activations is None:
            raise ValueError("the scheme leaves activations in full precision")
        self.bits, self.granularity, self.tracked = bits, scheme.activations, scheme.tracked
        self.clamp, self.promote = scheme.clamp, scheme.promote
        self.include_zero = scheme.fold  # zero padding then has an exact code
        self.rows = rows
        self.frozen = False
        self.quantile = 1.0  # calibrate
        tracked = scheme.tracked
        if tracked:
            self.register_buffer("running_min", torch.empty(0))  # shaped by the first batch
            self.register_buffer("running_max", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.groups(x)
        value = self._quantize(grouped)
        return value if grouped is x else value.view_as(x)

    def groups(self, x: Tensor) -> Tensor:
        """``x`` as it is grouped: (N, C, H, W) or (N, F) itself, (..., F) as rows (N, F)."""
        return x if x.dim() == 2 or (x.dim() == 4 and not self.rows) else x.reshape(-1, x.shape[-1])

    def _quantize(self, x: Tensor) -> Tensor:
        if self.tracked and self.learned is None and not self.frozen:
            self._observe(x)
        if self.bypassed:
            return x.clone()  # as the quantized value: another tensor than what may still be changed in place
        if self.learned is not None:
            return fake_quantize_learned(x, self.learned(), self.bits)
        if not self.tracked:
            # training under autocast asks for speed, not for the release's arithmetic in half precision
            promote = self.promote or torch.is_autocast_enabled(x.device.type)
            return fake_quantize(x, self.bits, self.granularity, self.clamp, promote=promote)
        return fake_quantize_with(x, self.qparams(), self.bits, self.clamp)

    @property
    def seen(self) -> bool:
        """Whether tracked ranges exist."""
        return self.tracked and bool(self.running_min.numel())

    def qparams(self) -> QParams:
        """Learned parameters, or those of the tracked ranges. Raises RuntimeError before the first batch."""
        if self.learned is not None:
            return self.learned()
        if not self.seen:
            raise RuntimeError("ranges were frozen before a batch was seen: run granq.calibrate first")
        low, high = self.running_min, self.running_max
        if self.include_zero:
            low, high = low.clamp_max(0), high.clamp_min(0)
        return qparams_from_range(low, high, self.bits, promote=self.promote)

    def _observe(self, x: Tensor) -> None:
        low, high = joint_range(*map(at_least_float32, self._range(x)))
        if not self.running_min.numel():
            self.running_min, self.running_max = low.clone(), high.clone()
        else:
            self.running_min = self.running_min.lerp(low, 1 - self.MOMENTUM)
            self.running_max = self.running_max.lerp(high, 1 - self.MOMENTUM)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.quantile == 1:
            return min_max(x, self.granularity)
        # of the positive values and of the negative ones: behind a ReLU most are zero, and say nothing of the range
        x = gather(x)
        rows = x.transpose(0, 1).flatten(1) if self.granularity == "per_channel" else x.reshape(1, -1)
        rows, shape = rows.sort(1).values, (1, -1, *(1,) * (x.dim() - 2))
        above, below = ((1 - self.quantile) * side.sum(1, True) for side in (rows > 0, rows < 0))
        low = rows.gather(1, below.long()).view(shape)
        high = rows.gather(1, rows.shape[1] - 1 - above.long()).view(shape)
        return low, high

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("running_min", "running_max") if self.tracked else ():
            # a teacher's checkpoint has no ranges: keep ours; a student's has them in their own shape
            saved = state_dict.setdefault(prefix + name, getattr(self, name))
            setattr(self, name, torch.empty_like(saved).copy_(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        ranges = "tracked" if self.tracked else "dynamic"
        return f"bits={self.bits}, granularity={self.granularity}, ranges={ranges}, clamp={self.clamp}"


@typed
def quantize_model(
    model: nn.Module, scheme: str | Scheme, weight_bits: int, act_bits: int, image_bits: int | None = None
) -> fx.GraphModule:
    """A fake-quantized copy of ``model``; the model itself is not touched.

    Every Conv2d and Linear keeps its name and its state-dict keys, so a teacher's state dict loads into the copy.
    Activation places are the modules ``act_quant.<place>``; ``activation_places`` lists them.

    Args:
        model: any network of Conv2d and Linear layers whose forward ``torch.fx`` can trace.
        scheme: a name in ``SCHEMES`` or a ``Scheme``.
        weight_bits: 2 to 8.
        act_bits: 2 to 8.
        image_bits: of the image, 2 to 8; default ``act_bits``. Hardware for k bits runs the first layer on 2k as two
            passes, one for each half of the bits, and adds them shifted (as Hubara et al., NeurIPS 2016, do with 8).

    Arguments of the forward whose default is None, a bool or a text are fixed in the copy. A layer that is never called
    but whose weight is read (``F.linear(x, self.head.weight)``) stays in full precision; ``audit`` lists it.

    Raises:
        ValueError: unknown scheme, bits outside 2 to 8, no layer to quantize, a layer whose weight is parametrized
            already, a forward that cannot be traced, or ``image_bits`` where the image is not quantized.
    """
    scheme = get_scheme(scheme)
    check_bits(weight_bits)
    check_bits(act_bits)
    check_bits(image_bits or act_bits)
    student = copy.deepcopy(model).eval()
    layers = {n: m for n, m in student.named_modules() if isinstance(m, LAYERS) and n not in scheme.skip}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Conv2d or Linear layer to quantize")
    if unknown := set(scheme.skip) - dict(student.named_modules()).keys():
        raise ValueError(f"scheme.skip names layers the model does not have: {', '.join(sorted(unknown))}")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"the weight of {name} is parametrized already (quantized, spectral_norm, weight_norm): make it plain "
                "with torch.nn.utils.parametrize.remove_parametrizations"
            )
    if student._forward_pre_hooks or student._forward_hooks:
        warnings.warn(f"hooks of {type(model).__name__} itself are not in the quantized copy", stacklevel=3)
    defaults = _defaults(student.forward)
    try:
        graph = _Tracer().trace(student, defaults)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise ValueError(
            f"cannot trace {type(model).__name__}: {(str(error) or type(error).__name__).splitlines()[0]}; "
            "torch.fx needs a forward without control flow on tensor values"
        ) from error

    for node in graph.nodes:
        if node.op == "placeholder" and (name := node.target.rpartition("_")[0]) in (defaults or {}):
            node.target = name  # fx gave it a number
    _assign_in_place(graph, student)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    layers = {name: layer for name, layer in layers.items() if name in called or name not in read}
    quantizers = nn.ModuleDict()
    if scheme.activations is not None:
        for node in _places(graph, student, scheme, set(layers)):
            rows = any(isinstance(_module(student, user), nn.Linear) for user in node.users)
            bits = image_bits if image_bits and node.op == "placeholder" else act_bits
            place = f"{node.name}_" if hasattr(quantizers, node.name) else node.name  # values, keys: a dictionary's own
            quantizers[place] = ActQuantizer(bits, scheme, rows)
            _insert(graph, node, place, scheme.places, set(layers))
    student.act_quant = quantizers
    quantized = fx.GraphModule(student, graph, class_name=type(model).__name__)
    kept = dict(quantized.named_modules(remove_duplicate=False))
    for name, module in student.named_modules(remove_duplicate=False):
        # fx drops what the forward does not reach, and of a layer it only reads all but the weight: keep their keys
        if name not in kept or (isinstance(module, LAYERS) and kept[name] is not module):
            quantized.add_submodule(name, module)
    if image_bits:
        image_place(quantized)
    if scheme.weights is not None:
        sources = _folded_places(quantized, layers) if scheme.fold else {}
        for layer in dict.fromkeys(layers.values()):  # a layer under two names once
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            weight_quantizer = WeightQuantizer(
                weight_bits, scheme.weights, scheme.clamp, scheme.promote, groups, sources.get(layer)
            )
            parametrize.register_parametrization(layer, "weight", weight_quantizer)
            layer.register_load_state_dict_pre_hook(_rename_on_load)
            layer.register_state_dict_post_hook(_rename_on_save)
    return quantized.eval()


@typed
def activation_places(model: nn.Module) -> dict[str, ActQuantizer]:
    """The quantized activation places of a quantized model by name."""
    return {n.removeprefix("act_quant."): m for n, m in model.named_modules() if isinstance(m, ActQuantizer)}


@typed
def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Stop (or resume) the tracking of activation ranges."""
    for quantizer in activation_places(model).values():
        quantizer.frozen = frozen


def image_place(model: nn.Module) -> ActQuantizer:
    """Where a quantized model quantizes the image. Raises ValueError if it does not."""
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else []:
        place = _module(model, node)
        if isinstance(place, ActQuantizer) and _layer_input(node).op == "placeholder":
            return place
    raise ValueError("the image is not quantized: needs a scheme with places 'inputs' and a layer that reads the image")


@typed
def relu_ceilings(model: fx.GraphModule) -> list[float | None]:
    """For every call of a BatchNorm2d, in order: where the ReLU that alone reads it ends (infinity, 6), or ``None``."""
    ceilings: list[float | None] = []
    for node in model.graph.nodes:
        if isinstance(_module(model, node), nn.BatchNorm2d):
            readers = list(node.users)
            alone = len(readers) == 1 and _is_relu(readers[0], model)
            six = alone and (readers[0].target is F.relu6 or isinstance(_module(model, readers[0]), nn.ReLU6))
            ceilings.append((6.0 if six else math.inf) if alone else None)
    return ceilings


@contextmanager
def frozen_ranges(model: nn.Module) -> Iterator[None]:
    """Within the block no range is updated: test images must not move them."""
    before = {q: q.frozen for q in activation_places(model).values()}
    freeze_ranges(model)
    try:
        yield
    finally:
        for quantizer, frozen in before.items():
            quantizer.frozen = frozen


@contextmanager
def bypassed(model: nn.Module, bypass: bool = True) -> Iterator[None]:
    """Within the block nothing is quantized; ranges are tracked as always."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    for quantizer in quantizers:
        quantizer.bypassed = bypass
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.bypassed = False


def _defaults(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Defaults that decide what a forward does, for fx to fix: else ``if mask is not None`` would be true."""
    rest = list(signature(function).parameters.items())[1:]  # the first is the image, with a default or without
    return {name: p.default for name, p in rest if isinstance(p.default, type(None) | bool | str)} or None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (*LAYERS, nn.BatchNorm2d)  # subclasses too, whose code outside of torch.nn fx would trace
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def _assign_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """``F.relu_(x)`` changes ``x`` even if nobody takes its result: who reads ``x`` behind it now reads the result."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node, place in order.items():
        value = _layer_input(node)
        if isinstance(value, fx.Node) and _is_in_place(node, root):
            for user in [user for user in value.users if order[user] > place]:
                user.replace_input_with(value, node)


def _is_in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return getattr(_module(root, node), "inplace", False) is True
    name = str(getattr(node.target, "__name__", node.target))
    if node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__"):
        return True
    try:
        arguments = signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # torch's built-in functions have no signature, and no such argument
        return False
    return arguments.get("inplace") is True


_RELU_FUNCTIONS: set[Callable[..., Any]] = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_relu(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(_module(root, node), nn.ReLU | nn.ReLU6)
    return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in _RELU_METHODS
    )


def _layer_input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _places(graph: fx.Graph, root: nn.Module, scheme: Scheme, layers: set[str]) -> list[fx.Node]:
    """Nodes whose value is quantized, each once: two layers that read one tensor share its place."""
    if scheme.places == "relu":
        return [n for n in graph.nodes if _is_relu(n, root)]
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target in layers]
    return list(dict.fromkeys(value for n in calls if isinstance(value := _layer_input(n), fx.Node)))


def input_places(model: fx.GraphModule) -> Iterator[tuple[str, ActQuantizer | None]]:
    """Every call of a layer: its name and the quantizer it reads directly, if it does."""
    for node in model.graph.nodes:
        if isinstance(_module(model, node), LAYERS):
            value = _layer_input(node)
            source = _module(model, value) if isinstance(value, fx.Node) else None
            yield str(node.target), source if isinstance(source, ActQuantizer) else None


def _folded_places(model: fx.GraphModule, layers: Mapping[str, nn.Module]) -> dict[nn.Module, ActQuantizer]:
    """The quantizer in front of every layer. Raises ValueError where a layer reads two: its weight folds only once."""
    sources: dict[nn.Module, ActQuantizer] = {}
    for name, source in input_places(model):
        if source and name in layers and sources.setdefault(layers[name], source) is not source:
            raise ValueError(f"layer {name} is called on two inputs: the scales of both cannot fold into it")
    return sources


def _insert(graph: fx.Graph, node: fx.Node, place: str, places: str, layers: set[str]) -> None:
    if places == "relu":
        with graph.inserting_after(node):
            quantized = graph.call_module(f"act_quant.{place}", (node,))
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
        return
    # only the layers read the quantized value; a residual sum reads the original
    readers = [user for user in node.users if user.op == "call_module" and user.target in layers]
    with graph.inserting_before(min(readers)):  # by then a view of the value has changed it, if one does
        quantized = graph.call_module(f"act_quant.{place}", (node,))
    for user in readers:
        user.replace_input_with(node, quantized)


_STORED = "parametrizations.weight.original"


def _rename_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + "weight" in state_dict:
        state_dict[prefix + _STORED] = state_dict.pop(prefix + "weight")


def _rename_on_save(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + _STORED in state_dict:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + _STORED)
