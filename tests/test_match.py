"""Recipe match: images without data, layers compared, BatchNorm re-estimated, steps learned."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from granq import (
    QATConfig,
    Scheme,
    UserError,
    build_generator,
    calibrate,
    layer_quantizers,
    learn_steps,
    match,
    quantize_model,
    random_shapes,
    reestimate_batchnorm,
    refine,
    synthesize,
    vary,
)
from granq.convert import activation_places, original_weight, weight_quantizer
from granq.generator import batchnorm_inputs, batchnorm_loss
from granq.graph import plain_copy
from granq.losses import layer_loss
from granq.match import NORM_RATE, STEP_RATE, batchnorm_outputs, refined_images, relu_ceilings, widen_ranges
from granq.ranges import LearnedSteps, best_quantile
from granq.runs import begin, train

MATCH = QATConfig(
    epochs=2, warmup_epochs=1, iterations=2, batch_size=4, image_size=8, device="cpu", student_lr=0.1,
    scheme="foldable", recipe="match", refined_images=8,
)  # fmt: skip


def distance(model: nn.Module, images: torch.Tensor) -> float:
    """The BatchNorm loss of images."""
    with torch.no_grad(), batchnorm_inputs(model) as norms:
        model(images)
    return batchnorm_loss(norms).item()


# ---- images


def test_refined_images_are_nearer_to_the_statistics(tiny):
    images, labels = synthesize(build_generator(3, 8), 8)
    before = images.clone()
    refined = refine(tiny, images, labels)
    assert torch.equal(images, before) and not refined.requires_grad
    assert distance(tiny, refined) < 0.7 * distance(tiny, images)
    assert all(p.grad is None for p in tiny.parameters())


def test_bf16_refines_images_as_float32_does(tiny):
    found = {}
    for bf16 in (False, True):
        game = begin(tiny, MATCH.change(bf16=bf16, batch_size=32, refined_images=32))
        found[bf16] = distance(game.teacher, refined_images(game)[0])
    assert found[True] == pytest.approx(found[False], rel=0.01)


def test_varied_images_differ_in_light_only():
    images = torch.randn(2000, 3, 8, 8)
    mirrored = (vary(images, 0.0) == images.flip(3)).flatten(1).all(1)
    assert 0.4 < mirrored.float().mean() < 0.6
    varied = vary(images, 0.5)
    contrast, shift = varied.std((1, 2, 3)), varied.mean((1, 2, 3))
    assert 0.4 < contrast.min() and contrast.max() < 2 and contrast.std() > 0.2
    assert shift.std().item() == pytest.approx(0.5 * (1 + 0.4**2 / 3) ** 0.5, rel=0.1)


def test_random_shapes_hide_each_other_and_come_from_the_seed():
    torch.manual_seed(0)
    images = random_shapes(64, 32)
    torch.manual_seed(0)
    assert torch.equal(images, random_shapes(64, 32)) and not torch.equal(images, random_shapes(64, 32))
    assert images.shape == (64, 3, 32, 32) and abs(images.mean()) < 0.3 and 0.5 < images.std() < 1.5
    edges = (images.diff(dim=3).abs() > 0.2).any(1).float().mean((1, 2))  # flat between few edges, unlike noise
    assert 0.02 < edges.mean() < 0.3 and edges.std() > 0.02


def test_every_other_batch_of_refined_images_is_made_of_shapes(tiny, monkeypatch):
    game, started = begin(tiny, MATCH), []
    state, generator = torch.get_rng_state(), copy.deepcopy(game.generator.state_dict())
    monkeypatch.setattr(match, "refine", lambda teacher, images, labels, **_: started.append(images) or images)
    images, labels = refined_images(game)
    assert len(images) == len(labels) == 8 and len(started) == 2
    # made again after a resume: nothing of the run may have moved
    assert torch.equal(refined_images(game)[0], images) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, generator[k]) for k, v in game.generator.state_dict().items())
    assert (started[1].diff(dim=3) == 0).any() and not (started[0].diff(dim=3) == 0).any()  # shapes are flat somewhere


# ---- layers


def test_layer_loss_by_hand():
    teacher, student = torch.tensor([1.0, -1, 3, -3]).view(4, 1, 1, 1), torch.tensor([1.0, -2, 7, 1]).view(4, 1, 1, 1)
    # squares 0, 1, 16, 16; after a ReLU 0, 0, 16, 1; after a ReLU6 0, 0, 9, 1
    for ceiling, squares, variance in ((None, 33, 5), (math.inf, 17, 1.5), (6.0, 10, 1.5)):
        assert layer_loss([teacher], [student], [ceiling]).item() == pytest.approx(squares / 4 / variance)
    student.requires_grad_()
    both = layer_loss([teacher] * 2, [student] * 2, [None, 6.0])
    assert both.item() == pytest.approx((33 / 4 / 5 + 10 / 4 / 1.5) / 2)
    (slope,) = torch.autograd.grad(both, student)  # twice the differences 0, -1, 4, 4 and 0, 0, (cut off), 1
    wanted = [(2 * a / 4 / 5 + 2 * b / 4 / 1.5) / 2 for a, b in ((0, 0), (-1, 0), (4, 0), (4, 1))]
    torch.testing.assert_close(slope.flatten(), torch.tensor(wanted))
    still = torch.ones(4, 1, 1, 1)  # a layer that its teacher has switched off: by a thousandth of the mean variance
    both = layer_loss([teacher, still], [student, still + 0.1], [None, None])
    assert both.item() == pytest.approx((33 / 4 / 5 + 0.01 / (1e-3 * 5 / 2)) / 2)


class Residual(nn.Module):
    """One block as torchvision's, whose ReLUs and sums work in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))
        self.relu, self.relu6, self.inplace = nn.ReLU(inplace), nn.ReLU6(inplace), inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.relu6(self.bn3(F.relu(y, inplace=self.inplace))).mean((2, 3))


def test_layers_are_compared_alike_whether_or_not_they_are_overwritten():
    plain = Residual(False)
    for norm in (plain.bn1, plain.bn2, plain.bn3):
        nn.init.normal_(norm.bias)
        nn.init.constant_(norm.weight, 3.0)  # some values above 6
    losses = []
    for inplace in (False, True):
        teacher = Residual(inplace)
        teacher.load_state_dict(plain.state_dict())
        game = begin(teacher, MATCH.change(warmup_epochs=0, epochs=1))
        assert relu_ceilings(game.student) == [math.inf, None, 6.0]
        losses.append([game.run_epoch(None)["student_loss"], *game.student.conv1.parameters()])
    assert losses[0][0] == losses[1][0] > 0 and torch.equal(losses[0][1], losses[1][1])


def test_outputs_of_batchnorms_in_the_order_of_calls(tiny):
    images = torch.randn(2, 3, 8, 8)
    with batchnorm_outputs(traced := plain_copy(tiny, traced=True)) as seen:
        traced(images)
    first = tiny.bn1(tiny.conv1(images))
    assert len(seen) == 2 and torch.equal(seen[0], first)
    assert torch.equal(seen[1], tiny.bn2(tiny.conv2(first.relu())))


def test_recipe_match_follows_the_teacher_and_leaves_the_generator(tiny):
    game = begin(tiny, MATCH.change(epochs=4, iterations=20, student_lr=3e-3))
    game.run_epoch(None)
    drawn = copy.deepcopy(list(game.generator.parameters()))
    steps = [m.log_step.detach().clone() for m in game.student.modules() if isinstance(m, LearnedSteps)]
    losses = [game.run_epoch(None)["student_loss"] for _ in range(3)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(map(torch.equal, drawn, game.generator.parameters()))
    moved = [m.log_step for m in game.student.modules() if isinstance(m, LearnedSteps)]
    assert len(moved) == 7 and not any(map(torch.equal, steps, moved))  # four layers, two of which share their input
    rates = [group["lr"] for group in game.optimizers["student"].param_groups]
    # the end of the cosine; weights, BatchNorm, learned steps
    assert 0 < rates[0] < 1e-4 and rates == pytest.approx([rates[0], NORM_RATE * rates[0], STEP_RATE * rates[0]])


def test_the_recipe_s_settings():
    assert QATConfig(recipe="match", scheme="foldable").refined_images == 2048
    assert QATConfig(recipe="match", refined_images=0).refined_images == 0
    assert QATConfig(recipe="match").student_lr == 5e-4 and QATConfig(recipe="gdfq").student_lr == 1e-4
    assert QATConfig(recipe="match").change(batch_size=48).refined_images == 32 * 48
    assert QATConfig(recipe="match").change(recipe="gdfq") == QATConfig(recipe="gdfq")
    assert QATConfig().change(recipe="match") == QATConfig(recipe="match")
    own = QATConfig(recipe="match", scheme=Scheme(weights="per_tensor", activations=None), milestones=(2, 3))
    own = own.change(layer_bits={"fc": (4, 3)}, student_lr=0.1)
    assert QATConfig.model_validate_json(own.model_dump_json()) == own and own.student_lr == 0.1


@pytest.mark.parametrize(("scheme", "learns"), [("foldable", True), ("strict", True), ("granq", False)])
def test_steps_are_learned_where_codes_are_clamped(tiny, scheme, learns):
    game = begin(tiny, MATCH.change(scheme=scheme, warmup_epochs=0))
    game.run_epoch(None)
    assert any(isinstance(m, LearnedSteps) for m in game.student.modules()) == learns


def test_pixels_are_the_range_of_an_image_with_bits_of_its_own(tiny):
    pixels = torch.tensor([-1.0, -2, -3]).view(1, 3, 1, 1), torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1)
    for bits, given in ((6, pixels), (6, None), (0, pixels)):
        game = begin(tiny, MATCH.change(image_bits=bits, warmup_epochs=0, student_lr=1e-9), pixels=given)
        game.run_epoch(None)
        place = next(iter(activation_places(game.student).values()))
        steps = place.qparams().scale.flatten() * (2**place.bits - 1)
        assert torch.allclose(steps, torch.tensor([2.0, 4, 7]), rtol=1e-3) == (bits == 6 and given is not None)


def test_images_stay_between_black_and_white(tiny):
    """Beyond, the clamped image of the student would differ from that of the teacher before any layer does."""
    pixels = torch.full((1, 3, 1, 1), -0.5), torch.full((1, 3, 1, 1), 1.0)
    for given in (pixels, None):
        game = begin(tiny, MATCH.change(warmup_epochs=0), pixels=given)
        for images in (game.recipe.draw(game)[0], refined_images(game)[0]):
            assert (images.min() >= -0.5 and images.max() <= 1) == (given is not None)


@pytest.mark.parametrize(("scheme", "bits"), [("foldable", 3), ("foldable", 8), ("per_channel", 3)])
def test_ranges_hold_what_batchnorm_says_of_real_images(tiny, scheme, bits):
    """Behind bn1 and its ReLU; not behind the sum, of which bn2 is one part, nor in front of bn1."""
    tiny.bn1.eps = 1e-12
    with torch.no_grad():
        tiny.bn1.weight.copy_(torch.tensor([1.0, -2, 3, 0.1]))
        tiny.bn1.bias.copy_(torch.tensor([0.0, 1, -9, 5]))
    student = quantize_model(tiny, scheme, 3, bits)
    calibrate(student, [0.01 * torch.randn(8, 3, 8, 8)])
    before = {name: place.running_max.clone() for name, place in activation_places(student).items()}
    widen_ranges(student)
    changed = {n: p for n, p in activation_places(student).items() if not torch.equal(p.running_max, before[n])}
    ((name, place),) = changed.items()
    reach = stats.norm.isf((1 - best_quantile(bits)) / 2)
    wanted = torch.tensor([reach, 1 + 2 * reach, max(3 * reach - 9, 0), 5 + 0.1 * reach], dtype=torch.float32)
    torch.testing.assert_close(place.running_max.flatten(), torch.maximum(wanted, before[name].flatten()))
    assert place.running_min.min() >= 0


@pytest.mark.parametrize(
    ("pool", "scheme", "bits", "wide"),
    [
        (nn.MaxPool2d(6), "foldable", 3, True), (nn.AdaptiveAvgPool2d(1), "foldable", 8, True),
        (nn.AdaptiveAvgPool2d(1), "foldable", 3, False), (nn.MaxPool2d(6), "layerwise", 3, False),
    ],
)  # fmt: skip
def test_ranges_look_through_a_pooling_but_not_beyond_a_ceiling(pool, scheme, bits, wide):
    """Averages stay far inside, and the quantile of a tensor is not that of its widest channel."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), pool, nn.Flatten(), nn.Linear(4, 3)
    network = nn.Sequential(*layers).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([10.0, 10, 10, 1]))
        network[1].running_var[3] = 0  # dead
    student = quantize_model(network, scheme, 8, bits)
    calibrate(student, [torch.zeros(8, 3, 8, 8)])
    before = [place.running_max.clone() for place in activation_places(student).values()]
    widen_ranges(student)
    place = [*activation_places(student).values()][-1]
    assert (place.running_max.flatten()[:3].tolist() == [6.0] * 3) == wide
    assert place.running_max.flatten()[-1] == before[-1].flatten()[-1]


# ---- BatchNorm


def test_reestimated_batchnorm_sits_to_its_input_as_the_teacher_s_does(tiny):
    for norm in (tiny.bn1, tiny.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    images = torch.randn(8, 3, 6, 6)

    def distances(model):
        """Of every BatchNorm: input mean minus running mean, input variance over running variance."""
        with batchnorm_inputs(model) as seen, torch.no_grad():
            model(images)
        inputs = [(norm, *torch.var_mean(x, (0, 2, 3), correction=0)) for norm, x in seen]
        return [torch.stack([mean - norm.running_mean, var / norm.running_var]) for norm, var, mean in inputs]

    student = quantize_model(tiny, Scheme(weights="per_out_channel", activations=None), 2, 2)
    before = distances(student)
    reestimate_batchnorm(student, tiny, images)
    expected, after = distances(tiny), distances(student)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert all((b - e).abs().max() > 0.01 for b, e in zip(before, expected, strict=True))
    same = quantize_model(tiny, Scheme(weights=None, activations=None), 2, 2)
    reestimate_batchnorm(same, tiny, images)
    torch.testing.assert_close(same.bn2.running_var, tiny.bn2.running_var)
    assert not torch.equal(student.bn1.running_mean, tiny.bn1.running_mean)  # the teacher's own were not touched


def test_batchnorms_that_are_off_or_without_statistics_end_no_run(tiny):
    nn.init.zeros_(tiny.bn2.weight)
    tiny.bn1.running_mean = tiny.bn1.running_var = None  # while track_running_stats stays
    short = dict(epochs=2, warmup_epochs=1, iterations=2, batch_size=4, refined_images=8, image_size=8)
    config = QATConfig(recipe="match", scheme="strict", **short)
    assert train(tiny, config).history.student_loss.iloc[-1] < 10


def test_a_batchnorm_that_is_called_twice_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.own = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.own(self.norm(self.conv2(self.norm(self.conv1(x)))) + 3).mean((2, 3))

    teacher, images = Shared().eval(), torch.randn(16, 3, 8, 8)
    student = quantize_model(teacher, "strict", 4, 4)
    reestimate_batchnorm(student, teacher, images)
    assert torch.equal(student.norm.running_mean, teacher.norm.running_mean)
    assert not torch.equal(student.own.running_mean, teacher.own.running_mean)


# ---- learned steps


def test_learned_steps_start_as_they_are_and_are_saved(tiny):
    images = torch.randn(4, 3, 8, 8)
    student = quantize_model(tiny, "foldable", 3, 3)
    with pytest.raises(UserError, match="never set"):
        learn_steps(student)
    calibrate(student, [images])
    before = student(images)
    steps = learn_steps(student)
    torch.testing.assert_close(student(images), before)
    assert {p.requires_grad for p in steps} == {True} and len(steps) == 4 + 3  # two layers share an input
    with torch.no_grad():
        for p in steps:
            p.add_(0.3)
    twin = quantize_model(tiny, "foldable", 3, 3)
    twin.load_state_dict(student.state_dict())
    assert torch.equal(twin(images), student(images)) and not torch.equal(student(images), before)
    with pytest.raises(UserError, match="clamp"):
        learn_steps(quantize_model(tiny, "granq", 3, 3))
    assert len(learn_steps(quantize_model(tiny, "strict", 3, 3))) == 4  # of weights; activation ranges are each image's


def test_a_folded_step_learns_from_the_weight_it_scales(tiny):
    """value = Q(w t) / t: a weight inside its range has the slope w - value in log t, a clamped one -value."""
    student = quantize_model(tiny, "foldable", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    learn_steps(student)
    layer = student.get_submodule("conv2")
    quantizer, weight = weight_quantizer(layer), original_weight(layer)
    with torch.no_grad():
        quantizer.learned.log_step -= 0.3  # a shorter range: some weights are clamped
    value, step = quantizer(weight), quantizer.input_step(weight)
    (slope,) = torch.autograd.grad(value.sum(), quantizer.source.learned.log_step)
    half = step.reciprocal() * quantizer.learned().scale / 2
    inside = (weight - value).abs() <= 1.001 * half
    assert 0 < inside.float().mean() < 1
    expected = torch.where(inside, weight - value, -value).sum((0, 2, 3))
    torch.testing.assert_close(slope.flatten(), expected.detach())


def test_a_weight_is_a_multiple_of_its_learned_step_over_that_of_its_input(tiny):
    student = quantize_model(tiny, "foldable", 3, 3)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    learn_steps(student)
    for name, (weight, original, _) in layer_quantizers(student).items():
        codes = student.get_submodule(name).weight * weight.input_step(original) / weight.qparams(original).scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.round().abs().max() <= 7


def test_teachers_in_training_mode_are_read_as_in_eval_mode(tiny):
    """Right: what the same functions give, and leave, of a copy that was in eval mode before."""
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    student = quantize_model(tiny, "strict", 3, 3)
    evaluated = copy.deepcopy(tiny), copy.deepcopy(student)
    for model in (tiny, student):
        model.train()
        model.bn1.eval()
    before, modes = copy.deepcopy(tiny.state_dict()), [m.training for m in (*tiny.modules(), *student.modules())]
    assert torch.equal(refine(tiny, images, labels, steps=2), refine(evaluated[0], images, labels, steps=2))
    reestimate_batchnorm(evaluated[1], evaluated[0], images)
    reestimate_batchnorm(student, tiny, images)
    for (name, value), wanted in zip(student.state_dict().items(), evaluated[1].state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert [m.training for m in (*tiny.modules(), *student.modules())] == modes


def test_a_constant_channel_keeps_its_variance():
    """In both, in the student, in the teacher, in none. Right: the teacher's variance, but for the last one."""
    x = torch.randn(64, 4, 6, 6)
    gain = {"teacher": [0.0, 1.0, 0.0, 1.0], "student": [0.0, 0.0, 1.0, 1.5]}
    nets = {}
    for name, gains in gain.items():
        conv, norm = nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)
        conv.weight.data = torch.tensor(gains).view(4, 1, 1, 1)
        conv.bias.data = torch.tensor([0.3, 7.7, -123.4, 2.0])
        norm.running_mean.normal_(), norm.running_var.copy_(torch.tensor([2.0, 3.0, 4.0, 5.0]))
        nets[name] = nn.Sequential(conv, norm).eval()
    nets["student"][1].load_state_dict(nets["teacher"][1].state_dict())
    wanted = nets["teacher"](x).mean((0, 2, 3))
    reestimate_batchnorm(nets["student"], nets["teacher"], x)
    torch.testing.assert_close(nets["student"][1].running_var, torch.tensor([2.0, 3.0, 4.0, 5 * 1.5**2]))
    torch.testing.assert_close(nets["student"](x).mean((0, 2, 3))[:3], wanted[:3], rtol=1e-4, atol=1e-4)


class NormInside(nn.Conv2d):
    """A convolution that torch.fx does not open, with a BatchNorm of its own, as detection networks have them."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        if x.numel() == 0:
            raise ValueError
        return self.norm(super().forward(x)).relu()


def test_a_batchnorm_inside_of_a_layer_is_not_compared(tiny):
    tiny.conv2 = NormInside(4, 4, 3, 1, 1)
    with pytest.warns(UserWarning, match="in full precision, as they compute something else: conv2"):
        assert len(train(tiny, MATCH).history) == 2


def test_synchronized_batchnorm_is_refused(tiny):
    tiny.bn2 = nn.SyncBatchNorm(tiny.bn2.num_features)
    with pytest.raises(UserError, match="SyncBatchNorm, which no recipe sees"):
        train(tiny, MATCH)
