"""Schemes, and putting their quantizers into a model.

Weights become parametrizations of their layer; activations become ``ActQuantizer`` modules in a rewritten
``torch.fx`` graph, so that a ReLU module used twice, ``F.relu`` and ``x.relu_()`` each count as the place they are.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from granq.quantizer import _check_bits, fake_quantize, fake_quantize_with, min_max, qparams_from_range

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
    """

    weights: str | None
    activations: str | None
    tracked: bool = False
    places: str = "inputs"
    clamp: bool = True
    promote: bool = True
    skip: tuple[str, ...] = ()


#: method.md section 2. ``layerwise`` and ``per_channel`` quantize where ``release`` does, so that granularity and
#: range tracking are what differs; ``strict`` quantizes every layer's input.
SCHEMES: dict[str, Scheme] = {
    "release": Scheme("per_kernel", "per_sample_channel", places="relu", clamp=False, promote=False),
    "strict": Scheme("per_out_channel", "per_sample_channel"),
    "layerwise": Scheme("per_out_channel", "per_tensor", tracked=True, places="relu"),
    "per_channel": Scheme("per_out_channel", "per_channel", tracked=True, places="relu"),
}


def get_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme by name; a ``Scheme`` is returned as it is. Raises ValueError listing the known names."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[scheme]


class WeightQuantizer(nn.Module):
    """Parametrization of a layer's weight: (O, I, kh, kw) or (O, I) -> the same, fake-quantized."""

    def __init__(self, bits: int, granularity: str, clamp: bool, promote: bool) -> None:
        super().__init__()
        self.bits, self.granularity, self.clamp, self.promote = bits, granularity, clamp, promote

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.bits, self.granularity, self.clamp, promote=self.promote)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, granularity={self.granularity}, clamp={self.clamp}"


class ActQuantizer(nn.Module):
    """Fake quantization of one activation place, (N, C, H, W) or (..., F) rows in front of a Linear.

    With ``tracked`` ranges every forward updates the moving average until ``freeze_ranges``; the first batch sets it.
    """

    MOMENTUM = 0.9
    running_min: Tensor
    running_max: Tensor

    def __init__(
        self, bits: int, granularity: str, tracked: bool, clamp: bool, promote: bool, rows: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.granularity, self.tracked, self.clamp, self.promote = (
            bits,
            granularity,
            tracked,
            clamp,
            promote,
        )
        self.rows = rows
        self.frozen = False
        if tracked:
            self.register_buffer("running_min", torch.empty(0))  # shaped by the first batch
            self.register_buffer("running_max", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 4) or (self.rows and x.dim() != 2):
            return self._quantize(x.flatten(0, -2)).view_as(x)
        return self._quantize(x)

    def _quantize(self, x: Tensor) -> Tensor:
        if not self.tracked:
            return fake_quantize(x, self.bits, self.granularity, self.clamp, promote=self.promote)
        if not self.frozen:
            self._observe(x)
        if not self.running_min.numel():
            raise RuntimeError("ranges were frozen before a batch was seen: run granq.calibrate first")
        qparams = qparams_from_range(self.running_min, self.running_max, self.bits, promote=self.promote)
        return fake_quantize_with(x, qparams, self.bits, self.clamp)

    def _observe(self, x: Tensor) -> None:
        low, high = min_max(x, self.granularity)
        if not self.running_min.numel():
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

    def extra_repr(self) -> str:
        ranges = "tracked" if self.tracked else "dynamic"
        return f"bits={self.bits}, granularity={self.granularity}, ranges={ranges}, clamp={self.clamp}"


def quantize_model(model: nn.Module, scheme: str | Scheme, weight_bits: int, act_bits: int) -> fx.GraphModule:
    """A fake-quantized copy of ``model``; the model itself is not touched.

    Every Conv2d and Linear keeps its name and its state-dict keys, so a teacher's state dict loads into the copy.
    Activation places are the modules ``act_quant.<place>``; ``activation_places`` lists them.

    Args:
        model: any network of Conv2d and Linear layers whose forward ``torch.fx`` can trace.
        scheme: a name in ``SCHEMES`` or a ``Scheme``.
        weight_bits: 2 to 8.
        act_bits: 2 to 8.

    Raises:
        ValueError: unknown scheme, bits outside 2 to 8, no layer to quantize, or a forward that cannot be traced.
    """
    scheme = get_scheme(scheme)
    _check_bits(weight_bits)
    _check_bits(act_bits)
    student = copy.deepcopy(model).eval()
    layers = {n: m for n, m in student.named_modules() if isinstance(m, LAYERS) and n not in scheme.skip}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Conv2d or Linear layer to quantize")
    if unknown := set(scheme.skip) - dict(student.named_modules()).keys():
        raise ValueError(f"scheme.skip names layers the model does not have: {', '.join(sorted(unknown))}")
    try:
        graph = _Tracer().trace(student)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise ValueError(
            f"cannot trace {type(model).__name__}: {(str(error) or type(error).__name__).splitlines()[0]}; "
            "torch.fx needs a forward without control flow on tensor values"
        ) from error

    quantizers = nn.ModuleDict()
    if scheme.activations is not None:
        for node in _places(graph, student, scheme, set(layers)):
            rows = any(isinstance(_module(student, user), nn.Linear) for user in node.users)
            quantizers[node.name] = ActQuantizer(
                act_bits, scheme.activations, scheme.tracked, scheme.clamp, scheme.promote, rows
            )
            _insert_after(graph, node, student, scheme.places, set(layers))
    student.act_quant = quantizers
    quantized = fx.GraphModule(student, graph, class_name=type(model).__name__)
    for name, module in student.named_modules():  # fx drops what the forward does not reach; keep its keys
        if name and not _has_module(quantized, name):
            quantized.add_submodule(name, module)
    if scheme.weights is not None:
        for layer in dict.fromkeys(layers.values()):  # a layer under two names once
            parametrize.register_parametrization(
                layer, "weight", WeightQuantizer(weight_bits, scheme.weights, scheme.clamp, scheme.promote)
            )
            layer.register_load_state_dict_pre_hook(_rename_on_load)
            layer.register_state_dict_post_hook(_rename_on_save)
    return quantized.eval()


def activation_places(model: nn.Module) -> dict[str, ActQuantizer]:
    """The quantized activation places of a quantized model by name."""
    return {n.removeprefix("act_quant."): m for n, m in model.named_modules() if isinstance(m, ActQuantizer)}


def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Stop (or resume) the tracking of activation ranges."""
    for quantizer in activation_places(model).values():
        quantizer.frozen = frozen


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Track activation ranges over batches of images, then freeze them. Nothing to do for dynamic schemes."""
    freeze_ranges(model, False)
    for batch in images:
        model(batch)
    freeze_ranges(model)


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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or super().is_leaf_module(m, module_qualified_name)


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


def _insert_after(graph: fx.Graph, node: fx.Node, root: nn.Module, places: str, layers: set[str]) -> None:
    with graph.inserting_after(node):
        quantized = graph.call_module(f"act_quant.{node.name}", (node,))
    if places == "relu":
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
        return
    for user in list(node.users):  # only the layers read the quantized value; a residual sum reads the original
        if user.op == "call_module" and user.target in layers:
            user.replace_input_with(node, quantized)


def _has_module(root: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(root)
    except AttributeError:
        return False
    return True


_STORED = "parametrizations.weight.original"


def _rename_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + "weight" in state_dict:
        state_dict[prefix + _STORED] = state_dict.pop(prefix + "weight")


def _rename_on_save(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if prefix + _STORED in state_dict:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + _STORED)
