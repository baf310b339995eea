"""The integer proof: a ``foldable`` student as integer convolutions, and its export to safetensors and ONNX.

With ``u = q + z`` the integers of the input (each channel in its own step) and ``v`` those of the folded weight, every
layer is ``y = rescale * sum(u * v) + offset``: one convolution with int32 accumulation, one rescale per output channel.
A BatchNorm after the layer is part of the rescale. ReLU, sums and pooling stay floating point.
"""

import copy
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from granq.convert import ActQuantizer, layer_quantizers, original_weight, weight_quantizer
from granq.errors import UserError, require
from granq.files import to_json
from granq.graph import layer_names, norm_after
from granq.hooks import watch
from granq.plain import LAYERS, module_of
from granq.quantizer import float_codes
from granq.scaling import Conv, convolve

ROUNDING = 1e-6  # of the largest value, in float64


class IntegerInput(nn.Module):
    """Values -> integers ``u = q + z``, int8 (int16 at 8 bits), each channel with its own static multiplier."""

    def __init__(self, source: ActQuantizer) -> None:
        super().__init__()
        self.bits = source.bits
        self.scale_inv, self.zero_point = (nn.Buffer(value.detach().clone()) for value in source.qparams())

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers in the dtype of ``x``: bit for bit those of ``fake_quantize_with``."""
        return float_codes(x, self.scale_inv, self.zero_point, self.bits, clamp=True) + self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x).to(torch.int8 if self.bits < 8 else torch.int16)  # |q + z| < 2^k: k bits and a sign


class IntegerLayer(nn.Module):
    """A layer on integers (N, C, H, W) or (..., F) -> float32 ``rescale * sums + offset``; the sums fit int32."""

    @torch.no_grad()
    def __init__(self, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        quantizer, original = cast(Any, weight_quantizer(layer)), original_weight(layer)
        (scale_inv, zero_point), integers = quantizer.qparams(original), quantizer.codes(original)
        rescale = (1 / scale_inv.double()).reshape(-1, 1).expand(len(integers), 1)
        offset = torch.zeros_like(rescale[:, 0]) if layer.bias is None else layer.bias.double()
        if norm is not None:
            n = cast(Any, copy.deepcopy(norm).double())
            statistics = n.running_mean, n.running_var, n.eps, n.weight, n.bias
            rescale, offset = nn.utils.fuse_conv_bn_weights(rescale, offset, *statistics)
        self.bits = quantizer.bits
        #: integers ``v`` in the shape of the layer's weight, int8 (int16 at 8 bits)
        self.weight = nn.Buffer((integers + zero_point).to(torch.int8 if self.bits < 8 else torch.int16))
        #: per output channel: reciprocal of the weight's multiplier times the BatchNorm's scale
        self.rescale = nn.Buffer(rescale.flatten().to(original.dtype).detach())
        #: per output channel: bias and the BatchNorm's shift
        self.offset = nn.Buffer(offset.to(original.dtype).detach())
        fan_in, largest = self.weight[0].numel(), 2**self.bits * 2**quantizer.source.bits
        if fan_in * largest >= 2**31:
            raise UserError(f"a sum over {fan_in} products below {largest} may not fit int32")
        self.conv = Conv.of(layer) if isinstance(layer, nn.Conv2d) else None
        self.channels = (-1, 1, 1) if self.conv else (-1,)  # shape of a value for each output channel

    def accumulate(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the exact int32 sums of integers ``x``; with another ``weight``, the sums of the two in their type."""
        x, weight = (x.to(torch.int32), self.weight.to(torch.int32)) if weight is None else (x, weight)
        return nn.functional.linear(x, weight) if self.conv is None else convolve(x, weight, self.conv)

    def rescaled(self, sums: Tensor) -> Tensor:
        return sums * self.rescale.view(self.channels) + self.offset.view(self.channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.rescaled(self.accumulate(input))


def integer_model(student: fx.GraphModule) -> fx.GraphModule:
    """Return the integer twin of a calibrated student, in float32. Raises UserError for layers that have none."""
    student = copy.deepcopy(student)  # what the two would share, such as pooling, would follow either's mode
    if next(student.parameters()).dtype in (torch.float16, torch.bfloat16):
        student = student.float()  # half precision holds no sum
    layers = layer_quantizers(student)
    if not all(layer.weight and layer.weight.source for layer in layers.values() if layer.inputs):
        raise UserError("only a student of a foldable scheme that skips no layer runs in integers")
    twin = fx.GraphModule(student, student.graph)
    for node in list(twin.graph.nodes):
        name, module = str(node.target), module_of(student, node)
        if isinstance(module, ActQuantizer):
            twin.set_submodule(name, IntegerInput(module))
        elif isinstance(module, LAYERS):
            one = isinstance(module, nn.Conv2d) and len(layers[name].inputs) == 1  # each call may have its own
            after = norm_after(student, node) if one else None
            norm: Any = after and module_of(student, after)
            twin.set_submodule(name, IntegerLayer(module, norm))
            if after is not None:
                after.replace_all_uses_with(node)
                twin.graph.erase_node(after)
                if not any(other.target == after.target for other in twin.graph.nodes):
                    twin.set_submodule(str(after.target), nn.ModuleDict(dict(norm.named_children())))  # its activation
    twin.delete_all_unused_submodules()
    if left := [name for name, m in twin.named_modules() if isinstance(m, (*LAYERS, _ConvNd, nn.RNNBase))]:
        raise UserError(f"these layers are not in integers, as only Conv2d and Linear can be: {', '.join(left)}")
    twin.recompile()
    return twin.eval()


@torch.no_grad()
def measure_integer_agreement(student: fx.GraphModule, images: Tensor) -> pd.DataFrame:
    """Compute every layer of a foldable student in integers, on the inputs that it itself sees from ``images``.

    Columns: layer, max_accumulator (largest absolute int32 sum), max_abs_diff, and beyond_bound, the outputs beyond
    ``(K + 8) * eps * sum(|w^| * |x^|)``: the classical bound of a float32 sum of K products, plus the roundings of two
    dequantizations, rescale and bias. The last row, ``network``, compares inputs of places and logits of student and
    ``integer_model`` in float64, where no value is so close to a rounding tie that the two take different codes.
    """
    student, images = copy.deepcopy(student).cpu().eval(), images.cpu()  # CUDA has no convolution of integers
    exact, beyond = copy.deepcopy(student).double(), 0
    networks = exact, integer_model(exact)
    rows, eps = list[tuple[str, int | None, float, int]](), torch.finfo(torch.float32).eps

    def compare(name: str, x: Tensor, output: Tensor) -> None:
        layer = cast(Any, student.get_submodule(name))
        integer, source = IntegerLayer(layer), cast(Any, weight_quantizer(layer)).source
        sums = integer.accumulate((x * source.qparams().scale_inv).round())  # x lies on the grid: exact
        difference = (integer.rescaled(sums) - output).abs()
        bias = 0 if layer.bias is None else layer.bias.abs().view(integer.channels)
        bound = (layer.weight[0].numel() + 8) * eps * (integer.accumulate(x.abs(), layer.weight.abs()) + bias)
        rows.append((name, int(sums.abs().max()), difference.max().item(), int((difference > bound).sum())))

    with watch(student, layer_names(student), compare):
        student(images)
    for value, own in zip(*(_values(network, images) for network in networks), strict=True):
        difference = (own - value).abs()
        beyond += int((~(difference <= ROUNDING * value.abs().max())).sum())  # a NaN is beyond, too
    rows.append(("network", None, difference.max().item(), beyond))
    return pd.DataFrame(rows, columns=["layer", "max_accumulator", "max_abs_diff", "beyond_bound"])


def _values(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return what enters every place for a few of ``images`` in float64, and at the end the logits."""
    places, found = [f"act_quant.{n}" for n, _ in cast(Any, network).act_quant.named_children()], list[Tensor]()
    with watch(network, places, lambda _, x, __: found.append(x.clone()), before=True):
        found.append(network(images[:8].double()))
    return found


class _Portable(nn.Module):
    """An integer module for runtimes without integer convolution: uint8 is stored, float32 computes.

    Runtimes know one zero point for activations: that of the first channel; others are ``shift`` off it. A convolution
    adds it to its input, a Linear what it makes of it to its sums: onnxruntime then computes the product of the two
    DequantizeLinear in integers. With the weight's alone it chooses a product that rounds its input anew.
    """

    def __init__(self, source: IntegerInput | IntegerLayer, place: IntegerInput) -> None:
        super().__init__()
        first = place.zero_point.flatten()[0]
        self.source, shift, zero = source, place.zero_point - first, 2 ** (place.bits - 1) - first
        if isinstance(source, IntegerLayer):
            zero = -source.weight.flatten(1).amin(1).clamp_max(0)
            codes = source.weight + zero.view(-1, *(1,) * (source.weight.dim() - 1))
            self.codes = nn.Buffer(codes.to(torch.uint8))
            if source.conv is None and shift.any():
                shift = source.accumulate(shift, source.weight.to(shift))
        self.shift: Tensor | int = nn.Buffer(shift) if shift.any() else 0
        self.zero = nn.Buffer(zero.to(torch.uint8))
        self.one = nn.Buffer(torch.ones_like(zero, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        def node(kind: str, of: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            values = (of, self.one, self.zero)
            return torch.onnx.ops.symbolic(kind, values, {"axis": 0}, dtype=dtype, shape=of.shape)

        if isinstance(self.source, IntegerInput):
            return node("DequantizeLinear", node("QuantizeLinear", self.source.integers(x) - self.shift, torch.uint8))
        weight, conv = node("DequantizeLinear", self.codes), self.source.conv
        sums = self.source.accumulate(x + self.shift if conv else x, weight)
        return self.source.rescaled(sums if conv else sums + self.shift)


def export_onnx(model: fx.GraphModule, example: Tensor, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Write ``integer_model`` as ONNX with standard QuantizeLinear and DequantizeLinear nodes, any batch size.

    It takes ``images`` and gives ``logits``; ``facts``, such as their mean and deviation, become its metadata.
    Activations and weights are uint8 with a zero point. The float sums of a runtime are exact below 2^24, which those
    of 8 bits may pass. Needs the extra ``granq[export]``. Raises UserError for another model.
    """
    require("onnxscript", "export")
    if not any(isinstance(module, IntegerLayer) for module in model.modules()):
        raise UserError("export_onnx takes what integer_model made of a student")
    portable = copy.deepcopy(model)
    for node in portable.graph.nodes:
        module: Any = module_of(model, node)
        if getattr(module, "divisor_override", None) or node.kwargs.get("divisor_override"):
            raise UserError(f"{node.name} has a divisor_override, which torch's exporter to ONNX would drop")
        if isinstance(module, IntegerInput | IntegerLayer):
            place = module if isinstance(module, IntegerInput) else module_of(model, node.all_input_nodes[0])
            portable.set_submodule(node.target, _Portable(module, cast(IntegerInput, place)))
    shapes = ({0: torch.export.Dim("batch")},)
    how: Any = dict(dynamo=True, dynamic_shapes=shapes, input_names=["images"], output_names=["logits"], verbose=False)
    program = cast(Any, torch.onnx.export(portable, (example,), **how))
    for node in program.model.graph:  # stack traces: 38 % of the file of ResNet-20, with folders of this machine
        node.metadata_props.clear()
    program.model.metadata_props.update({name: to_json(fact) for name, fact in (facts or {}).items()})
    program.save(path, external_data=False)
