"""The integer proof: a ``foldable`` student as integer convolutions, and its export to safetensors and ONNX.

With ``u = q + z`` the integers of the input (each channel in its own step) and ``v`` those of the folded weight,
every layer is ``y = rescale * sum(u * v) + offset``: one convolution with int32 accumulation, one rescale per
output channel. BatchNorm behind the layer is part of the rescale. ReLU, sums and pooling stay floating point.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from granq.analysis import layer_calls, layer_names
from granq.checks import forward, typed
from granq.convert import LAYERS, ActQuantizer, activation_places, frozen_ranges
from granq.quantizer import quantize
from granq.scaling import Conv, convolve


def _storage(bits: int) -> torch.dtype:
    """A range that holds zero gives ``|q + z| < 2^bits``: k bits and a sign."""
    return torch.int8 if bits < 8 else torch.int16


class IntegerInput(nn.Module):
    """Values -> integers ``u = q + z``, int8 (int16 at 8 bits), each channel with its own static multiplier."""

    scale_inv: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    @torch.no_grad()  # learned steps are parameters
    def __init__(self, source: ActQuantizer) -> None:
        super().__init__()
        scale_inv, zero_point = source.qparams()
        self.register_buffer("scale_inv", scale_inv.clone())
        self.register_buffer("zero_point", zero_point.clone())
        self.register_buffer("low", zero_point - 2 ** (source.bits - 1))  # the smallest integer of every channel
        self.register_buffer("high", zero_point + 2 ** (source.bits - 1) - 1)
        self.dtype = _storage(source.bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x).to(self.dtype)

    def integers(self, x: Tensor) -> Tensor:
        """The integers, still held in the dtype of ``x``."""
        # The same operations in the same order as quantizer.fake_quantize_with: the integers agree bit for bit.
        codes = (x * self.scale_inv).sub_(self.zero_point).round_().add_(self.zero_point)
        return torch.minimum(torch.maximum(codes, self.low), self.high)


class IntegerLayer(nn.Module):
    """A convolution or linear layer on integers (N, C, H, W) or (..., F) -> float32 ``rescale * accumulator + offset``.

    Attributes:
        weight: int8 (int16 at 8 bits) integers ``v`` in the shape of the layer's weight.
        rescale: per output channel, the reciprocal of the weight's multiplier times BatchNorm's scale.
        offset: per output channel, bias and BatchNorm's shift.
    """

    weight: Tensor
    rescale: Tensor
    offset: Tensor

    @torch.no_grad()
    def __init__(self, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        quantizer = cast(Any, layer.parametrizations).weight[0]
        original = cast(Any, layer.parametrizations).weight.original.detach()
        scale_inv, zero_point = quantizer.folded_qparams(original)
        folded = original * quantizer.input_step(original)
        integers = quantize(folded, scale_inv, zero_point, quantizer.bits) + zero_point
        rescale, offset = 1 / scale_inv.flatten().double(), torch.zeros(integers.shape[0], dtype=torch.float64)
        rescale = rescale.expand(integers.shape[0])
        if layer.bias is not None:
            offset = offset + layer.bias.detach().double()
        if norm is not None:
            gain, shift = _affine(norm)
            rescale, offset = rescale * gain, offset * gain + shift
        self.register_buffer("weight", integers.to(_storage(quantizer.bits)))
        self.register_buffer("rescale", rescale.to(original.dtype))
        self.register_buffer("offset", offset.to(original.dtype))
        fan_in, largest = self.weight[0].numel(), 2**quantizer.bits * 2**quantizer.source.bits
        if fan_in * largest >= 2**31:
            raise ValueError(f"a sum over {fan_in} products below {largest} may not fit int32")
        self.conv = Conv.of(layer) if isinstance(layer, nn.Conv2d) else None
        self.channels = (-1, 1, 1) if self.conv else (-1,)  # shape of a value for each output channel

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer does, without a bias, to an input and a weight of any one type."""
        return F.linear(x, weight) if self.conv is None else convolve(x, weight, self.conv)

    def accumulate(self, u: Tensor) -> Tensor:
        """The int32 sums, exact: construction checked that the largest possible one fits."""
        return self.product(u.to(torch.int32), self.weight.to(torch.int32))

    def forward(self, u: Tensor) -> Tensor:
        return self.rescaled(self.accumulate(u))

    def rescaled(self, sums: Tensor) -> Tensor:
        """The layer's output from its sums."""
        return sums * self.rescale.view(self.channels) + self.offset.view(self.channels)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics cannot become part of a rescale")
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.detach().double()
    shift = -norm.running_mean.double() * gain
    return gain, shift + (norm.bias.detach().double() if norm.affine else 0)


@typed
def integer_model(student: fx.GraphModule) -> fx.GraphModule:
    """The integer twin of a calibrated student whose scheme folds: same graph, integer layers.

    Raises:
        ValueError: the student's scheme does not fold, its ranges were never set, or a layer is left unquantized.
    """
    places = activation_places(student)
    if not places or not all(q.include_zero for q in places.values()):
        raise ValueError("only a student of a foldable scheme runs in integers; quantize_model(..., 'foldable', ...)")
    if not all(q.seen for q in places.values()):
        raise ValueError("the activation ranges were never set; run granq.calibrate or train the student first")
    modules = dict(student.named_modules())
    graph = fx.Graph()
    graph.output(graph.graph_copy(student.graph, {}))
    replaced: dict[str, nn.Module] = {}
    calls = Counter(node.target for node in graph.nodes)
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, ActQuantizer):
            replaced[str(node.target)] = IntegerInput(layer)
        elif isinstance(layer, LAYERS):
            if not parametrize.is_parametrized(layer, "weight"):
                raise ValueError(f"layer {node.target} is not quantized (scheme.skip), so it has no integers")
            norm = _norm_behind(node, modules) if calls[node.target] == 1 else None  # each call may have its own
            replaced[str(node.target)] = IntegerLayer(
                layer, cast(nn.BatchNorm2d, modules[str(norm.target)]) if norm else None
            )
            if norm is not None:
                norm.replace_all_uses_with(node)
                graph.erase_node(norm)
    root = {str(n.target): modules[str(n.target)] for n in graph.nodes if n.op == "call_module"} | replaced
    attributes = {str(n.target): attrgetter(str(n.target))(student) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule(root | attributes, graph).eval()


def _norm_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The BatchNorm that alone reads ``node``, if there is one."""
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module" and isinstance(modules[str(users[0].target)], nn.BatchNorm2d):
        return users[0]
    return None


@torch.no_grad()
@typed
def measure_integer_agreement(student: fx.GraphModule, images: Tensor) -> pd.DataFrame:
    """Every layer of a foldable student in integers, on the inputs the fake-quantized student itself sees.

    The bound of one output is ``(K + 8) * eps * sum(|w^| * |x^|)``: the classical bound of a float32 sum of K products,
    plus the roundings of the two dequantizations, the rescale and the bias.

    Args:
        student: calibrated or trained, scheme ``foldable``.
        images: (N, 3, H, W), normalized.

    Returns:
        Columns layer, fan_in, outputs, max_accumulator (largest absolute int32 sum), max_abs_diff, beyond_bound (how
        many outputs are over their bound). The last row, layer ``network``, compares the logits of both networks, whose
        difference has no such bound: a value on a rounding tie may take the other code; it has same_top1 and images.
    """
    integer, eps = integer_model(student), torch.finfo(torch.float32).eps
    rows: list[dict[str, Any]] = []

    def compare(name: str, x: Tensor, output: Tensor) -> None:
        layer = cast(Any, student.get_submodule(name))
        twin = IntegerLayer(layer, None)
        quantizer = layer.parametrizations.weight[0].source
        u = (x * quantizer.qparams().scale_inv).round().to(torch.int32)  # x lies on the grid: exact
        sums = twin.accumulate(u)
        difference = (twin.rescaled(sums) - output).abs()
        magnitude = twin.product(x.abs(), layer.weight.abs())
        if layer.bias is not None:
            magnitude = magnitude + layer.bias.abs().view(twin.channels)
        fan_in = layer.weight[0].numel()
        rows.append(
            {
                "layer": name, "fan_in": fan_in, "outputs": output.numel(), "max_accumulator": int(sums.abs().max()),
                "max_abs_diff": difference.max().item(),
                "beyond_bound": int((difference > (fan_in + 8) * eps * magnitude).sum()),
            }
        )  # fmt: skip

    with frozen_ranges(student), layer_calls(student, layer_names(student), compare):
        logits = forward(student, images)
    own = integer(images)
    same = int((own.argmax(1) == logits.argmax(1)).sum())
    rows.append(
        {
            "layer": "network", "outputs": logits.numel(), "max_abs_diff": (own - logits).abs().max().item(),
            "same_top1": same, "images": len(images),
        }
    )  # fmt: skip
    return pd.DataFrame(rows)


def save_integers(model: fx.GraphModule, path: Path, facts: dict[str, Any]) -> None:
    """Write the integer tensors, rescales and input multipliers of ``integer_model`` as safetensors.

    Names: ``<layer>.weight`` int8, ``<layer>.rescale`` and ``<layer>.offset`` float32; ``<place>.scale_inv``,
    ``.zero_point``, ``.low`` and ``.high`` float32. ``facts`` (network, data, bits, accuracy) go into the header.
    """
    from safetensors.torch import save_file

    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(path), metadata={"granq": json.dumps(facts)})


class _ExportInput(nn.Module):
    """``IntegerInput`` whose int8 is stored and read by a standard QuantizeLinear/DequantizeLinear pair of step 1."""

    def __init__(self, source: IntegerInput) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.quantized_decomposed
        u = q.quantize_per_tensor(self.source.integers(x), 1.0, 0, -128, 127, torch.int8)
        return q.dequantize_per_tensor(u, 1.0, 0, -128, 127, torch.int8)


class _ExportLayer(nn.Module):
    """``IntegerLayer`` for runtimes without integer convolution: int8 weights, DequantizeLinear, float convolution."""

    def __init__(self, source: IntegerLayer) -> None:
        super().__init__()
        self.source = source

    def forward(self, u: Tensor) -> Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_tensor(self.source.weight, 1.0, 0, -128, 127, torch.int8)
        return self.source.rescaled(self.source.product(u, weight))


def export_onnx(model: fx.GraphModule, example: Tensor, path: Path) -> None:
    """Write ``integer_model`` as ONNX with standard QuantizeLinear and DequantizeLinear nodes, any batch size.

    The float sums of such a runtime are still exact while they stay below 2^24. Needs the extra ``granq[onnx]``.
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401  registers torch.ops.quantized_decomposed

    stored = {m.dtype for m in model.modules() if isinstance(m, IntegerInput)}
    stored |= {m.weight.dtype for m in model.modules() if isinstance(m, IntegerLayer)}
    if stored != {torch.int8}:
        raise ValueError("ONNX export stores int8, which holds activations and weights of at most 7 bits")
    portable = copy.deepcopy(model)
    for name, module in list(portable.named_modules()):
        if isinstance(module, IntegerInput):
            portable.set_submodule(name, _ExportInput(module))
        elif isinstance(module, IntegerLayer):
            portable.set_submodule(name, _ExportLayer(module))
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(portable, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(str(path))
