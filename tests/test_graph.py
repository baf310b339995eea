"""What is known of a traced network, and the one way to look into it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from granq import Scheme, UserError, activation_places, fake_quantize, layer_names, layer_quantizers, quantize_model
from granq.convert import image_places, original_weight, weight_quantizer
from granq.graph import norm_after, trace
from granq.hooks import eval_mode, images_of, watch
from granq.plain import module_of


def test_layers_in_order_of_definition(tiny):
    assert layer_names(tiny) == ["conv1", "conv2", "point", "fc"]
    assert layer_names(quantize_model(tiny, "strict", 3, 3)) == layer_names(tiny)


def test_what_quantizes_each_layer(tiny):
    student = quantize_model(tiny, "foldable", 3, 4, image_bits=6)
    layers, places = layer_quantizers(student), activation_places(student)
    assert list(layers) == layer_names(tiny)
    for name, (weight, original, inputs) in layers.items():
        assert weight is weight_quantizer(student.get_submodule(name)) and weight.bits == 3
        assert weight.source is inputs[0] and len(inputs) == 1 and inputs[0] in places.values()
        assert torch.equal(original, tiny.get_submodule(name).weight) and not original.requires_grad
    assert layers["conv2"].inputs == layers["point"].inputs  # they read one tensor
    assert layers["conv1"].inputs == (*image_places(student),) == (places["x"],)
    assert [q.bits for q in places.values()] == [6, 4, 4]


def test_what_is_not_quantized_has_no_quantizer(tiny):
    for weight, original, inputs in layer_quantizers(tiny).values():
        assert weight is None and inputs == () and original.dim() in (2, 4)
    assert torch.equal(original_weight(tiny.bn1), tiny.bn1.weight) and weight_quantizer(tiny.bn1) is None
    inputs = layer_quantizers(quantize_model(tiny, "granq", 3, 3))["conv1"].inputs
    assert inputs == (None,)  # the image comes after no ReLU
    skipped = quantize_model(tiny, Scheme(weights="per_tensor", activations=None, skip=("fc",)), 3, 3)
    assert [layer.weight is None for layer in layer_quantizers(skipped).values()] == [False, False, False, True]
    with pytest.raises(UserError, match="image is not quantized"):
        image_places(skipped)


class Twice(nn.Module):
    """One layer called on two tensors, by the name of its argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.norm(self.conv(input=x))
        z = self.conv(input=y)
        return self.other(z) + z


def test_every_call_of_a_layer_has_its_input():
    student = quantize_model(Twice(), "strict", 3, 3)
    (layer,) = layer_quantizers(student).values()
    assert len(layer.inputs) == 2 and set(layer.inputs) == set(activation_places(student).values())
    with pytest.raises(UserError, match="conv is called on two inputs"):
        quantize_model(Twice(), "foldable", 3, 3)


def test_a_batchnorm_belongs_to_a_layer_that_nobody_else_reads():
    model = Twice()
    graph = trace(model)
    first, second = (node for node in graph.nodes if isinstance(module_of(model, node), nn.Conv2d))
    assert first.all_input_nodes[0].op == "placeholder" and second.all_input_nodes[0] is norm_after(model, first)
    assert norm_after(model, first).target == "norm" and norm_after(model, second) is None


def test_after_every_kind_of_relu_there_is_a_place():
    class Relus(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.relu6 = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.ReLU6()

        def forward(self, x):
            x = self.relu6(self.relu(self.conv(x)))
            return torch.relu(F.relu6(F.relu(x.relu().relu_())) - 1)

    model, images = Relus(), torch.randn(2, 3, 4, 4)
    model.conv.bias.data.fill_(1.0)  # some values above 1
    student = quantize_model(model, Scheme(weights=None, activations="per_tensor", places="relu"), 3, 2)
    assert len(activation_places(student)) == 7
    x = model.conv(images)
    for _ in range(6):
        x = fake_quantize(x.relu().clamp_max(6), 2, "per_tensor")
    assert torch.equal(student(images), fake_quantize((x - 1).relu(), 2, "per_tensor"))


def test_watch_sees_every_call_and_leaves_nothing(tiny):
    images, calls = torch.randn(2, 3, 8, 8), []
    expected = tiny(images)
    tiny.train(), tiny.bn1.eval()
    modes = [m.training for m in tiny.modules()]
    with eval_mode(tiny), watch(tiny, ["relu", "fc"], lambda name, x, y: calls.append((name, x, y))):
        assert torch.equal(tiny(images), expected)
    assert [m.training for m in tiny.modules()] == modes
    assert [name for name, *_ in calls] == ["relu", "relu", "fc"]  # one module, two places
    assert all(torch.equal(y, x.relu()) for name, x, y in calls if name == "relu")
    assert torch.equal(calls[-1][2], expected)
    with pytest.raises(KeyError), watch(tiny, ["fc"], lambda name, x, y: {}[name]):
        tiny(images)
    tiny(images)  # an error has removed its hook, too
    assert len(calls) == 3


def test_watch_before_a_module_computes():
    model, seen = Twice().eval(), []
    with watch(model, ["norm", "other"], lambda name, x, y: seen.append((name, x.shape, y)), before=True):
        model(torch.randn(2, 3, 4, 4))
    assert seen == [(name, (2, 3, 4, 4), None) for name in ("norm", "other")]


def test_watch_sees_what_is_passed_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(input=x)

    model, seen, images = ByName(), [], torch.randn(2, 3, 4, 4)
    for before in (False, True):
        with watch(model, ["norm"], lambda name, x, y: seen.append(x), before=before):
            model(images)
    assert len(seen) == 2 and all(x is images for x in seen)


def test_a_batch_is_images_or_a_pair():
    images = torch.zeros(2, 3, 4, 4)
    assert images_of(images) is images_of((images, torch.zeros(2))) is images_of([images, 1]) is images


def test_a_scripted_network_is_put_into_eval_mode():
    with pytest.warns(FutureWarning, match="deprecated"):
        network = torch.jit.script(nn.Dropout(0.5).train())
    with eval_mode(network):
        assert torch.equal(network(torch.ones(99)), torch.ones(99))
    assert network.training
