"""Four executions of one convolution: against a plain loop, against each other, and their counts against a trace."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from granq import scaling
from granq.errors import UserError
from granq.quantizer import QParams, choose_qparams, fake_quantize
from granq.scaling import Conv, Integers

BITS = 3


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Conv]:
    """Input, weight and arguments: stride, padding, dilation, kernels that are not square, shifted inputs."""
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    n, c, o = (draw(st.integers(1, 6)) for _ in range(3))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(n, c, 7, 6, generator=rng) + draw(st.sampled_from([0.0, 1.0, -3.0]))
    weight = torch.randn(o, c, *kernel, generator=rng)
    return x, weight, Conv(draw(pair), padding, draw(pair))


def quantized(
    x: Tensor, weight: Tensor, x_granularity: str, weight_granularity: str, bits: int = BITS
) -> tuple[Integers, Integers]:
    x_integers = scaling.to_integers(x, choose_qparams(x, bits, x_granularity), bits)
    # the range of a 1x1 kernel of its own is a point: q + z would not fit; ranges that hold zero do
    held = torch.cat([weight.flatten(2), torch.zeros(*weight.shape[:2], 1)], 2)[..., None]
    return x_integers, scaling.to_integers(weight, choose_qparams(held, bits, weight_granularity), bits)


def by_hand(x: Integers, weight: Integers, conv: Conv) -> Tensor:
    """Every output as a plain sum over the window, padding skipped, in float64."""
    values, kernels = x.dequantize().double(), weight.dequantize().double()
    (n, _, h, w), (o, per_group, kh, kw) = values.shape, kernels.shape
    out = torch.zeros(n, o, *conv.output_size((h, w), (kh, kw)), dtype=torch.float64)
    for a, b, y, z in itertools.product(*map(range, out.shape)):
        first = b // (o // conv.groups) * per_group
        for c, i, j in itertools.product(range(per_group), range(kh), range(kw)):
            row = y * conv.stride[0] - conv.padding[0] + i * conv.dilation[0]
            column = z * conv.stride[1] - conv.padding[1] + j * conv.dilation[1]
            if 0 <= row < h and 0 <= column < w:
                out[a, b, y, z] += values[a, first + c, row, column] * kernels[b, c, i, j]
    return out


def executions(x: Integers, weight: Integers, conv: Conv) -> dict[str, Tensor]:
    found = {"pre-scaled": scaling.prescaled(x, weight.dequantize(), conv)}
    if conv.groups == 1:
        found["loop"] = scaling.accumulation_time(x, weight, conv)
        found["grouped"] = scaling.accumulation_time(x, weight, conv, grouped=True)
        if x.scale_inv.shape[0] == 1:
            found["folded"] = scaling.folded(x, scaling.fold(weight, x.scale_inv), conv)
    if x.scale_inv.shape[1] == weight.scale_inv.shape[1] == 1:
        found["layer-wise"] = scaling.layerwise(x, weight, conv)
    return found


@given(
    problems(),
    st.sampled_from(["per_tensor", "per_channel", "per_sample", "per_sample_channel"]),
    st.sampled_from(["per_tensor", "per_out_channel", "per_kernel"]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_executions_agree_within_the_bound(problem, x_granularity, weight_granularity, dtype) -> None:
    x, weight, conv = problem[0].to(dtype), problem[1].to(dtype), problem[2]
    integers = quantized(x, weight, x_granularity, weight_granularity)
    found = executions(*integers, conv)
    bound = scaling.float_bound(*integers, conv)
    for one, other in itertools.combinations(found.values(), 2):
        assert one.shape == other.shape
        assert ((one.double() - other.double()).abs() <= bound).all()


@pytest.mark.parametrize("conv", [
    Conv(), Conv((2, 1), (1, 2)), Conv(padding=(2, 2), dilation=(2, 1)), Conv((1, 2), (1, 0), (1, 2), 2),
])  # fmt: skip
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_executions_against_a_plain_sum(conv: Conv, shift: float) -> None:
    """The shift makes zero points asymmetric: padding must still count as the real value 0."""
    x, weight = torch.rand(2, 4, 6, 5) + shift, torch.randn(4, 4 // conv.groups, 3, 2)
    for x_granularity, weight_granularity in (("per_tensor", "per_out_channel"), ("per_sample_channel", "per_kernel")):
        integers = quantized(x, weight, x_granularity, weight_granularity)
        expected, bound = by_hand(*integers, conv), scaling.float_bound(*integers, conv)
        for value in executions(*integers, conv).values():
            assert ((value.double() - expected).abs() <= bound).all()


@given(problems(), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_integer_accumulation_is_exact(problem, bits) -> None:
    """int32 and float32 sums equal those in float64, which holds every integer below 2**53."""
    x, weight, conv = problem
    u, v = (t.values for t in quantized(x, weight, "per_tensor", "per_out_channel", bits))
    exact = F.conv2d(u.double(), v.double(), None, *conv)
    assert scaling.accumulate(u, v, conv).dtype == torch.int32
    assert torch.equal(scaling.accumulate(u, v, conv).double(), exact)
    assert torch.equal(scaling.accumulate(u, v, conv, torch.float32).double(), exact)


def test_integers_stand_for_the_fake_quantized_values() -> None:
    x = torch.randn(3, 4, 5, 5)
    held = scaling.to_integers(x, choose_qparams(x, BITS, "per_sample_channel"), BITS)
    assert held.values.dtype == torch.int8
    assert torch.equal(held.dequantize(), fake_quantize(x, BITS))


@pytest.mark.parametrize("low", [0.0, -0.5])
def test_eight_bits_are_bounded_by_what_they_hold(low: float) -> None:
    """288 products of at most 255 * 127: float32 holds their sum, which the bound of int16 would not let through."""
    x, weight = torch.rand(2, 32, 4, 4) + low, torch.ones(3, 32, 3, 3)
    x[0, 0, 0, :2] = torch.tensor([low, 1.0])
    u = scaling.to_integers(x, choose_qparams(x, 8, "per_tensor"), 8).values
    assert u.dtype == torch.int16 and u.max() - u.min() == 255
    v = scaling.to_integers(weight, QParams(torch.tensor(127.0), torch.tensor(0.0)), 8).values
    sums = scaling.accumulate(u, v, Conv(), torch.float32)
    assert torch.equal(sums.double(), F.conv2d(u.double(), v.double()))
    with pytest.raises(OverflowError, match="torch.float32"):
        scaling.accumulate(u, v.repeat(1, 4, 1, 1), Conv(), torch.float32)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="beyond int16"):
        scaling.to_integers(torch.full((1, 1, 2, 2), 2.5), QParams(torch.tensor(7e4), torch.tensor(175e3)), BITS)
    many = torch.full((1, 2**11, 3, 3), 127, dtype=torch.int8)
    with pytest.raises(OverflowError, match="torch.float32"):
        scaling.accumulate(torch.ones(1, 2**11, 3, 3, dtype=torch.int8), many, Conv(), torch.float32)
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 3, 3)
    integers = quantized(x, weight, "per_sample_channel", "per_out_channel")
    with pytest.raises(UserError, match="one scale for all input channels"):
        scaling.layerwise(*integers, Conv())
    with pytest.raises(RuntimeError, match="must match the existing size"):  # images have scales of their own
        scaling.fold(integers[1], integers[0].scale_inv)


def test_conv_of_a_layer() -> None:
    layer = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2, bias=False)
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(F.conv2d(x, layer.weight, None, *Conv.of(layer)), layer(x))
    assert Conv.of(layer).output_size((9, 8), (3, 2)) == layer(x).shape[2:]
    for padding, expected in (("same", (2, 1)), ("valid", (0, 0))):
        assert Conv.of(nn.Conv2d(4, 4, (3, 2), padding=padding, dilation=(2, 2))).padding == expected
    for padding, mode in (("same", "zeros"), (1, "circular")):  # an even kernel has one more on one side
        with pytest.raises(UserError, match=r"equal zero padding .* not that of Conv2d\(4, 4"):
            Conv.of(nn.Conv2d(4, 4, 2, padding=padding, padding_mode=mode))


class Trace(TorchDispatchMode):
    """Counts multiplications by scales, and bytes of operands and results that lead with the batch size."""

    def __init__(self, batch: int, weights: int) -> None:
        super().__init__()
        self.batch, self.weights, self.multiplications, self.bytes = batch, weights, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or not isinstance(out, Tensor):
            return out
        tensors = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)] + [out]
        large = [t for t in tensors if t.dim() >= 4 and t.shape[0] == self.batch and t.shape[-1] > 1]
        if not any(out is t for t in large):
            return out
        self.bytes += sum(t.numel() * t.element_size() for t in large)
        name = func.overloadpacket.__name__
        self.multiplications += out.numel() if name in ("mul", "mul_", "div", "div_") else 0
        if name == "convolution":
            self.bytes += args[1].numel() * 4
        return out


@pytest.mark.parametrize("conv", [Conv(), Conv((2, 2), (1, 1)), Conv(padding=(1, 1))])
def test_counts_are_those_of_a_trace(conv: Conv) -> None:
    x, weight = torch.randn(7, 6, 8, 9), torch.randn(9, 6, 3, 3)
    per_tensor = quantized(x, weight, "per_tensor", "per_out_channel")
    u, v = quantized(x, weight, "per_channel", "per_out_channel")
    dense, folded_weight = v.dequantize(), scaling.fold(v, u.scale_inv)
    runs = {
        "layer-wise": lambda: scaling.layerwise(*per_tensor, conv),
        "accumulation-time, loop": lambda: scaling.accumulation_time(u, v, conv),
        "accumulation-time, grouped": lambda: scaling.accumulation_time(u, v, conv, grouped=True),
        "pre-scaled": lambda: scaling.prescaled(u, dense, conv),
        "folded": lambda: scaling.folded(u, folded_weight, conv),
    }
    counts = scaling.count_scaling(tuple(x.shape), tuple(weight.shape), conv).set_index("execution")
    assert list(counts.index) == list(runs)
    for name, run in runs.items():
        with Trace(7, weight.numel()) as trace:
            run()
        assert (trace.multiplications, trace.bytes) == tuple(counts.loc[name]), name


def test_counts_by_hand() -> None:
    """One image, 2 channels of 4x4, 3 filters of 3x3 without padding: 12 outputs, 24 partial sums, 32 inputs."""
    counts = scaling.count_scaling((1, 2, 4, 4), (3, 2, 3, 3), Conv()).set_index("execution")
    assert counts.scale_multiplications.tolist() == [12, 24, 24, 32, 0]
    assert counts.bytes["pre-scaled"] == 32 * 5 + 4 * (32 + 54) + 4 * 12
