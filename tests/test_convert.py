import copy
import math

import numpy as np
import pytest
import torch
from conftest import TinyNet, same_tensors
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import granq
from granq import (
    SCHEMES,
    DataSpec,
    QATConfig,
    Scheme,
    UserError,
    activation_places,
    audit,
    build_network,
    calibrate,
    fake_quantize,
    layer_quantizers,
    learn_steps,
    pixel_bounds,
    quantize_model,
    set_image_range,
)
from granq.convert import bypassed, check_copy, tracking


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copy_keeps_teacher_and_keys(tiny, scheme):
    before = copy.deepcopy(tiny.state_dict())
    student, x = quantize_model(tiny, scheme, 2, 2), torch.randn(2, 3, 8, 8)
    calibrate(student, [x])
    assert student(x).shape == (2, 3)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    other = TinyNet().state_dict()
    student.load_state_dict(other)
    assert all(torch.equal(student.state_dict()[k], v) for k, v in other.items())
    twin = quantize_model(tiny, scheme, 2, 2)
    twin.load_state_dict(student.state_dict())
    assert torch.equal(twin(x), student(x))


def test_granq_equals_the_arithmetic_written_out(tiny):
    """ReLU outputs per image and channel, kernels one by one, nothing clamped, nothing else quantized."""
    q, w = (lambda t: fake_quantize(t, 3, "per_sample_channel", clamp=False)), {}
    for name in ("conv1", "conv2", "point", "fc"):
        w[name] = fake_quantize(tiny.get_submodule(name).weight, 3, "per_kernel", clamp=False)
    x, conv, relu = torch.randn(2, 3, 8, 8), nn.functional.conv2d, torch.relu
    a = q(relu(tiny.bn1(conv(x, w["conv1"], tiny.conv1.bias, padding=1))))
    b = tiny.bn2(conv(a, w["conv2"], tiny.conv2.bias, padding=1)) + conv(a, w["point"], tiny.point.bias)
    out = nn.functional.linear(q(relu(q(relu(b)).mean((2, 3)))), w["fc"], tiny.fc.bias)
    assert torch.equal(quantize_model(tiny, "granq", 3, 3)(x), out)


def test_places_are_named_and_counted_once(tiny):
    assert len(activation_places(quantize_model(tiny, "granq", 3, 3))) == 3  # relu, relu again, F.relu
    # x; the tensor that conv2 and point share; the pooled features
    assert len(activation_places(quantize_model(tiny, "strict", 3, 3))) == 3


@pytest.mark.parametrize(
    ("name", "relus"),
    [("torchvision:resnet18", 17), ("torchvision:mobilenet_v2", 35), ("resnet20_cifar10", 19)],
)
def test_known_networks(name, relus):
    student = quantize_model(build_network(name, 10), "granq", 4, 4)
    assert len(activation_places(student)) == relus
    assert student(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_pointwise_kernels_stay_unquantized_under_granq_only(tiny):
    levels = {s: quantize_model(tiny, s, 2, 2).point.weight[0].unique().numel() for s in ("granq", "strict")}
    assert levels["granq"] == 4 == tiny.point.weight[0].numel()
    assert levels["strict"] <= 4
    torch.testing.assert_close(quantize_model(tiny, "granq", 2, 2).point.weight, tiny.point.weight, rtol=1e-6, atol=0)
    assert not torch.allclose(quantize_model(tiny, "strict", 2, 2).point.weight, tiny.point.weight, rtol=1e-3)


@pytest.mark.parametrize("scheme", ["layerwise", "per_channel", "foldable"])
def test_ranges_move_in_calibrate_and_in_tracking_only(tiny, scheme):
    student, images = quantize_model(tiny, scheme, 4, 4), torch.randn(4, 3, 8, 8)
    for mode in (student.eval, student.train):  # nothing was set: no test image sets it
        with pytest.raises(UserError, match="never set"):
            mode()(100 * images)
    calibrate(student.eval(), [torch.randn(4, 3, 8, 8) for _ in range(3)])
    twin = quantize_model(tiny, scheme, 4, 4)
    twin.load_state_dict(student.state_dict())  # calibrated, as its ranges are in the state
    before = {key: value.clone() for key, value in student.state_dict().items()}
    for model in (student, twin):
        model.train()(100 * images), model.eval()(100 * images)
        ranges = [key for key in before if "running_m" in key and key.startswith("act_quant")]
        assert ranges and all(torch.equal(model.state_dict()[key], before[key]) for key in ranges)
    with tracking(student):
        student(100 * images)
    assert not any(torch.equal(student.state_dict()[key], before[key]) for key in ranges if "max" in key)


def test_moving_average_has_momentum_09():
    scheme = Scheme(weights=None, activations="per_tensor", tracked=True)
    student = quantize_model(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), scheme, 4, 4)
    calibrate(student, [torch.tensor([0, top]).reshape(1, 1, 1, 2) for top in (1.0, 2.0)])
    (place,) = activation_places(student).values()
    assert place.running_max.item() == pytest.approx(1.1)


def test_skip_keeps_a_layer_in_full_precision(tiny):
    student = quantize_model(tiny, Scheme(weights="per_out_channel", activations="per_tensor", skip=("conv1",)), 2, 2)
    assert torch.equal(student.conv1.weight, tiny.conv1.weight)
    with pytest.raises(ValueError, match="nothere"):
        quantize_model(tiny, Scheme(weights="per_out_channel", activations=None, skip=("nothere",)), 2, 2)


def test_skip_reaches_below_a_name_and_takes_no_text():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1))))
    net.append(nn.Conv2d(3, 3, 1)), net.extend([nn.Identity()] * 7), net.append(nn.Conv2d(3, 3, 1))
    scheme = dict(weights="per_tensor", activations=None)
    layers = layer_quantizers(quantize_model(net, Scheme(**scheme, skip=("1", "2")), 3, 3))
    assert {n: q.weight is None for n, q in layers.items()} == {"0.0": False, "1.0.0": True, "2": True, "10": False}
    with pytest.raises(UserError, match="holds no layer of the model: 0.1"):
        quantize_model(net, Scheme(**scheme, skip=("1", "0.1", "3")), 3, 3)
    with pytest.raises(ValueError, match="valid tuple"):
        Scheme(**scheme, skip="conv1")


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int8, torch.tensor])
def test_a_whole_number_of_any_library_is_a_width(tiny, kind):
    images = torch.randn(2, 3, 8, 8)
    student, own = (quantize_model(tiny, "foldable", bits, bits, bits) for bits in (8, kind(8)))
    for model in (student, own):
        calibrate(model, [images])
    assert torch.equal(student(images), own(images))
    assert torch.equal(fake_quantize(images, kind(8)), fake_quantize(images, 8))  # -np.uint8(128) is 128
    for wrong in (np.True_, True, np.float32(3), 3.0, "3", kind(9)):
        with pytest.raises((UserError, TypeError), match="integer"):
            fake_quantize(images, wrong)


def test_rows_stay_rows():
    net = nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Flatten(2), Turned(), nn.Linear(6, 5), nn.ReLU())
    student, x = quantize_model(net, "per_channel", 3, 3), torch.randn(4, 3, 8, 8)
    calibrate(student, [x])
    assert student.get_submodule("act_quant._4").running_max.shape == (1, 5)  # of features, not of the 16 patches


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 6)

    def forward(self, x):
        return self.gate(x.mean((2, 3)))[:, :, None, None] * x


class Normed(nn.Module):
    """The norm of whole maps reads the place first, a convolution next."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm([6, 8, 8]), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.a(self.norm(x)) + self.b(x)


@pytest.mark.parametrize(
    "made",
    [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.PReLU(), nn.LayerNorm([6, 8, 8]), Gated()],
    ids=lambda module: type(module).__name__,
)
def test_maps_stay_maps_in_front_of_a_classifier(made):
    """Its Linear, behind the pooling, says nothing of the maps."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), made, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = quantize_model(nn.Sequential(*net, nn.Linear(6, 5)), "per_channel", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    assert student.get_submodule("act_quant._2").running_max.shape == (1, 6, 1, 1)  # not of 8 columns


class Turning(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


@pytest.mark.parametrize("tail", [
    [nn.Flatten(1, 2), nn.Linear(6, 5)], [Turning(0, 3, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)],
])  # fmt: skip
def test_features_in_the_last_dimension_stay_rows(tail):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Turning(0, 2, 3, 1), nn.ReLU(), *tail)
    student = quantize_model(net, "per_channel", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    assert student.get_submodule("act_quant._2").running_max.shape == (1, 6)


def test_the_layer_that_reads_a_place_says_what_it_is():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Normed(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    student = quantize_model(net, "foldable", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    assert student.get_submodule("act_quant._0").running_max.shape == (1, 6, 1, 1)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_bad_input(tiny):
    for bad, message in {("nope", 3, 3): "scheme", ("granq", 1, 3): "bits.* 1", ("granq", 3, 9): "bits.* 9"}.items():
        with pytest.raises(UserError, match=message):
            quantize_model(tiny, *bad)
    for nothing in (nn.ReLU(), nn.Conv2d(3, 3, 1)):  # a layer is no network
        with pytest.raises(ValueError, match="no Conv2d or Linear"):
            quantize_model(nothing, "granq", 3, 3)
    with pytest.raises(ValueError, match="cannot trace Branching"):
        quantize_model(Branching(), "strict", 3, 3)
    with pytest.raises(UserError, match="cannot trace DataParallel itself: .*; its .module may be the network"):
        quantize_model(nn.DataParallel(tiny), "strict", 3, 3)


@pytest.mark.parametrize("scheme", ["foldable", "layerwise"])
def test_quantile_ranges_leave_out_the_stated_share(tiny, scheme):
    student = quantize_model(tiny, scheme, 3, 3)
    calibrate(student, [100 * torch.randn(64, 3, 8, 8)])  # forgotten again
    images = torch.randn(64, 3, 8, 8)
    seen = {}
    for name, place in activation_places(student).items():
        place.register_forward_pre_hook(lambda place, args, name=name: seen.setdefault(name, args[0]))
    calibrate(student, [images], quantile=0.9)
    for name, place in activation_places(student).items():
        x = seen[name].transpose(0, 1).flatten(1)  # (C, values)
        high, low = (limit.flatten()[:, None] for limit in (place.running_max, place.running_min))
        x = x if len(high) > 1 else x.reshape(1, -1)
        positive, negative = (x > 0).sum(1), (x < 0).sum(1)
        for outside, share in (((x > high).sum(1), positive * 0.1), ((x < low).sum(1), negative * 0.1)):
            assert ((outside - share).abs() <= 1 + 0.1 * share).all()  # many values are equal after a quantized layer


@pytest.mark.parametrize("quantile", [0, 0.01, 0.5, 1.5, 99.9, float("nan")])
def test_a_quantile_is_the_share_that_stays(tiny, quantile):
    with pytest.raises(UserError, match="quantile is a share"):
        calibrate(quantize_model(tiny, "foldable", 3, 3), [torch.randn(4, 3, 8, 8)], quantile)


def test_calibration_without_images_or_with_wrong_ones(tiny):
    student, images = quantize_model(tiny, "foldable", 3, 3), torch.randn(4, 3, 8, 8)
    places = activation_places(student).values()
    with pytest.raises(UserError, match="no images"):
        calibrate(student, [])
    with pytest.raises(RuntimeError):
        calibrate(student, [images, images[:, :2]], 0.9, full_precision=True)
    assert all(place.quantile == 1 and not place.bypassed for place in places)
    assert not any(place.tracking for place in places)


def test_a_bypassed_student_is_the_teacher(tiny):
    student, images = quantize_model(tiny, "layerwise", 2, 2), torch.randn(4, 3, 8, 8)
    with bypassed(student), tracking(student):
        assert torch.equal(student(images), tiny(images))
    assert all(place.seen for place in activation_places(student).values())  # and ranges were tracked
    assert not torch.allclose(student(images), tiny(images), rtol=0.01)


def test_image_range_is_that_of_the_image_alone(tiny):
    spec = DataSpec(name="any", classes=3, image_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    low, high = pixel_bounds(spec)
    torch.testing.assert_close(low.flatten(), torch.tensor([-2.5, -4 / 3, -0.75]))
    torch.testing.assert_close(high.flatten(), torch.tensor([2.5, 2.0, 1.75]))
    student = quantize_model(tiny, "foldable", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    before = {n: place.running_max for n, place in activation_places(student).items()}
    set_image_range(student, low, high)
    after = {n: place.running_max for n, place in activation_places(student).items()}
    assert [n for n in before if before[n] is not after[n]] == ["x"] and torch.equal(after["x"], high)
    one = quantize_model(tiny, Scheme(weights="per_tensor", activations="per_tensor", tracked=True), 3, 3)
    calibrate(one, [torch.randn(4, 3, 8, 8)])
    set_image_range(one, low, high)
    place = activation_places(one)["x"]
    assert place.running_min.tolist() == [[[[-2.5]]]] and place.running_max.tolist() == [[[[2.5]]]]


def test_only_the_image_has_bits_of_its_own(tiny):
    student = quantize_model(tiny, "strict", 3, 4, image_bits=8)
    bits = {name: place.bits for name, place in activation_places(student).items()}
    assert bits.pop("x") == 8 and set(bits.values()) == {4}
    for scheme in ("granq", Scheme(weights="per_out_channel", activations=None)):
        with pytest.raises(ValueError, match="image is not quantized"):
            quantize_model(tiny, scheme, 3, 3, image_bits=6)
        with pytest.raises(ValueError, match="quantizes the image"):
            QATConfig(scheme=scheme, image_bits=6)
    with pytest.raises(ValueError, match="from 2 to 8"):
        quantize_model(tiny, "strict", 3, 3, image_bits=9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(weights="per_chanel", activations=None), "weights"),
        (dict(weights="per_kernel", activations="row"), "activations"),
        (dict(weights=None, activations="per_sample", tracked=True), "belong to single images"),
        (dict(weights=None, activations=None, places="input"), "places"),
        (
            dict(weights="per_kernel", activations="per_channel", tracked=True, fold=True),
            "per_out_channel or per_tensor",
        ),
        (dict(weights=None, activations=None, clip=True), "clip"),
    ],
)
def test_a_scheme_says_at_once_what_is_wrong_with_it(fields, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)


def test_ranges_of_the_full_precision_network(tiny):
    images = torch.randn(8, 3, 8, 8)
    low_bit, activations_only = (
        Scheme(weights=w, activations="per_channel", tracked=True) for w in ("per_out_channel", None)
    )
    student, same = (quantize_model(tiny, scheme, 2, 2) for scheme in (low_bit, activations_only))
    for place in activation_places(same).values():
        place.bits = 8  # next to nothing is quantized
    calibrate(student, [images], full_precision=True)
    calibrate(same, [images])
    for a, b in zip(activation_places(student).values(), activation_places(same).values(), strict=True):
        torch.testing.assert_close(a.running_max, b.running_max, rtol=0.05, atol=0.02)
    quantized = quantize_model(tiny, low_bit, 2, 2)
    calibrate(quantized, [images])
    last = list(activation_places(quantized).values())[-1]
    assert not torch.allclose(last.running_max, a.running_max, rtol=0.05, atol=0.02)
    assert not torch.equal(student(images), tiny(images))  # and it quantizes again


class InPlace(nn.Module):
    """ReLUs that change their input; ``assigned``: written so that fx sees it."""

    def __init__(self, assigned: bool):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.relu, self.assigned = nn.ReLU(inplace=True), assigned

    def forward(self, values):  # a name that ModuleDict has already
        x = self.norm(self.conv1(values))
        y = nn.functional.relu(x, True)
        x = self.conv2(y if self.assigned else x)
        y = x.sub_(0.1).relu_()
        x = y if self.assigned else x
        y = self.relu(x)
        return (y if self.assigned else x).mean((2, 3))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_changed_in_place_is_read_changed(scheme):
    nets, images = [InPlace(assigned).eval() for assigned in (True, False)], torch.randn(4, 3, 8, 8)
    nets[1].load_state_dict(nets[0].state_dict())
    students = [quantize_model(net, scheme, 8, 8) for net in nets]
    for student in students:
        calibrate(student, [images])
    assert torch.equal(students[0](images), students[1](images))
    assert [list(activation_places(s)) for s in students] == [list(activation_places(students[0]))] * 2
    torch.testing.assert_close(students[1](images), nets[1](images), atol=0.02, rtol=0.02)


class OwnNorm(nn.BatchNorm2d):
    """Code outside of torch.nn, with control flow on values below."""


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), OwnNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return nn.functional.linear(x, nn.functional.normalize(self.head.weight))


def test_a_weight_that_is_read_without_a_call_stays_and_keeps_its_keys():
    net, images = ReadsWeight().eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="in full precision, as they compute something else: head"):
        student = quantize_model(net, "strict", 3, 3)
    student.load_state_dict(net.state_dict())
    assert student.state_dict().keys() - net.state_dict().keys() == set()
    assert torch.equal(student.head.weight, net.head.weight) and student(images).shape == (2, 5)
    frame = audit(student, images).set_index("layer")
    assert frame.low_bit.to_dict() == {"conv": True, "head": False, "ReadsWeight": False}  # the last is F.linear
    assert frame.weights["head"] == 40


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_a_parametrized_weight_is_refused(tiny, wrap):
    wrap(tiny.conv1)
    with pytest.raises(ValueError, match="parameter of conv1 is parametrized already"):
        quantize_model(tiny, "strict", 3, 3)
    assert not audit(tiny, torch.randn(2, 3, 8, 8)).low_bit.any()


@pytest.mark.parametrize("name", "add sub mul div tanh exp log sqrt pow clamp where sin neg sigmoid std".split())
def test_torch_s_own_functions_are_traced(name):
    """They have no signature and, overloaded as they are, no unique schema."""

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x, function = self.conv1(x).abs() + 1, getattr(torch, name)
            more = dict(add=(x,), sub=(1,), mul=(x,), div=(2,), pow=(2,), clamp=(0, 1)).get(name, ())
            return self.conv2(function(x > 1, x, x) if name == "where" else x * function(x, *more))

    model, images = Calls(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(quantize_model(model, "strict", 8, 8)(images), model(images), atol=0.1, rtol=0.1)


class Views(nn.Module):
    """A cut of a tensor is changed in place before a layer reads the tensor."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.conv1(x)
        nn.functional.relu(x[:, :4], inplace=True)
        return self.conv2(x)


class Defaults(nn.Module):
    """Arguments with defaults, which decide what runs."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x, mask=None, features=False, size=(8, 8)):
        x = nn.functional.adaptive_avg_pool2d(self.conv1(x), size)
        if mask is not None:
            x = x * mask
        return x if features else self.conv2(x)


@pytest.mark.parametrize("model", [Views, Defaults])
@pytest.mark.parametrize("scheme", ["strict", "foldable"])
def test_the_copy_computes_what_the_model_does(model, scheme):
    model, images = model(), torch.randn(4, 3, 8, 8)
    student = quantize_model(model, scheme, 8, 8)
    calibrate(student, [images])
    torch.testing.assert_close(student(images), model(images), atol=0.02, rtol=0.02)


def test_hooks_of_the_model_itself_are_said_to_be_left_out(tiny):
    tiny.register_forward_pre_hook(lambda module, args: (args[0] / 255,))
    with pytest.warns(UserWarning, match="hooks of TinyNet itself are not in the quantized copy"):
        quantize_model(tiny, "strict", 3, 3)


def test_arguments_keep_their_names():
    images = torch.randn(2, 3, 8, 8)
    assert quantize_model(Defaults(), "strict", 8, 8)(images, size=(4, 4)).shape == (2, 4, 4, 4)

    class ByName(Defaults):
        def forward(self, pixel_values=None):
            return super().forward(pixel_values)

    assert quantize_model(ByName(), "strict", 8, 8)(pixel_values=images).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_runs(tiny, scheme):
    images = torch.randn(2, 3, 8, 8).bfloat16()
    student = quantize_model(tiny, scheme, 8, 8).bfloat16()
    calibrate(student, [images])
    assert student(images).dtype == torch.bfloat16


def test_calibration_in_training_mode_moves_ranges_only(tiny):
    images = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    wanted, student = (quantize_model(tiny, "foldable", 3, 3) for _ in range(2))
    calibrate(wanted, images)
    calibrate(student.train(), images)
    assert student.training and student.bn1.training
    for (name, value), right in zip(student.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(value, right), name


def test_calibration_costs_nothing_where_no_range_is_static(tiny):
    student, seen = quantize_model(tiny, "strict", 3, 3), []
    student.register_forward_hook(lambda *_: seen.append(1))
    calibrate(student, [torch.randn(2, 3, 8, 8)])
    assert not seen


def test_what_no_scheme_can_have_is_told(tiny):
    with pytest.raises(UserError, match="low-bit weights, but the scheme quantizes none"):
        quantize_model(tiny, Scheme(weights=None, activations="per_tensor"), 3, 3, bits={"conv1": (8, 3)})
    with pytest.raises(ValidationError, match="only clamped, tracked inputs fold"):
        Scheme(weights="per_out_channel", activations="per_channel", tracked=True, fold=True, clamp=False)


class Normalizing(TinyNet):
    """What fx does not follow: it traces the other branch, as its proxies are no tensors."""

    def forward(self, x):
        return super().forward((x - 127) / 50 if isinstance(x, torch.Tensor) else x)


class Adding(TinyNet):
    """``+=`` on a tensor changes what is read again; on a proxy of fx it does not."""

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        kept = x
        x += self.conv2(x)
        return self.fc((x + kept).relu().mean((2, 3)))


@pytest.mark.parametrize("network", [Normalizing, Adding])
def test_no_number_comes_from_a_copy_that_computes_something_else(network):
    model, x = network().eval(), torch.randn(4, 3, 8, 8)
    for measure in (
        lambda: granq.measure_sensitivity(model, [x], "strict", 3),
        lambda: granq.measure_layer_error(model, [x], ["granq"], 3),
        lambda: granq.measure_granularity_factorial(
            model, [(x, torch.zeros(4))], [granq.measure.factorial.factorial_cells((2,))[0]], lambda seed: [x]
        ),
    ):
        with pytest.raises(UserError, match="computes something else even without quantization"):
            measure()


def test_a_forward_of_one_object_alone_is_not_traced(tiny):
    old = tiny.forward
    tiny.forward = lambda x: old((x - 127) / 50)
    with pytest.raises(UserError, match="forward of this TinyNet was replaced"):
        quantize_model(tiny, "strict", 3, 3)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"), [(nn.Conv1d, nn.BatchNorm1d, (2, 3, 9)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 9, 9, 9))]
)
def test_channels_of_other_maps_are_their_second_dimension(layer, norm, shape):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = layer(3, 5, 3), norm(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(self.norm(self.conv(x)).relu().flatten(2).mean(2))

    student, x = quantize_model(Mapped(), "per_channel", 3, 3), torch.randn(shape)
    place = next(iter(activation_places(student).values()))
    calibrate(student, [x])
    assert place.running_max.shape == (1, 5, 1, 1)
    student = quantize_model(Mapped(), "granq", 3, 3)
    with bypassed(student), torch.no_grad():
        maps = student.norm(student.conv(x)).relu()
    wanted = fake_quantize(maps.flatten(2)[..., None], 3, clamp=False).view_as(maps)
    torch.testing.assert_close(next(iter(activation_places(student).values()))(maps), wanted)


def test_a_relu_of_a_parameter_is_no_activation():
    class Fused(TinyNet):
        def __init__(self):
            super().__init__()
            self.share = nn.Parameter(torch.tensor([0.3, 0.7]))

        def forward(self, x):
            a, b = torch.relu(2 * self.share)
            return self.fc((a * self.conv1(x) + b * self.conv1(x)).relu().mean((2, 3)))

    assert len(activation_places(quantize_model(Fused(), "granq", 2, 2))) == 1


def test_images_in_place_of_batches_are_refused(tiny):
    with pytest.raises(UserError, match="whose parts are single images"):
        calibrate(quantize_model(tiny, "foldable", 3, 3), torch.randn(4, 3, 8, 8))


class Decoder(nn.Module):
    """Rows of a Linear that become maps: their second dimension holds channels."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(12, 192), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, z):
        return self.conv(F.interpolate(F.relu(self.fc(z).view(-1, 8, 4, 6)), scale_factor=2)).mean((2, 3))


class Patches(nn.Module):
    """Maps of a convolution that become tokens: their last dimension holds features."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(("network", "x"), [(Decoder(), torch.randn(16, 12)), (Patches(), torch.randn(2, 3, 8, 8))])
def test_channels_are_those_of_the_layout_at_hand(network, x):
    student = quantize_model(network, "per_channel", 3, 3)
    calibrate(student, [x])
    (place,) = activation_places(student).values()
    assert place.running_min.numel() == 8


class Unread(TinyNet):
    """A parameter and buffers that the forward does not read, and a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.temperature, self.mean = nn.Parameter(torch.ones(1)), torch.ones(1, 3, 1, 1)
        self.bn1.register_buffer("steps", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        return super().forward(x - self.mean)


@pytest.mark.parametrize("scheme", ["granq", "foldable"])
def test_keys_are_those_of_the_model_read_or_not(scheme):
    model = Unread().eval()
    student = quantize_model(model, scheme, 3, 3)
    assert not student.load_state_dict(model.state_dict(), strict=scheme == "granq").unexpected_keys
    assert student.state_dict().keys() >= model.state_dict().keys()
    if torch.__version__ >= "2.14":  # copies that torch 2.8 and 2.9 make of a GraphModule have other keys
        assert copy.deepcopy(student).state_dict().keys() == student.state_dict().keys()
    assert not {"mean", "cache"} & student.state_dict().keys()


def test_ranges_of_channels_do_not_become_those_of_a_tensor(tiny):
    channels, tensor = quantize_model(tiny, "per_channel", 3, 3), quantize_model(tiny, "layerwise", 3, 3)
    calibrate(channels, [torch.randn(4, 3, 8, 8)])
    with pytest.raises(RuntimeError, match="holds the ranges of channels"):
        tensor.load_state_dict(channels.state_dict())


def test_an_image_without_a_static_range_has_none_to_set(tiny):
    low, high = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    learned = quantize_model(tiny, "foldable", 3, 3)
    calibrate(learned, [torch.randn(4, 3, 8, 8)])
    learn_steps(learned)
    for student in (quantize_model(tiny, "strict", 3, 3), learned):
        with pytest.raises(UserError, match="no static range to set"):
            set_image_range(student, low, high)


def test_layers_whose_input_fx_does_not_see_are_named():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.inner = nn.Conv2d(3, 8, 2, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            return self.fc(self.inner(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    with pytest.warns(UserWarning, match="only weights are quantized, .*: inner.self_attn.out_proj, inner.linear1"):
        quantize_model(Encoder(), "strict", 3, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_comes_whole(tiny):
    tiny.relu = torch.jit.script(nn.ReLU())
    assert quantize_model(tiny, "strict", 3, 3)(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_a_module_called_act_quant_is_not_overwritten(tiny):
    tiny.act_quant = nn.Linear(3, 3)
    with pytest.raises(UserError, match="TinyNet has an act_quant of its own"):
        quantize_model(tiny, "strict", 3, 3)


class Heads(nn.Module):
    """Rows of a Linear in heads, (N, tokens, heads, features), which the next Linear reads joined."""

    def __init__(self):
        super().__init__()
        self.conv, self.q, self.fc = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.q(self.conv(x).flatten(2).transpose(1, 2))
        return self.fc(F.relu(x.reshape(x.shape[0], -1, 2, 4)).flatten(2).mean(1))


def test_ranges_of_heads_do_not_depend_on_the_number_of_tokens():
    student = quantize_model(Heads(), "per_channel", 3, 3)
    calibrate(student, [torch.randn(2, 3, 8, 8)])
    assert student(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_a_statement_in_place_is_followed_whatever_it_computes():
    class Swish(TinyNet):
        def forward(self, x):
            x = self.conv1(x)
            F.hardswish(x, inplace=True)
            return self.fc(self.conv2(x).mean((2, 3)))

    images = torch.randn(2, 3, 8, 8)
    student = quantize_model(model := Swish().eval(), "strict", 8, 8)
    check_copy(student, model, images)
    assert "hardswish" in student.act_quant


@pytest.mark.parametrize(
    "wrap", [lambda y: {"out": y, "aux": [1, None]}, lambda y: (y.argmax(1), y), lambda y: [y[:0], y]]
)
def test_a_copy_is_compared_in_all_that_it_returns(wrap):
    class Wrapped(Adding):
        def forward(self, x):
            return wrap(super().forward(x))

    class Right(TinyNet):
        def forward(self, x):
            return wrap(super().forward(x))

    x = torch.randn(4, 3, 8, 8)
    model = Right().eval()
    granq.check_copy(quantize_model(model, "strict", 3, 3), model, x)
    model = Wrapped().eval()
    with pytest.raises(UserError, match="computes something else even without quantization"):
        granq.check_copy(quantize_model(model, "strict", 3, 3), model, x)


def test_a_network_may_change_its_images_in_place(tiny):
    class InPlace(TinyNet):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    model, x = InPlace().eval(), torch.randn(4, 3, 8, 8)
    model.load_state_dict(tiny.state_dict())
    before, student = x.clone(), quantize_model(model, "strict", 8, 8)
    frame = granq.measure_layer_error(model, [x], {"mine": student})
    assert torch.equal(x, before) and frame.sqnr_db.min() > 20
    with pytest.raises(UserError, match="may change its images"):
        granq.check_copy(student, model, x)


def test_another_parametrized_parameter_leaves_the_given_network_alone(tiny):
    nn.utils.parametrize.register_parametrization(tiny.conv1, "bias", nn.Tanh())
    with pytest.raises(UserError, match="parameter of conv1 is parametrized already"):
        quantize_model(tiny, "strict", 8, 8)
    tiny(torch.randn(2, 3, 8, 8))


def test_empty_batches_and_values_that_are_not_finite(tiny):
    x = torch.randn(4, 3, 8, 8)
    one, two = (quantize_model(tiny, "foldable", 4, 4) for _ in range(2))
    calibrate(one, [x])
    calibrate(two, [x[:0], x, x[:0]])
    assert same_tensors(one.state_dict(), two.state_dict())
    for images in (x[:0], x * math.nan):
        with pytest.raises(UserError, match="no images to calibrate on, or activations of them that are not finite"):
            calibrate(two, [images])
    with pytest.raises(UserError, match="values that are not finite"):
        audit(one, x * math.nan)


class ChannelsNorm(nn.Module):
    """A LayerNorm over the channels of maps, as ConvNeXt writes it, whose first factor is a parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@pytest.mark.parametrize(
    "pool", [lambda x: x.amax((2, 3)), lambda x: x.sum((2, 3)), lambda x: x.view(2, 4, -1).mean(2)]
)
@pytest.mark.parametrize("norm", [ChannelsNorm, lambda: nn.PReLU(4)])
def test_maps_are_maps_whatever_parameters_were_multiplied_in(pool, norm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), norm(), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(pool(self.norm(self.conv(x)).relu()))

    student = quantize_model(Net(), "per_channel", 3, 3)
    calibrate(student, [torch.randn(2, 3, 8, 8)])
    (place,) = granq.convert.activation_places(student).values()
    assert place.running_max.shape == (1, 4, 1, 1)


def test_what_makes_features_of_its_own_gives_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rnn, self.fc = nn.Conv2d(3, 4, 3), nn.LSTM(36, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.rnn(self.conv(x).flatten(2))[0].relu().mean(1))

    student = quantize_model(Net(), "per_channel", 3, 3)
    calibrate(student, [torch.randn(2, 3, 8, 8)])
    (place,) = granq.convert.activation_places(student).values()
    assert place.rows and place.running_max.shape == (1, 5)
