import pytest
import torch
import torchvision
from torch import nn

from granq import (
    SCHEMES,
    UserError,
    activation_places,
    audit,
    build_network,
    calibrate,
    learn_steps,
    quantize_model,
    summarize_audit,
)
from granq.measure.audit import QUANTIZED_DB

COLUMNS = (
    "layer type weight_shape weights macs weight_granularity levels weight_sqnr_db input_quantized scales "
    "bits_per_weight bits_per_activation weight_share macs_share status"
).split()


def audited(name, scheme):
    classes, size = (10, 32) if "cifar" in name else (1000, 64 if ":" in name else 224)
    torch.manual_seed(0)
    return audit(quantize_model(build_network(name, classes), scheme, 3, 3), torch.randn(1, 3, size, size))


@pytest.mark.parametrize(
    ("network", "share"),
    [
        ("resnet20_cifar10", 0.9),
        ("torchvision:resnet50", 47.6),
        ("mobilenetv2_w1", 98),
        ("torchvision:mobilenet_v2", 98),
        ("timm:resnet18", None),
    ],
)
def test_granq_leaves_pointwise_layers_alone(network, share):
    frame = audited(network, "granq")
    assert set(COLUMNS) <= set(frame.columns) and len(frame) > 20
    pointwise = frame.weight_shape.str.endswith("x1x1")
    assert pointwise.any() and (frame.weight_sqnr_db[pointwise] > 120).all()
    assert (frame.weight_sqnr_db[~pointwise] < 30).all()
    # The share of the issue counts what is not computed at low bit: pointwise layers, and for MobileNetV2 its
    # classifier, whose input is pooled.
    off = 100 * frame.weight_share[pointwise].sum()
    if "mobilenet" in network:
        off += 100 * frame.weight_share[frame.type == "Linear"].sum()
        assert (frame.input_quantized[frame.type == "Linear"] == "").all()
    if share is not None:
        assert off == pytest.approx(share, abs=0.6)


def test_an_image_with_bits_of_its_own_is_named(tiny):
    frame = audit(quantize_model(tiny, "strict", 3, 3, image_bits=6), torch.randn(2, 3, 8, 8))
    assert frame.act_bits.tolist()[0] == 6 and set(frame.act_bits[1:]) == {3}
    summary, share = summarize_audit(frame), 100 * frame.macs_share[0]
    assert summary["macs_low_bit"] == pytest.approx(100 - share) and 5 < share < 95
    assert summary["summary"].endswith(
        f"{100 - share:.1f} % of MACs really run at 3 bits, {share:.1f} % on inputs of 6 bits"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_layer_of_mobilenet(scheme):
    """Where each layer's input comes from, read off the architecture: image, ReLU6, linear bottleneck or pooling."""
    network = torchvision.models.MobileNetV2(5, 0.25)
    frame = audit(quantize_model(network, scheme, 4, 4), torch.randn(2, 3, 64, 64)).set_index("layer")
    behind_relu = {"features.1.conv.0.0"}  # no expansion: it reads the ReLU6 of the stem
    for name, block in network.features.named_children():
        parts = [n for n, m in block.named_modules() if isinstance(m, nn.Conv2d)]
        behind_relu |= {f"features.{name}.{part}" for part in parts[1:]}
    expected = set(frame.index) if SCHEMES[scheme].places == "inputs" else behind_relu
    assert set(frame.index[frame.input_quantized != ""]) == expected
    depthwise, pointwise = frame.status == "depthwise", frame.weight_shape.str.endswith("x1x1")
    assert depthwise.sum() == 17 and pointwise.sum() == 34
    assert (frame.weight_sqnr_db[depthwise] < QUANTIZED_DB).all()
    assert (frame.weight_sqnr_db[pointwise] < QUANTIZED_DB).all() == (scheme != "granq")
    # a depthwise filter is one kernel: its scale is the same number of bits under both granularities
    assert (frame.scales[depthwise] == frame.weights[depthwise] / 9).all()


def test_a_relu_module_used_twice_is_two_places():
    frame = audited("torchvision:resnet18", "granq").set_index("layer").input_quantized
    assert frame["layer1.0.conv1"] != frame["layer1.0.conv2"] != frame["layer1.1.conv1"] != ""
    assert frame["layer2.0.conv1"] == frame["layer2.0.downsample.0"] != ""
    assert set(frame.index[frame == ""]) == {"conv1", "fc"}


@pytest.mark.parametrize("scheme", ["strict", "foldable"])
@pytest.mark.parametrize("network", ["resnet20_cifar10", "mobilenetv2_w1"])
def test_strict_leaves_nothing(network, scheme):
    frame = audited(network, scheme)
    assert frame.low_bit.all() and (frame.levels <= 8).all() and (frame.weight_sqnr_db < 30).all()
    assert summarize_audit(frame)["weights_low_bit"] == pytest.approx(100)


def test_true_bits_of_a_kernel_scale(tiny):
    frame = audit(quantize_model(tiny, "granq", 3, 3), torch.randn(2, 3, 8, 8)).set_index("layer")
    # 3x3 kernels: 3 bits of code, and a scale and a zero point of 32 bits each for 9 weights
    assert frame.bits_per_weight["conv1"] == pytest.approx(3 + 64 / 9)
    assert frame.bits_per_weight["point"] == 32  # pointwise: untouched
    assert frame.macs["conv1"] == 4 * 8 * 8 * 27 and frame.macs["fc"] == 12
    assert frame.input_quantized["conv1"] == "" and frame.input_quantized["conv2"] != ""
    assert frame.bits_per_activation["conv2"] == pytest.approx(3 + 64 / 64)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.lost = nn.Conv2d(4, 4, 3)
        self.alias = self.grouped

    def forward(self, x):
        return self.up(torch.relu(self.deep(torch.relu(self.grouped(x)))))


def test_odd_layers_are_listed():
    frame = audit(quantize_model(Odd(), "strict", 3, 3), torch.randn(1, 4, 9, 9))
    status = frame.set_index("layer").status.to_dict()
    assert status["deep"] == "depthwise" and status["lost"] == "not reached" and "transposed" in status["up"]
    assert {status["grouped"], status["alias"]} == {"grouped", "shared with grouped"}


def test_nothing_to_audit():
    with pytest.raises(UserError, match="no convolution or linear layer"):
        audit(nn.Sequential(nn.ReLU()), torch.randn(1, 3, 8, 8))


def test_the_audit_leaves_everything_as_it_was(tiny):
    student = quantize_model(tiny, "foldable", 3, 3).train()
    next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes, state = [m.training for m in student.modules()], {k: v.clone() for k, v in student.state_dict().items()}
    audit(student, torch.randn(2, 3, 8, 8))
    assert [m.training for m in student.modules()] == modes and len(set(modes)) == 2
    places = activation_places(student).values()
    assert not any(place.seen or place.tracking for place in places), "ranges were unset"
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())


class Joined(nn.Module):
    """Squeeze and expand: two quantized tensors are joined, another is cut and turned."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.last = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (4, 4), (4, 4), (8, 2)))

    def forward(self, x):
        halves = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([self.left(halves[0]).relu(), self.right(halves[1].transpose(2, 3)).relu()], 1)
        return self.last(x).mean((2, 3))


class Twice(nn.Module):
    """The first call of ``conv`` reads the image, the second one a ReLU; ``again`` is the same layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 3, 3, padding=1), nn.MultiheadAttention(3, 1, batch_first=True)
        self.again, self.fc = nn.Sequential(self.conv), nn.Linear(3, 4)

    def forward(self, x):
        x = self.again(self.conv(x).relu()).flatten(2).transpose(1, 2)
        return self.fc(self.attention(x, x, x)[0].mean(1))


def test_joined_and_cut_values_stay_on_their_grid():
    frame = audit(quantize_model(Joined(), "granq", 3, 3), torch.randn(2, 3, 8, 8)).set_index("layer")
    assert (frame.input_quantized != "").to_dict() == {"stem": False, "left": True, "right": True, "last": True}


def test_a_layer_counts_as_quantized_if_every_call_of_it_is():
    images = torch.randn(2, 3, 8, 8)
    frame = audit(quantize_model(Twice(), "granq", 3, 3), images).set_index("layer")
    assert not frame.low_bit["conv"] and frame.macs["conv"] == 2 * 8 * 8 * 81
    strict = audit(quantize_model(Twice(), "strict", 3, 3), images).set_index("layer")
    assert strict.low_bit["conv"] and strict.status["again.0"] == "shared with conv"
    assert strict.weights["attention.in_proj_weight"] == 27 and not strict.low_bit["attention.in_proj_weight"]
    summary = summarize_audit(strict.reset_index())
    assert summary["weights_not_quantized"] == pytest.approx(100 * 27 / (81 + 27 + 9 + 12))
    assert "2 tensors of weights belong to no layer that is called" in summary["summary"]


class Rows(nn.Module):
    """(N, T, F): a Linear for every one of T rows, and one behind a flattened map."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(16 * 6, 5)

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).transpose(1, 2)  # (N, 16, 8)
        return self.head(self.inner(x).relu().flatten(1))


@pytest.mark.parametrize(
    ("scheme", "inner"), [("strict", 3 + 64 / 8), ("layerwise", 3 + 64 / (2 * 16 * 8)), ("per_channel", 3 + 64 / 32)]
)
def test_rows_have_their_own_products_and_scales(scheme, inner):
    frame = audit(quantize_model(Rows(), scheme, 3, 3), torch.randn(2, 3, 4, 4)).set_index("layer")
    assert frame.macs.to_dict() == {"conv": 3 * 8 * 16, "inner": 16 * 8 * 6, "head": 16 * 6 * 5}
    assert frame.bits_per_activation["inner"] == pytest.approx(inner)


def test_scales_behind_a_flattened_map_are_those_of_the_map():
    """granq: one scale for each of 4 channels of 4 x 4 pixels, although the layer reads rows."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    frame = audit(quantize_model(net, "granq", 3, 3), torch.randn(2, 3, 4, 4)).set_index("layer")
    assert frame.bits_per_activation["3"] == pytest.approx(3 + 64 / 16)


def test_learned_steps_are_no_weights(tiny):
    student, images = quantize_model(tiny, "foldable", 3, 3), torch.randn(2, 3, 8, 8)
    calibrate(student, [images])
    before = audit(student, images)
    learn_steps(student)
    assert summarize_audit(audit(student, images)) == summarize_audit(before)
