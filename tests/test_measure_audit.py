import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from torch import nn

from granq import (
    SCHEMES,
    Scheme,
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
    "bits_per_weight bits_per_activation weight_share macs_share status values_per_scale act_levels act_sqnr_db "
    "weight_quantized act_quantized"
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
        f"{100 - share:.1f} % of MACs really have 3 bits, {share:.1f} % on inputs of 6 bits"
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
def test_strict_leaves_nothing(scheme):
    frame = audited("resnet20_cifar10", scheme)
    assert frame.low_bit.all() and (frame.bits_per_activation < 32).all()
    assert (frame.levels <= 8).all() and (frame.weight_sqnr_db < 30).all()
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


@pytest.mark.filterwarnings("ignore:only weights are quantized")
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
    products = strict[strict.type == "products"].macs.to_dict()  # in_proj, q times k, attention times v, out_proj
    assert products == {"attention": 64 * 3 * 9 + 2 * 64 * 64 * 3 + 64 * 3 * 3}


class Rows(nn.Module):
    """(N, T, F): a Linear for every one of T rows, and one behind a flattened map."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(16 * 6, 5)

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).transpose(1, 2)  # (N, 16, 8)
        return self.head(self.inner(x).relu().flatten(1))


@pytest.mark.parametrize(("scheme", "inner"), [("strict", 3 + 64 / 8), ("layerwise", 3), ("per_channel", 3)])
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


def sqnr(x, value):
    return 10 * np.log10(np.square(x).sum() / np.square(x - value).sum())


class Shrinking(nn.Module):
    """Maps of 4x4, 2x2 and 1x1 pixels."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(i, 8, 3, 2, 1) for i in (3, 8, 8))
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = layer(x).relu()
        return self.last(x).flatten(1)


@pytest.mark.parametrize("scheme", ["granq", "strict"])
def test_a_scale_for_one_value_rounds_nothing(scheme):
    images, network = torch.randn(2, 3, 8, 8), Shrinking().eval()
    student = quantize_model(network, scheme, 4, 4)
    frame = audit(student, images).set_index("layer")
    seen = {}
    for name, layer in student.named_children():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].numpy()}))
    with torch.no_grad():
        student(images)
    values = {name: seen[name][0, 0].size for name in ("second", "third", "last")}
    assert values == {"second": 16, "third": 4, "last": 1}
    assert frame.values_per_scale[[*values]].tolist() == [16, 4, 1]
    assert frame.act_quantized[[*values]].tolist() == [True, True, False]
    assert frame.act_sqnr_db["last"] > 120 and not frame.low_bit["last"] and frame.bits_per_activation["last"] == 32
    assert frame.bits_per_activation["third"] == 4 + 64 / 4
    for name in ("second", "third"):
        groups = seen[name].reshape(16, -1)
        assert frame.act_levels[name] == max(len(np.unique(group)) for group in groups)
    macs = pd.Series({"first": 16 * 27 * 8, "second": 4 * 72 * 8, "third": 72 * 8, "last": 40})
    low = macs[["second", "third"] if scheme == "granq" else ["first", "second", "third"]].sum()
    summary = summarize_audit(frame.reset_index())
    assert summary["macs_low_bit"] == pytest.approx(100 * low / macs.sum())
    assert summary["macs_not_quantized"] == pytest.approx(100 - summary["macs_low_bit"])
    off = 100 - 100 * low / macs.sum()
    if scheme == "strict":
        assert summary["summary"].endswith(f"not quantized: {off:.1f} % of MACs on inputs in full precision (last)")
    else:  # a kernel of one number is left alone, too
        assert "on inputs in full precision (first), " in summary["summary"]
        assert summary["summary"].endswith(" % of MACs on both in full precision (last)")


def test_static_ranges_round_a_map_of_one_pixel():
    """Their scale serves other images too, even if it was calibrated on the one value that is here."""
    frame = audit(quantize_model(Shrinking(), "foldable", 4, 4), torch.randn(1, 3, 8, 8))
    assert frame.low_bit.all()


def test_resnet18_at_32_pixels():
    torch.manual_seed(0)
    student = quantize_model(torchvision.models.resnet18(), "strict", 4, 4)
    frame = audit(student, torch.randn(2, 3, 32, 32)).set_index("layer")
    idle = {"layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"}
    assert set(frame.index[~frame.low_bit]) == idle == set(frame.index[frame.values_per_scale == 1])
    assert frame.weight_share[[*idle]].sum() == pytest.approx(3 * 512 * 512 * 9 / 11_678_912, rel=1e-6)
    summary = summarize_audit(frame.reset_index())
    assert summary["macs_low_bit"] == pytest.approx(100 - 100 * 3 * 512 * 512 * 9 / frame.macs.sum())
    assert "18.9 % of MACs on inputs in full precision (layer4.0.conv2 and 2 more)" in summary["summary"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Patches of 2x2 pixels: 16 tokens of 8 features, two heads; a table of weights that no layer owns."""

    def __init__(self):
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 8, 2, 2), nn.ModuleList([Attention(), Attention()])
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.linear(x.mean(1), self.table)


def test_products_of_a_fused_lstm_are_counted():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm, self.end = nn.Conv2d(3, 8, 1), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.end(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0][:, -1])

    frame = audit(quantize_model(Recurrent(), "strict", 3, 3), torch.randn(2, 3, 4, 4))
    assert frame.macs.sum() == 2 * (16 * (3 * 8 + 4 * 16 * (8 + 16)) + 16 * 2) // 2, "of an image"


@pytest.mark.parametrize("traced", [True, False])
def test_every_multiply_add_is_counted_where_it_happens(traced):
    network, images = Transformer().eval(), torch.randn(3, 3, 8, 8)
    fast = torch.backends.mha.get_fastpath_enabled()
    frame = audit(quantize_model(network, "strict", 4, 4) if traced else network, images)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    products = frame[frame.type == "products"]
    # q k and attention times v: 2 heads, 16 x 16 pairs, 4 features each
    counted = {"blocks.0": 2 * 2 * 256 * 4, "blocks.1": 2 * 2 * 256 * 4, "Transformer": 5 * 8}
    assert dict(zip(products.layer, products.macs, strict=True)) == counted
    assert set(products.status) == {"not a layer: not quantized"} and not products.low_bit.any()
    layers = 16 * 12 * 8 + 2 * 16 * (8 * 24 + 8 * 8)
    assert frame.macs.sum() == layers + sum(counted.values()) and frame.macs_share.sum() == pytest.approx(1)
    summary = summarize_audit(frame)
    assert summary["macs_low_bit"] == pytest.approx(100 * layers / frame.macs.sum() if traced else 0)
    share = 100 * sum(counted.values()) / frame.macs.sum()
    assert f"{share:.1f} % of MACs outside of layers (blocks.0 and 2 more)" in summary["summary"]


class Shift(nn.Module):
    """A map with a given offset; its first channels are dead."""

    def __init__(self, offset, dead):
        super().__init__()
        self.conv, self.offset, self.dead = nn.Conv2d(4, 2, 1), offset, dead

    def forward(self, x):
        return self.conv(torch.relu((x + self.offset) * (torch.arange(4) >= self.dead).view(1, 4, 1, 1)))


@pytest.mark.parametrize("dead", [0, 3, 4])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("pixels", [2, 8])
def test_neither_dead_channels_nor_an_offset_make_a_quantizer_exact(dead, offset, pixels):
    """Without noise, or with little of it for the size of the values, the SQNR alone would call it untouched."""
    torch.manual_seed(1)
    frame = audit(quantize_model(Shift(offset, dead), "granq", 3, 3), images := torch.randn(2, 4, pixels, pixels))
    x = np.maximum((images + offset).numpy() * (np.arange(4) >= dead).reshape(1, 4, 1, 1), 0)
    assert frame.act_quantized[0] and frame.act_levels[0] == (1 if dead == 4 else frame.act_levels[0]) <= 9
    if dead == 4:
        assert np.isnan(frame.act_sqnr_db[0])
    elif offset:
        assert frame.act_sqnr_db[0] > QUANTIZED_DB
    else:
        low, high = (f(axis=(2, 3), keepdims=True) for f in (x.min, x.max))
        scale = 7 / np.maximum(high - low, 1e-8)
        zero = np.round(scale * low) + 4
        value = (np.round(scale * x - zero) + zero) / scale
        assert frame.act_sqnr_db[0] == pytest.approx(sqnr(x.astype(float), value), abs=0.01)


def test_a_head_of_zeros_is_quantized():
    """So do many networks start; zero has a code."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    nn.init.zeros_(network[3].weight)
    assert audit(quantize_model(network, "strict", 3, 3), torch.randn(2, 3, 8, 8)).low_bit.all()


@pytest.mark.parametrize("scheme", ["granq", "strict"])
def test_a_student_inside_another_module_is_the_same_student(scheme):
    """Such as after a normalization: nobody has traced the whole."""
    student, images = quantize_model(Joined(), scheme, 3, 3), torch.randn(2, 3, 8, 8)
    alone, inside = (audit(model, images) for model in (student, nn.Sequential(nn.Identity(), student)))
    for column in ("low_bit", "macs", "act_quantized", "bits_per_activation", "act_sqnr_db"):
        assert alone[column].tolist() == inside[column].tolist()
    assert alone.act_quantized.any()


def test_a_mean_of_quantized_values_is_not_quantized_and_a_module_of_ones_own_that_keeps_them_is():
    class Pool(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.mean, self.conv, self.last = mean, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.conv(x).relu().unfold(2, 2, 2).unfold(3, 2, 2)
            return self.last(x.mean((4, 5)) if self.mean else x[..., 0, 1])

    found = [audit(quantize_model(Pool(mean), "granq", 3, 3), torch.randn(2, 3, 8, 8)) for mean in (True, False)]
    assert [frame.act_quantized.tolist() for frame in found] == [[False, False], [False, True]]


def test_parameters_that_belong_to_no_layer_are_none(tiny):
    tiny.scale = nn.Parameter(torch.ones(4, 1, 1))
    frame = audit(tiny, torch.randn(2, 3, 8, 8))
    assert summarize_audit(frame)["layers"] == len(frame) - 1 == 4


def test_half_precision_is_refused(tiny):
    """In 16 bits means of quantized values would hold only numbers that some place has given, too."""
    with pytest.raises(UserError, match="the audit needs float32, got torch.bfloat16"):
        audit(tiny.bfloat16(), torch.randn(2, 3, 8, 8).bfloat16())


def test_a_network_whose_output_is_no_tensor_and_whose_backbone_is_not_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    network = build_network("lraspp_mobilenet_v3_large", 4)
    frame = audit(network, torch.randn(1, 3, 32, 32))
    assert frame.macs.sum() > 0 and not frame.low_bit.any()
    with pytest.raises(UserError, match="cannot trace SSD"):
        quantize_model(build_network("ssdlite320_mobilenet_v3_large", 4), "strict", 3, 3)


def test_weights_only_of_two_widths(tiny: nn.Module) -> None:
    scheme = Scheme(weights="per_out_channel", activations=None)
    student = quantize_model(tiny, scheme, 3, 3, bits={"conv1": (2, 0)})
    found = summarize_audit(audit(student, torch.randn(2, 3, 8, 8)))
    assert found["weights_low_bit"] == pytest.approx(100) and found["macs_low_bit"] == 0
