"""Losses and generators by hand, one step of the game, same seed same bits, and parts of one's own."""

import copy
import itertools
import json
import math

import pandas as pd
import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.nn import functional as F

from granq import QATConfig, Scheme, build_generator, choose_qparams, fake_quantize, qat, quantize, synthesize, train
from granq.convert import ActQuantizer, activation_places, layer_quantizers, weight_quantizer
from granq.fast import channel_var_mean, upsample_conv
from granq.generator import batchnorm_inputs, batchnorm_loss
from granq.losses import (
    agreement_loss,
    disagreement_loss,
    entropy,
    gdfq_student_loss,
    margin_loss,
    soft_label_loss,
    student_loss,
)
from granq.runs import begin, load_generator
from granq.schemes import SCHEMES

T = torch.tensor([[2.0, 0, -1], [0.5, 0.5, 0]])
S = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
Y = torch.tensor([0, 1])
IMAGES = torch.linspace(-2, 2, 4 * 3 * 64).view(4, 3, 8, 8)
TINY = QATConfig(epochs=2, warmup_epochs=1, iterations=2, batch_size=4, image_size=8, device="cpu", student_lr=0.1)
MATCH = TINY.change(
    scheme="foldable", recipe="match", refined_images=8,
)  # fmt: skip


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


# ---- losses and generators


def test_losses_of_the_worked_example():
    assert disagreement_loss(T, S, Y).item() == pytest.approx(1.043938, abs=1e-6)
    assert agreement_loss(T, S, Y).item() == pytest.approx(0.265126, abs=1e-6)
    assert entropy(T - S).tolist() == pytest.approx([0.832396, 1.020191], abs=1e-6)
    assert margin_loss(T, S, 0.1, 0.8).item() == pytest.approx(0.05, abs=1e-6)
    assert student_loss(T, S, 20.0).item() == pytest.approx(-439.236694, abs=1e-3)


def test_soft_labels_by_hand():
    p, q = (T / 2).softmax(1), (S / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean().item()
    assert soft_label_loss(T, S, 2.0).item() == pytest.approx(4 * divergence, rel=1e-5)
    assert soft_label_loss(T, T, 2.0).item() == pytest.approx(0, abs=1e-6)
    whole = F.cross_entropy(S, Y) + soft_label_loss(T, S, 1.0)
    assert gdfq_student_loss(T, S, Y).item() == pytest.approx(whole.item())


def test_batchnorm_loss_by_hand():
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(2.0)
    with batchnorm_inputs(norm) as seen:
        norm(torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2))  # mean 2, biased variance 4
    assert batchnorm_loss(seen).item() == pytest.approx(1 + 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_statistics_equal_torch_s(memory_format):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    expected, got = torch.var_mean(x, (0, 2, 3), correction=0), channel_var_mean(x)
    torch.testing.assert_close(got, expected)
    targets = torch.randn(2, 4, dtype=torch.float64)
    gradients = [torch.autograd.grad((targets[0] * v + targets[1] * m).sum(), x) for v, m in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert channel_var_mean(x.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("size", [32, 128])
def test_both_generators_draw_standardized_images(size):
    images, labels = synthesize(build_generator(5, size), 4)
    assert images.shape == (4, 3, size, size) and int(labels.max()) < 5
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 1)])
def test_upsampling_convolution_equals_its_plain_form(shape, bias):
    conv = nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = conv(F.interpolate(x, scale_factor=2.0)), upsample_conv(x, conv)
    torch.testing.assert_close(*outputs)
    target = torch.randn_like(outputs[0])
    plain, fast = (torch.autograd.grad((y * target).sum(), (x, *conv.parameters())) for y in outputs)
    torch.testing.assert_close(plain, fast)


# ---- the game


@pytest.mark.parametrize("recipe", ["adadfq", "gdfq"])
def test_one_step_changes_what_it_should(tiny, recipe):
    game = begin(tiny, TINY.change(recipe=recipe))

    def snapshot(name):
        return [p.detach().clone() for p in getattr(game, name).parameters()]

    before = {name: snapshot(name) for name in ("teacher", "student", "generator")}
    stats = [b.clone() for b in game.student.buffers()]
    game.play(train_student=False)
    changed = {name: not all(map(torch.equal, before[name], snapshot(name))) for name in before}
    assert changed == {"teacher": False, "student": False, "generator": True}
    game.play(train_student=True)
    assert not any(map(torch.equal, before["student"], snapshot("student")))
    assert all(map(torch.equal, before["teacher"], snapshot("teacher")))
    assert all(p.grad is None for p in game.teacher.parameters())
    assert all(map(torch.equal, stats, game.student.buffers()))  # BatchNorm is frozen


def test_one_forward_of_each_network_per_step(tiny):
    game, calls = begin(tiny, TINY), []
    game.student.conv1.register_forward_hook(lambda *_: calls.append("student"))
    game.teacher.conv1.register_forward_hook(lambda *_: calls.append("teacher"))
    game.play(train_student=True)
    assert sorted(calls) == ["student", "teacher"]


def test_trying_the_networks_leaves_no_trace(tiny):
    state = torch.manual_seed(TINY.seed).get_state()
    game = begin(tiny, TINY.change(scheme="layerwise"))
    assert not any(place.seen for place in activation_places(game.student).values())
    torch.set_rng_state(state)
    assert same_bits(game.generator, build_generator(3, 8))  # its weights are the first that a seed draws


def test_each_player_follows_the_gradient_of_its_own_loss(tiny):
    """Two separate forwards and backwards, each with a loss written out, give the step that the game takes in one."""
    c, games = TINY, [begin(tiny, TINY) for _ in range(2)]
    for game in games:
        torch.manual_seed(5)
        if game is games[0]:
            game.play(train_student=True)
            continue
        images, labels = synthesize(game.generator, c.batch_size, 3)
        with batchnorm_inputs(game.teacher) as norms:
            t, s = game.teacher(images), game.student(images)
        loss = c.alpha_ds * F.cross_entropy(t - s, labels) + c.alpha_as * F.cross_entropy(t + s, labels)
        loss = loss + margin_loss(t, s, c.lambda_l, c.lambda_u) + c.gamma * batchnorm_loss(norms)
        images = images.detach()
        with torch.no_grad():
            t = game.teacher(images)
        for network, objective in (
            (game.generator, loss), (game.student, student_loss(t, game.student(images), c.temperature)),
        ):  # fmt: skip
            gradients = torch.autograd.grad(objective, list(network.parameters()))
            for p, g in zip(network.parameters(), gradients, strict=True):
                p.grad = g
        game.optimizers["generator"].step()
        game.optimizers["student"].step()
    for name in ("generator", "student"):
        ours, plain = (getattr(game, name).state_dict() for game in games)
        for key in ours:
            torch.testing.assert_close(ours[key], plain[key], rtol=1e-5, atol=1e-6)


def test_rates_fall_at_the_milestones(tiny):
    game = begin(tiny, TINY.change(epochs=3, milestones=(1, 2)))
    rates = []
    for _ in range(3):
        game.run_epoch(None)
        rates.append([game.optimizers[name].param_groups[0]["lr"] for name in ("student", "generator")])
    assert rates == [pytest.approx([0.1 * share, 1e-3 * share]) for share in (1, 0.1, 0.01)]


@pytest.mark.parametrize("scheme", ["granq", "layerwise"])
def test_same_seed_same_bits(tiny, scheme):
    config = TINY.change(scheme=scheme)
    first, second = train(tiny, config), train(tiny, config)
    assert same_bits(first.student, second.student)
    assert not torch.equal(first.student.fc.weight, train(tiny, config.change(seed=1)).student.fc.weight)


@pytest.mark.parametrize("config", [TINY, TINY.change(bf16=True), MATCH], ids=["adadfq", "bf16", "match"])
def test_resume_equals_an_uninterrupted_run(tiny, tmp_path, config):
    config = config.change(epochs=3)

    def stop(game):
        if game.epoch == 2:
            raise KeyboardInterrupt

    whole = train(tiny, config, evaluate=lambda _: 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, config, evaluate=lambda _: 0.0, out=tmp_path, after_epoch=stop)
    resumed = train(tiny, config, evaluate=lambda _: 0.0, out=tmp_path, resume=True)
    assert whole.history.equals(resumed.history) and len(whole.history) == 3
    assert same_bits(whole.student, resumed.student) and same_bits(whole.generator, resumed.generator)


def test_codes_that_change():
    """The same from the weights of every epoch, by the quantizer's own formula."""
    codes, config = [], TINY.change(epochs=4, scheme="strict", weight_bits=2)

    def keep(game):
        weights = [layer.original for layer in layer_quantizers(game.student).values()]
        codes.append(torch.cat([quantize(w, *choose_qparams(w, 2, "per_out_channel"), 2).flatten() for w in weights]))

    history = train(tiny_network(), config, after_epoch=keep).history
    assert history.codes_changed[1:].tolist() == pytest.approx(
        [100 * (b != a).float().mean().item() for a, b in itertools.pairwise(codes)]
    )
    assert history.codes_changed[1:].max() > 0 and math.isnan(history.codes_changed[0])


def test_a_generator_that_stops_to_learn(tiny):
    generators = []
    config = TINY.change(epochs=4, generator_epochs=2)
    result = train(tiny, config, after_epoch=lambda game: generators.append(copy.deepcopy(game.generator.state_dict())))
    weights = [{k: v for k, v in state.items() if "running" not in k and "num_" not in k} for state in generators]
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]
    assert moved == [True, False, False] and result.history.generator_loss.notna().all()


def test_paper_presets():
    assert QATConfig.paper("cifar10", "resnet20_cifar10", 3).milestones == (100, 200, 300)
    assert QATConfig.paper("folder:/a/cifar100", "resnet32", 3).batch_size == 200  # as the folder is called
    assert QATConfig.paper("folder:/a/photos", "mine", 3, image_size=32).temperature == 20  # by size: CIFAR's kind
    assert QATConfig.paper("folder:/a/photos", "mine", 3, image_size=224).temperature == 5
    r50 = QATConfig.paper("imagenet", "resnet50", 4)
    assert (r50.alpha_ds, r50.lambda_l, r50.milestones, r50.warmup_epochs) == (0.1, 0.3, (200, 300, 400), 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epochs=0), "epochs"), (dict(warmup_epochs=3), "warmup_epochs must be at most epochs, 2"),
        (dict(weight_bits=9), "weight_bits"), (dict(image_size=30), "image_size"), (dict(seed=-1), "seed"),
        (dict(scheme="nope"), "unknown scheme 'nope'"), (dict(recipe="layers"), "recipe"),
        (dict(student_lr=math.nan), "student_lr"), (dict(bf16=1), "bf16"), (dict(epoch=3), "epoch"),
        (dict(refined_images=8), "refined_images is for"),
        (dict(recipe="match", refined_images=6), "multiple of batch_size, 4"),
        (dict(image_bits=6), "image_bits needs a scheme"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TINY.change(**change)


def test_settings_survive_json():
    for config in (TINY, MATCH, TINY.change(scheme=Scheme(weights="per_kernel", activations=None, skip=("4",)))):
        assert QATConfig.model_validate_json(config.model_dump_json()) == config


# ---- bfloat16


@pytest.mark.parametrize("scheme", ["granq", "layerwise", "foldable"])  # unclamped, one range, folded
def test_bf16_leaves_weights_ranges_and_losses_in_float32(tiny, scheme):
    losses, seen = {}, []
    for bf16 in (False, True):
        game = begin(tiny, TINY.change(scheme=scheme, bf16=bf16, student_lr=1e-3, batch_size=32))
        game.student.fc.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        losses[bf16] = game.run_epoch(None) | game.run_epoch(lambda student: float(student(IMAGES).detach().mean()))
        state = game.student.state_dict() | game.generator.state_dict()
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
    assert seen.count(torch.bfloat16) == 4  # the steps; what is measured between and after them is not
    for loss in ("generator_loss", "bn_loss"):
        assert losses[True][loss] != losses[False][loss]
        assert losses[True][loss] == pytest.approx(losses[False][loss], rel=0.1)


def test_bf16_finds_ranges_in_float32():
    x = torch.full((2, 4, 4, 4), 2.5, dtype=torch.bfloat16)  # constant channels
    x[0, 0] = torch.linspace(0, 1, 16).view(4, 4)
    place = ActQuantizer(3, SCHEMES["granq"], rows=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = place(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, fake_quantize(x.float(), 3, clamp=False).bfloat16())


# ---- what a run can start from


def test_an_image_that_no_layer_reads_has_no_bits_of_its_own():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(2 * x)

    with pytest.raises(ValueError, match="image is not quantized"):
        train(Doubled(*tiny_network()), TINY.change(scheme="foldable", image_bits=6))


def test_a_run_starts_from_the_generator_of_another(tmp_path):
    network, measured = tiny_network(), []

    def evaluate(student):
        measured.append(student(torch.full((1, 3, 8, 8), 100.0)))  # far outside: it would move ranges that still move
        return float(len(measured))

    warm = TINY.change(recipe="gdfq", epochs=2, warmup_epochs=2)
    assert len(train(network, warm, out=tmp_path / "warm", evaluate=evaluate).history) == 2 and len(measured) == 1
    generator = load_generator(tmp_path / "warm")
    for scheme in ("layerwise", "granq"):
        recipe = "match" if scheme == "granq" else "adadfq"
        config = TINY.change(scheme=scheme, epochs=1, warmup_epochs=0, recipe=recipe)
        result = train(network, config, generator=generator, evaluate=evaluate, out=tmp_path / scheme)
        assert result.ptq_top1 == len(measured) - 1 and result.last_top1 == len(measured)
        moved = (result.student.get_submodule("1").running_mean - network[1].running_mean).abs().max() > 0
        assert moved == (scheme == "granq")
        for place in activation_places(result.student).values():
            assert not place.tracked or place.running_max.max() < 50
    assert same_bits(generator, load_generator(tmp_path / "warm"))  # the run trained a copy
    with pytest.raises(ValueError, match="another teacher or other settings"):  # another generator is another run
        train(network, config, out=tmp_path / "granq", resume=True)
    with pytest.raises(ValueError, match="holds no run"):
        load_generator(tmp_path / "nothing")


class Blobs(nn.Module):
    """Any module (noise, labels) -> images is a generator; this one knows nothing of classes or sizes."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(100, 3 * 64), nn.BatchNorm2d(3, affine=False)

    def forward(self, noise, labels):
        return self.norm(self.linear(noise).view(-1, 3, 8, 8))


@pytest.mark.parametrize("config", [TINY, MATCH], ids=["adadfq", "match"])
def test_a_generator_of_ones_own(tmp_path, config):
    network, own = tiny_network(), Blobs()
    before = [p.detach().clone() for p in own.parameters()]
    result = train(network, config, generator=own, out=tmp_path)
    assert isinstance(result.generator, Blobs) and all(map(torch.equal, before, own.parameters()))
    assert not any(map(torch.equal, before, result.generator.parameters()))
    again = train(network, config, generator=own, out=tmp_path, resume=True)
    assert same_bits(again.student, result.student) and again.history.equals(result.history)


@pytest.mark.parametrize("config", [TINY, MATCH], ids=["adadfq", "match"])
def test_a_frozen_generator_only_draws(config):
    network, own = tiny_network(), Blobs().requires_grad_(False)
    result = train(network, config, generator=own)
    assert all(map(torch.equal, own.parameters(), result.generator.parameters()))
    learned = next(iter(layer_quantizers(result.student).values())).original
    assert not torch.equal(learned, next(network.parameters()))


def test_a_generator_of_other_images_is_refused(tiny):
    wrong = {
        "draws 3 classes and .* 8, 8. .* wanted are 3 classes and 12 pixels": (12, build_generator(3, 8)),
        "draws 5 classes": (8, build_generator(5, 8)),
        "draws 2 classes": (8, build_generator(2, 8)),
        "wanted are 3 classes and 4 pixels": (4, Blobs()),
    }
    for message, (size, generator) in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(tiny, TINY.change(image_size=size), generator=generator)


def test_a_run_with_another_loss_is_another_run(tiny, tmp_path):
    def own(t, s, labels):
        return (t - s).square().mean()

    train(tiny, TINY, student_loss=own, out=tmp_path)
    with pytest.raises(ValueError, match="another teacher or other settings"):
        train(tiny, TINY, out=tmp_path, resume=True)
    train(tiny, TINY, student_loss=own, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="settings or images; epochs was 2; seed was 0$"):
        train(tiny, TINY.change(epochs=4, seed=1), student_loss=own, out=tmp_path, resume=True)


@pytest.mark.parametrize("recipe", ["adadfq", "gdfq"])
def test_a_student_s_loss_of_ones_own(tiny, recipe):
    config, seen = TINY.change(recipe=recipe), []
    theirs = {
        "adadfq": lambda t, s, labels: student_loss(t, s, config.temperature),
        "gdfq": gdfq_student_loss,
    }[recipe]

    def own(t, s, labels):
        seen.append((t.shape, s.shape, labels.shape, t.requires_grad))
        return theirs(t, s, labels)

    assert same_bits(train(tiny, config, student_loss=own).student, train(tiny, config).student)
    assert set(seen) == {((4, 3), (4, 3), (4,), False)}
    zero = train(tiny, config, student_loss=lambda t, s, labels: 0 * s.sum()).history
    assert zero.student_loss.tolist() == [0, 0]


def test_a_scheme_of_ones_own(tmp_path):
    scheme = Scheme(weights="per_kernel", activations="per_sample", skip=("4",))
    config = TINY.change(scheme=scheme, epochs=1, warmup_epochs=0)
    result = train(tiny_network(), config, out=tmp_path)
    assert weight_quantizer(result.student.get_submodule("4")) is None
    saved = json.dumps(json.loads((tmp_path / "config.json").read_text())["config"])
    assert QATConfig.model_validate_json(saved) == config


def test_diversity_by_hand():
    noise, one = torch.randn(64, 3, 8, 8), torch.randn(1, 3, 8, 8)
    assert qat.diversity(noise).item() == pytest.approx(1 - 1 / 64, abs=0.03)
    assert qat.diversity(one.expand(64, -1, -1, -1)).item() == pytest.approx(0, abs=1e-6)
    assert qat.diversity(one).isnan()  # which no run takes for a collapse
    two = torch.zeros(2, 1, 1, 2)
    two[0, 0, 0] = torch.tensor([1.0, 3.0])  # pixel variances 1/4 and 9/4, mean 5/4; all four values: mean 1, var 1.5
    assert qat.diversity(two).item() == pytest.approx(1.25 / 1.5)


def ends_in_training_mode(student: nn.Module) -> float:
    student.eval()
    student.train()
    return 0.0


def measures_in_training_mode(student: nn.Module) -> float:
    student.train()
    with torch.no_grad():
        student(5 + IMAGES)  # moves BatchNorm's statistics
    return 0.0


@pytest.mark.parametrize("evaluate", [ends_in_training_mode, measures_in_training_mode])
@pytest.mark.parametrize("recipe", ["adadfq", "match"])
def test_an_evaluation_only_measures(tiny, evaluate, recipe):
    config = (MATCH if recipe == "match" else TINY).change(epochs=3)
    plain, watched = train(tiny, config), train(tiny, config, evaluate=evaluate)
    assert same_bits(plain.student, watched.student) and not any(m.training for m in watched.student.modules())
    assert watched.last_top1 == 0


def test_who_looks_at_a_run_after_an_epoch_does_not_change_its_modes(tiny):
    config = TINY.change(epochs=3)
    looked = train(tiny, config, after_epoch=lambda game: [net.train() for net in (game.student, game.teacher)])
    assert same_bits(train(tiny, config).student, looked.student)


def test_a_teacher_of_one_logit_has_nothing_to_teach():
    one = nn.Sequential(*list(tiny_network())[:-1], nn.Linear(144, 1)).eval()
    with pytest.raises(ValueError, match="two classes or more"):
        train(one, TINY)


def test_whoever_draws_after_an_epoch_changes_nothing(tiny):
    config = QATConfig(epochs=2, iterations=1, batch_size=4, warmup_epochs=1, image_size=8)
    quiet, drawn = (train(tiny, config, after_epoch=f).history for f in (None, lambda game: torch.randn(3)))
    pd.testing.assert_frame_equal(quiet, drawn)


def test_match_of_activations_only(tiny):
    """Their dynamic ranges have no step to learn."""
    scheme = Scheme(weights=None, activations="per_sample_channel")
    config = QATConfig(
        recipe="match", scheme=scheme, epochs=1, iterations=1, batch_size=4, warmup_epochs=0, image_size=8
    )
    assert len(train(tiny, config).history) == 1
