"""What is quantized follows from what a network computes, not from the names of its classes."""

import copy

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F

from granq import Scheme, UserError, activation_places, fake_quantize, layer_quantizers, measure_layer_error
from granq import quantize_model as quantize
from granq.config import QATConfig
from granq.convert import bypassed, image_places
from granq.match import Match, batchnorm_outputs, relu_ceilings
from granq.qat import Game


class PadAfter(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Reflects(nn.Conv2d):
    """Detectron's habit: a norm and an activation inside of the convolution; reflected at the border."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return F.relu(self.norm(super().forward(x)))


class NormRelu(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu6(super().forward(x))


class Checked(nn.Conv2d):
    """fx cannot follow this ``if``."""

    def forward(self, x):
        if x.shape[1] != self.in_channels:
            raise ValueError("channels")
        return super().forward(x)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class PadsBySize(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, x.shape[2] % 2 + 1)


class Adapted(nn.Linear):
    """LoRA: the weight is a sum."""

    def __init__(self, *args):
        super().__init__(*args)
        self.down, self.up = nn.Parameter(torch.randn(1, args[0])), nn.Parameter(torch.randn(args[1], 1))

    def forward(self, x):
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def with_statistics(*modules):
    net = nn.Sequential(*modules)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2), norm.running_var.uniform_(0.5, 2), norm.bias.data.normal_(0, 0.2)
    return net.eval()


def head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)


def written_out(conv, x, bits, pad, mode="constant"):
    """Scheme ``strict`` of a convolution after padding."""
    weight = fake_quantize(conv.weight, bits, "per_out_channel")
    x = fake_quantize(F.pad(x, pad, mode=mode), bits)
    return F.conv2d(x, weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


@pytest.mark.parametrize(
    ("conv", "size", "pad", "mode"),
    [
        (PadAfter(3, 4, 3, 2), (8, 6), (0, 1, 0, 1), "constant"),
        (timm.layers.Conv2dSame(3, 6, 3, 2, groups=3), (8, 7), (1, 1, 0, 1), "constant"),
        (timm.layers.Conv2dSame(3, 6, 5, 3, dilation=2, bias=False), (10, 12), (3, 3, 4, 4), "constant"),
        (Reflects(3, 4, 3, padding=1), (8, 7), (1, 1, 1, 1), "reflect"),
    ],
)
def test_a_convolution_that_pads_is_padding_and_a_plain_convolution(conv, size, pad, mode):
    net, x = with_statistics(conv), torch.randn(2, 3, *size)
    before, student = copy.deepcopy(net), quantize(net, "strict", 3, 3)
    assert type(net[0]) is type(before[0]) and student.state_dict().keys() == net.state_dict().keys()
    expected = written_out(net[0], x, 3, pad, mode)
    if mode == "reflect":
        expected = F.relu(net[0].norm(expected))
    torch.testing.assert_close(student(x), expected)
    with bypassed(student):
        assert torch.equal(student(x), net(x))
    student.load_state_dict(before.state_dict())  # names are those of the network
    assert image_places(quantize(net, "strict", 3, 3, image_bits=6))[0].bits == 6  # a border is no other tensor


@pytest.mark.filterwarnings("ignore:the scheme quantizes no activation")
@pytest.mark.parametrize(
    ("norm", "ceiling"),
    [
        (timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU), torch.inf),
        (timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU6), 6.0),
        (timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), None),
        (NormRelu(4), 6.0),
    ],
)
def test_a_batchnorm_with_an_activation_is_both(norm, ceiling):
    net, x = with_statistics(nn.Conv2d(3, 4, 3), norm, *head(4)), torch.randn(2, 3, 8, 8)
    student = quantize(net, "granq", 3, 3)
    assert len(activation_places(student)) == (ceiling is not None) and relu_ceilings(student) == [ceiling]
    y = F.conv2d(x, fake_quantize(net[0].weight, 3, "per_kernel", clamp=False), net[0].bias)
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
    y = fake_quantize(y.clamp(0, ceiling), 3, clamp=False) if ceiling else F.silu(y)
    expected = F.linear(y.mean((2, 3)), fake_quantize(net[4].weight, 3, "per_kernel", clamp=False), net[4].bias)
    torch.testing.assert_close(student(x), expected)


@pytest.mark.parametrize(
    "layer",
    [Standardized(3, 4, 3), PadsBySize(3, 4, 3), Adapted(8, 4), Checked(3, 4, 3), timm.layers.StdConv2d(3, 4, 3)],
)
def test_what_is_not_shown_to_be_plain_stays_in_full_precision_and_is_named(layer):
    x = torch.randn(2, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 8, 8)
    net = nn.Sequential(layer, nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="in full precision, as they compute something else: 0$"):
        student = quantize(net, "strict", 2, 2)
    assert layer_quantizers(student)["0"].weight is None and torch.equal(student(x), net(x))


def test_a_forward_of_one_object_counts(tiny):
    """Somebody replaced a method of one layer."""
    tiny.conv1.forward = lambda x: F.conv2d(x, -tiny.conv1.weight, padding=1)
    with pytest.warns(UserWarning, match="something else: conv1$"):
        student = quantize(tiny, "strict", 2, 2)
    assert layer_quantizers(student)["conv1"].weight is None and layer_quantizers(student)["conv2"].weight is not None


class SixInDisguise(nn.ReLU6):
    """A subclass of a ReLU."""


ACTIVATIONS = {
    SixInDisguise(): 6.0,
    nn.Hardtanh(0, 6): 6.0,
    nn.Threshold(0, 0): torch.inf,
    nn.Hardtanh(0, 2.5): 2.5,
    (lambda x: F.hardtanh(x, 0, 6)): 6.0,
    (lambda x: x.clamp(min=0)): torch.inf,
    (lambda x: torch.clamp(x, 0, 6)): 6.0,
    (lambda x: x.clamp_(min=0)): torch.inf,
    (lambda x: F.relu(input=x)): torch.inf,
    nn.LeakyReLU(0.01): None,
    nn.GELU(): None,
    nn.Hardswish(): None,
    nn.Hardsigmoid(): None,
    nn.Hardtanh(): None,
    nn.Threshold(0.1, 0): None,
    nn.Softplus(100): None,
    nn.PReLU(init=0.0): None,  # its slope is learned
    nn.MaxPool2d(1): None,
    (lambda x: x.abs()): None,
    (lambda x: torch.rand_like(x)): None,
}


@pytest.mark.parametrize(("activation", "ceiling"), ACTIVATIONS.items())
def test_a_relu_is_what_behaves_like_one(activation, ceiling):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.act = activation if isinstance(activation, nn.Module) else nn.Identity()

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.act(x) if isinstance(activation, nn.Module) else activation(x)

    net, x, state = Net().eval(), 20 * torch.randn(2, 3, 8, 8), torch.get_rng_state()
    scheme = Scheme(weights=None, activations="per_channel", places="relu")
    if ceiling is None:
        with pytest.warns(UserWarning, match="quantizes no activation of Net"):
            student = quantize(net, scheme, 2, 2)
    else:
        student = quantize(net, scheme, 2, 2)
        y = net.norm(net.conv(x)).clamp(0, ceiling)
        assert torch.equal(student(x), fake_quantize(y, 2, "per_channel"))
    assert relu_ceilings(student) == [ceiling] and torch.equal(torch.get_rng_state(), state)


def test_a_network_that_is_quantized_already_is_refused(tiny):
    with pytest.raises(UserError, match="parameter of conv1 is parametrized already"):
        quantize(quantize(tiny, "strict", 3, 3), "strict", 3, 3)


def test_a_weight_that_a_hook_computes_is_refused(tiny):
    nn.utils.spectral_norm(tiny.conv2)
    with pytest.raises(UserError, match="parameter of conv2 is parametrized already"):
        quantize(tiny, "strict", 3, 3)


def test_errors_and_the_game_see_the_same_layers_in_both_networks():
    net = with_statistics(PadAfter(3, 4, 3, 2), timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), *head(4))
    images, labels = torch.randn(2, 3, 8, 8), torch.zeros(2)
    frame = measure_layer_error(net, [(images, labels)], ["strict"], 8).set_index(["layer", "mode"])
    reference, value = net[0](images), written_out(net[0], images, 8, (0, 1, 0, 1))
    assert frame.mse["0", "local"] == pytest.approx((value - reference).square().mean().item(), rel=1e-4)
    config = QATConfig(epochs=1, warmup_epochs=0, image_size=8, scheme="strict", recipe="match", refined_images=0)
    game = Game(net, config, Match(config))
    with batchnorm_outputs(game.teacher) as wanted:
        assert torch.equal(game.teacher(images), net(images))
    norm = net[1]
    expected = F.batch_norm(reference, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
    torch.testing.assert_close(wanted[0], expected)  # before the activation, as in the student
