import copy
import itertools

import onnx
import onnxruntime
import pytest
import timm.layers
import torch
import torchvision
from conftest import TinyNet
from safetensors.torch import load_file
from torch import nn

from granq import integer
from granq.convert import activation_places, calibrate, image_places, quantize_model, set_image_range
from granq.errors import UserError
from granq.files import write_tensors
from granq.integer import export_onnx, integer_model, measure_integer_agreement
from granq.match import learn_steps
from granq.models import build_network
from granq.schemes import SCHEMES, Scheme


def with_statistics(model):
    """Random BatchNorm statistics and affine parameters, so that the rescale has something to fold."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2), norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 1.5), norm.bias.data.normal_(0, 0.2)
    return model.eval()


def run_exported(twin, x, path, outputs_of=""):
    """Export ``twin``, with two of the images as the example, and run all of them in onnxruntime.

    ``outputs_of`` is a kind of node, the outputs of which follow the logits, in the order of execution.
    """
    export_onnx(twin, x[:2], path)
    model = onnx.load(path)
    for node in model.graph.node if outputs_of else ():
        if node.op_type == outputs_of:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [torch.from_numpy(t) for t in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.grouped(torch.relu(self.first(x)))))
        return self.fc(x.mean((2, 3)))


class Mixer(nn.Module):
    """Linear layers on rows of patches (N, T, F)."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 8, 8), nn.BatchNorm2d(16)
        self.wide, self.narrow, self.fc = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)  # 16 patches with 16 channels
        return self.fc((x + self.narrow(self.wide(x).relu())).mean(1))


class TwoNorms(nn.Module):
    """One convolution, called twice, each time with a BatchNorm of its own behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc((self.norm1(self.conv(x)).relu() + self.norm2(self.conv(x)).relu()).mean((2, 3)))


def inverted_residuals():
    """A residual around a depthwise convolution, between convolutions whose outputs have no ReLU."""
    block, first = torchvision.models.mobilenetv2.InvertedResidual, nn.Conv2d(3, 4, 3, 2, 1)
    blocks = block(4, 6, 2, 3), block(6, 6, 1, 3)
    return nn.Sequential(first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


NETWORKS = [TinyNet, Grouped, Mixer, TwoNorms, inverted_residuals]
LARGE = [lambda: build_network("resnet20_cifar10", 10), lambda: torchvision.models.MobileNetV2(3, 0.25)]


@pytest.mark.parametrize(
    ("make", "bits", "learned"),
    [
        *itertools.product(NETWORKS, (3, 8), [False]),
        *itertools.product(NETWORKS + LARGE, [3], [True]),
        (LARGE[0], 2, False),
    ],
)
def test_integers_equal_the_fake_quantized_twin(make, bits, learned):
    def draw():
        return torch.randn(4, 3, 32, 32) * torch.tensor([0.1, 1, 5]).view(1, 3, 1, 1)

    student = quantize_model(with_statistics(make()), "foldable", bits, bits)
    calibrate(student, [draw() for _ in range(2)])
    if learned:
        with torch.no_grad():
            for step in learn_steps(student):
                step.add_(torch.randn_like(step) / 5)
    frame = measure_integer_agreement(student, draw())
    layers = frame[frame.layer != "network"]
    assert layers.layer.nunique() == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in student.modules())
    assert (layers.beyond_bound == 0).all() and (layers.max_accumulator > 0).all()
    # In float64 no value lies so close to a tie that the two orders of summation disagree about its code.
    x = draw().double()
    twin = integer_model(student.double())
    torch.testing.assert_close(twin.double()(x), student(x), rtol=1e-4, atol=1e-4)


def test_every_weight_of_a_filter_is_one_of_few_integers(tiny):
    student = quantize_model(tiny, "foldable", 2, 2)
    calibrate(student, [torch.randn(8, 3, 8, 8)])
    weight = integer_model(student).get_submodule("conv2").weight
    assert weight.abs().max() <= 3 and all(len(f.unique()) <= 4 for f in weight)


def test_an_image_of_twice_the_bits_takes_two_passes(tiny):
    """6 bits as a low and a high half: the first layer runs on 3 bits (the high half with its sign) twice."""
    student = quantize_model(with_statistics(tiny), "foldable", 3, 3, image_bits=6)
    images = torch.randn(8, 3, 8, 8)
    calibrate(student, [images])
    assert [place.bits for place in activation_places(student).values()] == [6, 3, 3]
    assert (measure_integer_agreement(student, images).beyond_bound.dropna() == 0).all()
    twin = integer_model(student)
    u = twin.get_submodule("act_quant.x")(images)
    low, high = u & 7, u >> 3
    assert low.min() == 0 and low.max() == 7 and -8 <= high.min() < 0 < high.max() <= 7
    first = twin.get_submodule("conv1")
    assert torch.equal(first.accumulate(low) + (first.accumulate(high) << 3), first.accumulate(u))


def test_a_range_holds_zero_so_padding_is_exact():
    """All inputs are above 5: without zero in the range the padded border would have no code."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False)).eval()
    student = quantize_model(model, "foldable", 8, 8)
    x = 5 + torch.rand(4, 1, 6, 6)
    calibrate(student, [x])
    assert (student(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()
    assert measure_integer_agreement(student, x).beyond_bound[0] == 0


def test_the_twin_leaves_the_student_as_it_is(tiny):
    student = quantize_model(with_statistics(tiny), "foldable", 3, 3)
    images = torch.randn(8, 3, 8, 8)
    calibrate(student, [images])
    before, logits = {k: v.clone() for k, v in student.state_dict().items()}, student(images)
    integer_model(student)
    measure_integer_agreement(student.train(), images)  # measured in eval mode, whatever mode it has
    assert student.training and torch.equal(student.eval()(images), logits)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_export(tmp_path, tiny):
    student = quantize_model(with_statistics(tiny), "foldable", 3, 3)
    calibrate(student, [torch.randn(8, 3, 8, 8)])
    twin, x = integer_model(student), torch.randn(5, 3, 8, 8)
    write_tensors(tmp_path / "i.safetensors", twin.state_dict(), {"bits": 3})
    saved = load_file(tmp_path / "i.safetensors")
    assert saved.keys() == twin.state_dict().keys() and len(saved) == 4 * 3 + 3 * 2  # layers, places
    assert saved["conv1.weight"].dtype == torch.int8 and saved["conv1.rescale"].shape == (4,)
    (logits,) = run_exported(twin, x, tmp_path / "n.onnx")  # another batch size than the example's
    kinds = [n.op_type for n in onnx.load(tmp_path / "n.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 3 and kinds.count("DequantizeLinear") == 3 + 4
    torch.testing.assert_close(logits, twin(x), rtol=1e-5, atol=1e-5)
    assert b"integer.py" not in (tmp_path / "n.onnx").read_bytes()  # nor any other path of this machine


@pytest.mark.parametrize("make", NETWORKS)
def test_eight_bits_in_onnxruntime(tmp_path, make):
    """Weights and codes are uint8; codes and logits are the twin's, but for values on a tie, one code apart."""
    student, right = quantize_model(with_statistics(make()), "foldable", 8, 8), list[torch.Tensor]()
    calibrate(student, [torch.randn(4, 3, 16, 16) for _ in range(2)])
    twin, x = integer_model(student), torch.randn(3, 3, 16, 16)
    logits, *codes = run_exported(twin, x, tmp_path / "n.onnx", "QuantizeLinear")
    stored = [(tuple(t.dims), t.data_type) for t in onnx.load(tmp_path / "n.onnx").graph.initializer]
    for module in twin.modules():
        if isinstance(module, integer.IntegerInput):
            module.register_forward_hook(lambda place, args, u: right.append(u + 128 - place.zero_point))
        if isinstance(module, integer.IntegerLayer):
            kinds = {kind for shape, kind in stored if shape == module.weight.shape}
            assert kinds == {onnx.TensorProto.UINT8}
    assert (logits - twin(x)).abs().max() < 1e-3 * logits.abs().max()
    assert len(codes) == len(right) == len(activation_places(student))
    for code, own in zip(codes, right, strict=True):
        assert code.dtype == torch.uint8 and code.max() > 127
        apart = (code - own).abs()
        assert apart.max() <= 1 and apart.mean() < 1e-3


def test_what_the_exporter_would_drop_is_refused(tmp_path):
    layers = nn.Conv2d(3, 4, 3), nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(4, 2, 3)
    student, x = quantize_model(nn.Sequential(*layers).eval(), "foldable", 8, 8), torch.randn(2, 3, 8, 8)
    calibrate(student, [x])
    with pytest.raises(UserError, match="has a divisor_override"):
        export_onnx(integer_model(student), x, tmp_path / "n.onnx")


def test_sums_that_float32_rounds_stay_within_the_bound(tmp_path):
    """1,024 products near 255 * 255 are beyond 2^24; ``measure_integer_agreement`` says what float32 may do to them."""
    layer = nn.Conv2d(1024, 4, 1)
    nn.init.uniform_(layer.weight, 0.9, 1)
    student, x = quantize_model(nn.Sequential(layer).eval(), "foldable", 8, 8), 1 - torch.rand(8, 1024, 2, 2) / 10
    calibrate(student, [x])
    twin = integer_model(student)
    frame, (found,) = measure_integer_agreement(student, x), run_exported(twin, x, tmp_path / "n.onnx")
    assert frame.max_accumulator[0] > 2**24 and (frame.beyond_bound == 0).all()
    assert ((found - twin(x)).abs() <= (1024 + 8) * torch.finfo(torch.float32).eps * (found.abs() + 1)).all()


def test_refusals(tiny, tmp_path):
    skips = Scheme(**dict(SCHEMES["foldable"]) | {"skip": ("conv2",)})
    for scheme in ("strict", "layerwise", skips):
        with pytest.raises(UserError, match="foldable scheme that skips no layer"):
            integer_model(quantize_model(tiny, scheme, 3, 3))
    with pytest.raises(UserError, match="never set"):
        integer_model(quantize_model(tiny, "foldable", 3, 3))
    with pytest.raises(UserError, match="what integer_model made"):
        export_onnx(quantize_model(tiny, "foldable", 3, 3), torch.randn(2, 3, 8, 8), tmp_path / "n.onnx")
    wide = nn.Sequential(nn.Linear(2**15, 1)).eval()
    student = quantize_model(wide, "foldable", 8, 8)
    calibrate(student, [torch.randn(2, 2**15)])
    with pytest.raises(UserError, match="may not fit int32"):
        integer_model(student)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    with pytest.raises(UserError, match="called on two inputs"):
        quantize_model(Twice(), "foldable", 3, 3)


class PadAfter(nn.Conv2d):
    """As TensorFlow pads at stride 2."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def building_blocks():
    """Of EfficientNet-Lite and MobileNetV2 with TensorFlow's padding: nothing but subclasses, and a linear end."""
    act, same = (lambda n, **more: timm.layers.BatchNormAct2d(n, **more)), timm.layers.Conv2dSame
    return with_statistics(
        nn.Sequential(
            PadAfter(3, 6, 3, 2, bias=False), act(6, act_layer=nn.ReLU6),
            same(6, 6, 5, 2, groups=6, bias=False), act(6), nn.Conv2d(6, 4, 1, bias=False), act(4, apply_act=False),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )
    )  # fmt: skip


@pytest.mark.parametrize("bits", [7, 8])
def test_subclasses_are_folded_and_exported(tmp_path, bits):
    student, x = quantize_model(building_blocks(), "foldable", bits, bits), torch.randn(8, 3, 21, 16)
    calibrate(student, [x])
    frame = measure_integer_agreement(student, x).set_index("layer")
    assert len(frame) == 5 and (frame.beyond_bound == 0).all()
    twin = integer_model(student)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules())  # all are in the rescale
    torch.testing.assert_close(
        integer_model(student.double()).double()(x.double()), student(x.double()), rtol=1e-6, atol=1e-6
    )
    (logits,) = run_exported(twin, x, tmp_path / "n.onnx")
    torch.testing.assert_close(logits, twin(x), rtol=1e-4, atol=1e-4)


def test_the_example_of_an_activation_inside_a_batchnorm():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    student, x = quantize_model(with_statistics(net), "foldable", 7, 7), torch.randn(8, 3, 8, 8)
    calibrate(student, [x])
    assert (integer_model(student)(x) - student(x)).abs().max() < 1e-5
    assert (student(x) - net(x)).abs().max() < 0.05


@pytest.mark.parametrize("what", ["activation", "norm", "pooling", "rescale", "nan"])
def test_a_twin_that_computes_something_else_is_found(what, monkeypatch):
    student, x = quantize_model(building_blocks(), "foldable", 3, 3), torch.randn(8, 3, 21, 16)
    calibrate(student, [x])

    def wrong(student):
        twin = integer_model(student)
        layer = twin.get_submodule("4")
        if what == "activation":
            (node,) = [node for node in twin.graph.nodes if node.target == "1.act"]
            node.replace_all_uses_with(node.args[0])
            twin.graph.erase_node(node)
            twin.recompile()
        elif what == "norm":
            layer.offset.add_(0.1 * layer.offset.abs().max())
        elif what == "pooling":
            twin.set_submodule("6", nn.AdaptiveMaxPool2d(1))
        else:
            layer.rescale[0] *= torch.nan if what == "nan" else 2
        return twin

    assert (measure_integer_agreement(student, x).beyond_bound == 0).all()
    monkeypatch.setattr(integer, "integer_model", wrong)
    frame = measure_integer_agreement(student, x)
    assert (frame.beyond_bound[:-1] == 0).all() and frame.beyond_bound.iloc[-1] > 0


def test_student_and_twin_do_not_move_each_other(tiny):
    student = quantize_model(tiny, "foldable", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    modes = [m.training for m in student.train().modules()]
    twin = integer_model(student)
    assert [m.training for m in student.modules()] == modes and not any(m.training for m in twin.modules())
    assert not {*student.modules()} & {*twin.modules()}


def test_a_norm_that_others_call_stays(tiny):
    class Shared(type(tiny)):
        def forward(self, x):
            x = self.bn1(self.conv1(x)).relu()
            return self.fc(self.bn1(x).relu().mean((2, 3)))

    student, images = quantize_model(Shared().eval(), "foldable", 8, 8), torch.randn(4, 3, 8, 8)
    calibrate(student, [images])
    assert torch.allclose(integer_model(student)(images), student(images), atol=1e-4)


def test_a_norm_after_a_linear_layer_on_maps_stays(tiny):
    """It normalizes dimension 1; the features of a Linear are the last."""
    linear = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 4))
    nn.init.normal_(linear[2].running_mean)
    student, images = quantize_model(linear.eval(), "foldable", 8, 8), torch.randn(4, 3, 8, 8)
    calibrate(student, [images])
    assert torch.allclose(integer_model(student)(images), student(images), atol=1e-4)


def test_every_place_of_the_image_gets_its_range():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc((self.a(x) + self.b(nn.functional.pad(x, (1, 1, 1, 1)))).mean((2, 3)))

    student = quantize_model(Twice(), "foldable", 3, 3, image_bits=6)
    calibrate(student, [torch.rand(2, 3, 8, 8)])
    set_image_range(student, *(torch.full((1, 3, 1, 1), end) for end in (-9.0, 9.0)))
    places = image_places(student)
    assert len(places) == 2 and all(place.running_max.eq(9).all() for place in places)


def test_a_norm_of_batch_statistics_stays_in_floating_point(tiny):
    tiny.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
    student = quantize_model(tiny.eval(), "foldable", 4, 4)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    twin = integer_model(student)
    assert isinstance(twin.bn1, nn.BatchNorm2d) and not hasattr(twin, "bn2")


@pytest.mark.filterwarnings("ignore:only weights are quantized")
@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 3, padding=1), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)]
)
def test_layers_that_would_stay_in_floating_point_are_named(layer):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other, self.fc = nn.Conv2d(3, 4, 3, padding=1), layer, nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.other(self.conv(x).relu().mean(2)).mean(2))

    student = quantize_model(Mixed().eval(), "foldable", 3, 3)
    calibrate(student, [torch.randn(2, 3, 8, 8)])
    with pytest.raises(UserError, match="not in integers, .*: other"):
        integer_model(student)
    with pytest.raises(UserError, match="not in integers"):
        measure_integer_agreement(student, torch.randn(2, 3, 8, 8))


def test_a_layer_called_by_name_is_an_integer_layer():
    class Named(TinyNet):
        def forward(self, x):
            return self.fc(self.conv2(input=self.conv1(input=x).relu()).mean((2, 3)))

    student, x = quantize_model(Named().eval(), "foldable", 3, 3), torch.randn(4, 3, 8, 8)
    calibrate(student, [x])
    torch.testing.assert_close(integer_model(student)(x), student(x), rtol=1e-4, atol=1e-4)


def test_sums_of_a_half_precision_student_do_not_overflow():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()
    model, x = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(4, 3, 8, 8)
    student = quantize_model(model.eval(), "foldable", 8, 8)
    calibrate(student, [x])
    half = copy.deepcopy(student).half()
    torch.testing.assert_close(integer_model(half)(x.half()).float(), half(x.half()).float(), rtol=0.02, atol=2e-3)
