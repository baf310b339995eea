"""Losses by hand, one step, reproducibility, and every command on tiny data."""

import copy
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from granq import QATConfig, checks, describe_data, load_split, load_teacher, train
from granq.cli import main
from granq.convert import SCHEMES, ActQuantizer, LearnedSteps, Scheme, activation_places
from granq.data import pixel_bounds
from granq.generator import (
    batchnorm_inputs,
    batchnorm_loss,
    build_generator,
    random_shapes,
    refine,
    synthesize,
    upsample_conv,
    upsample_conv_plain,
    vary,
)
from granq.losses import agreement_loss, disagreement_loss, entropy, layer_loss, margin_loss, student_loss
from granq.qat import NORM_RATE, STEP_RATE, Trainer
from granq.quantizer import fake_quantize
from granq.runs import load_generator, load_run

T = torch.tensor([[2.0, 0, -1], [0.5, 0.5, 0]])
S = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
Y = torch.tensor([0, 1])
IMAGES = torch.linspace(-2, 2, 4 * 3 * 64).view(4, 3, 8, 8)
TINY = QATConfig(epochs=2, warmup_epochs=1, iterations=2, batch_size=4, image_size=8, device="cpu", student_lr=0.1)


def test_losses_of_the_worked_example():
    assert disagreement_loss(T, S, Y).item() == pytest.approx(1.043938, abs=1e-6)
    assert agreement_loss(T, S, Y).item() == pytest.approx(0.265126, abs=1e-6)
    assert entropy(T - S).tolist() == pytest.approx([0.832396, 1.020191], abs=1e-6)
    assert margin_loss(T, S, 0.1, 0.8).item() == pytest.approx(0.05, abs=1e-6)
    assert student_loss(T, S, 20.0).item() == pytest.approx(-439.236694, abs=1e-3)


def test_batchnorm_loss_by_hand():
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(2.0)
    with batchnorm_inputs(norm) as seen:
        norm(torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2))  # mean 2, biased variance 4
    assert batchnorm_loss(seen).item() == pytest.approx(1 + 4)


@pytest.mark.parametrize("size", [32, 128])
def test_both_generators_draw_standardized_images(size):
    images, labels = synthesize(build_generator(5, size), 4)
    assert images.shape == (4, 3, size, size) and int(labels.max()) < 5
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 1)])
def test_upsampling_convolution_equals_its_plain_form(shape, bias):
    conv = torch.nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = upsample_conv_plain(x, conv), upsample_conv(x, conv)
    torch.testing.assert_close(*outputs)
    target = torch.randn_like(outputs[0])
    plain, fast = (torch.autograd.grad((y * target).sum(), (x, *conv.parameters())) for y in outputs)
    torch.testing.assert_close(plain, fast)


@pytest.mark.parametrize("recipe", ["adadfq", "gdfq"])
def test_one_step_changes_what_it_should(tiny, recipe):
    trainer = Trainer(tiny, QATConfig(**(vars(TINY) | {"recipe": recipe})))

    def snapshot(module):
        return [p.detach().clone() for p in module.parameters()]

    before = {n: snapshot(getattr(trainer, n)) for n in ("teacher", "student", "generator")}
    stats = [b.clone() for b in trainer.student.buffers()]
    trainer.step(train_student=False)
    changed = {
        n: any(not torch.equal(a, b) for a, b in zip(before[n], snapshot(getattr(trainer, n)), strict=True))
        for n in before
    }
    assert changed == {"teacher": False, "student": False, "generator": True}
    trainer.step(train_student=True)
    after = snapshot(trainer.student)
    assert all(not torch.equal(a, b) for a, b in zip(before["student"], after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before["teacher"], snapshot(trainer.teacher), strict=True))
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(stats, trainer.student.buffers(), strict=True))  # BatchNorm frozen


def test_one_forward_of_each_network_per_step(tiny):
    trainer = Trainer(tiny, TINY)
    calls = []
    trainer.student.conv1.register_forward_hook(lambda *_: calls.append("student"))
    trainer.teacher.conv1.register_forward_hook(lambda *_: calls.append("teacher"))
    trainer.step(train_student=True)
    assert sorted(calls) == ["student", "teacher"]


@pytest.mark.parametrize("scheme", ["release", "layerwise"])
def test_same_seed_same_bits(tiny, scheme, tmp_path):
    config = QATConfig(**(vars(TINY) | {"scheme": scheme}))
    first, second = train(tiny, config), train(tiny, config)
    for a, b in zip(first.student.state_dict().values(), second.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = train(tiny, QATConfig(**(vars(config) | {"seed": 1})))
    assert not torch.equal(first.student.fc.weight, other.student.fc.weight)


LAYERS = replace(
    TINY,
    scheme="foldable",
    recipe="layers",
    range_quantile=0.99,
    reestimate_batchnorm=True,
    learned_steps=True,
    refined_images=8,
    random_shapes=True,
)


def test_refined_images_are_nearer_to_the_statistics(tiny):
    images, labels = synthesize(build_generator(3, 8), 8)
    before = images.clone()

    def distance(x):
        with batchnorm_inputs(tiny) as norms, torch.no_grad():
            tiny(x)
        return batchnorm_loss(norms).item()

    refined = refine(tiny, images, labels)
    assert torch.equal(images, before) and not refined.requires_grad
    assert distance(refined) < 0.7 * distance(images)
    assert all(p.grad is None for p in tiny.parameters())


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
    with pytest.raises(ValueError, match="at least 1"):
        random_shapes(0, 32)


def test_every_other_batch_of_refined_images_is_made_of_shapes(tiny):
    plain, mixed = (Trainer(tiny, replace(LAYERS, random_shapes=shapes)) for shapes in (False, True))
    for trainer in (plain, mixed):
        trainer._refine_images()
    assert len(plain.refined) == len(mixed.refined) == 8
    assert torch.equal(plain.refined[:4], mixed.refined[:4]) and not torch.equal(plain.refined[4:], mixed.refined[4:])
    with pytest.raises(ValueError, match="refined_images above 0"):
        replace(LAYERS, refined_images=0)


def test_layer_loss_by_hand():
    teacher, student = torch.tensor([1.0, -1, 3, -3]).view(4, 1, 1, 1), torch.tensor([1.0, -2, 7, 1]).view(4, 1, 1, 1)
    # squares 0, 1, 16, 16; behind a ReLU 0, 0, 16, 1; behind a ReLU6 0, 0, 9, 1
    for ceiling, squares, variance in ((None, 33, 5), (math.inf, 17, 1.5), (6.0, 10, 1.5)):
        assert layer_loss([teacher], [student], [ceiling]).item() == pytest.approx(squares / 4 / variance)
    both = layer_loss([teacher] * 2, [student] * 2, [None, 6.0]).item()
    assert both == pytest.approx((33 / 4 / 5 + 10 / 4 / 1.5) / 2)


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
    torch.manual_seed(0)
    plain = Residual(False)
    for norm in (plain.bn1, plain.bn2, plain.bn3):
        nn.init.normal_(norm.bias)
        nn.init.constant_(norm.weight, 3.0)  # some values above 6
    losses = []
    for inplace in (False, True):
        teacher = Residual(inplace)
        teacher.load_state_dict(plain.state_dict())
        trainer = Trainer(teacher, replace(LAYERS, warmup_epochs=0, epochs=1))
        assert trainer.relu_ceilings == [math.inf, None, 6.0]
        losses.append([trainer.run_epoch(None)["student_loss"], *trainer.student.conv1.parameters()])
    assert losses[0][0] == losses[1][0] > 0 and torch.equal(losses[0][1], losses[1][1])


def test_recipe_layers_follows_the_teacher_and_leaves_the_generator(tiny):
    config = replace(LAYERS, warmup_epochs=1, epochs=4, iterations=20, student_lr=3e-3)
    trainer = Trainer(tiny, config)
    trainer.run_epoch(None)
    drawn = copy.deepcopy(list(trainer.generator.parameters()))
    steps = [m.log_step.detach().clone() for m in trainer.student.modules() if isinstance(m, LearnedSteps)]
    losses = [trainer.run_epoch(None)["student_loss"] for _ in range(3)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(map(torch.equal, drawn, trainer.generator.parameters()))
    moved = [m.log_step for m in trainer.student.modules() if isinstance(m, LearnedSteps)]
    assert len(moved) == 7 and not any(map(torch.equal, steps, moved))  # four layers, two of which share their input
    rates = [group["lr"] for group in trainer.optimizers["student"].param_groups]
    # the end of the cosine; weights, BatchNorm, learned steps
    assert 0 < rates[0] < 1e-4 and rates == pytest.approx([rates[0], NORM_RATE * rates[0], STEP_RATE * rates[0]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_leaves_weights_ranges_and_losses_in_float32(tiny, scheme):
    losses, seen = {}, []
    for bf16 in (False, True):
        trainer = Trainer(tiny, replace(TINY, scheme=scheme, bf16=bf16, student_lr=1e-3, batch_size=32))
        trainer.student.fc.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        losses[bf16] = trainer.run_epoch(None) | trainer.run_epoch(
            lambda student: float(student(IMAGES).detach().mean())
        )
        state = trainer.student.state_dict() | trainer.generator.state_dict()
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
    assert seen.count(torch.bfloat16) == 4  # the steps; what is measured between and behind them is not
    for loss in ("generator_loss", "bn_loss"):
        assert losses[True][loss] != losses[False][loss]
        assert losses[True][loss] == pytest.approx(losses[False][loss], rel=0.1)


def test_bf16_is_warned_of_where_it_costs_time(tiny, monkeypatch):
    monkeypatch.setattr(checks, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="without bf16 it will be faster"):
        Trainer(tiny, replace(TINY, bf16=True))


def test_bf16_refines_images_as_float32_does(tiny):
    distance = {}
    for bf16 in (False, True):
        trainer = Trainer(tiny, replace(LAYERS, bf16=bf16, batch_size=32, refined_images=32))
        trainer._refine_images()
        with torch.no_grad(), batchnorm_inputs(trainer.teacher) as norms:
            trainer.teacher(trainer.refined)
        distance[bf16] = batchnorm_loss(norms).item()
    assert distance[True] == pytest.approx(distance[False], rel=0.01)


def test_bf16_finds_ranges_in_float32_even_where_the_release_does_not():
    x = torch.full((2, 4, 4, 4), 2.5, dtype=torch.bfloat16)  # constant channels
    x[0, 0] = torch.linspace(0, 1, 16).view(4, 4)
    place = ActQuantizer(3, SCHEMES["release"])
    with torch.autocast("cpu", torch.bfloat16):
        y = place(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, fake_quantize(x.float(), 3, clamp=False).bfloat16())


@pytest.mark.parametrize("config", [TINY, replace(TINY, bf16=True), LAYERS], ids=["adadfq", "bf16", "layers"])
def test_resume_equals_an_uninterrupted_run(tiny, tmp_path, config):
    class Stop(Exception):
        pass

    config = replace(config, epochs=3)

    def stop_at_third(_, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return 0.0

    whole = train(tiny, config, evaluate=lambda _: 0.0)
    with pytest.raises(Stop):
        train(tiny, config, evaluate=stop_at_third, out=tmp_path)
    resumed = train(tiny, config, evaluate=lambda _: 0.0, out=tmp_path, resume=True)
    assert whole.history.equals(resumed.history)
    for a, b in zip(whole.student.state_dict().values(), resumed.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_paper_presets():
    assert QATConfig.paper("cifar10", "resnet20_cifar10", 3).milestones == (100, 200, 300)
    r50 = QATConfig.paper("imagenet", "resnet50", 4)
    assert (r50.alpha_ds, r50.lambda_l, r50.milestones, r50.warmup_epochs) == (0.1, 0.3, (200, 300, 400), 50)


def quantize_args(folder, teacher, out):
    return (
        f"quantize --data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme layerwise --bits 3,3 "
        f"--out {out} --epochs 2 --warmup-epochs 1 --iterations 1 --batch-size 4 --device cpu --json"
    ).split()


def test_quantize_then_evaluate_without_training_images(folder, teacher, tmp_path, capsys):
    assert main(quantize_args(folder, teacher, tmp_path / "run")) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"teacher_top1", "ptq_top1", "last_top1", "best_top1", "torch", "device"} <= row.keys()
    assert main(["evaluate", str(tmp_path / "run"), "--data", folder, "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == row["last_top1"]
    assert main(quantize_args(folder, teacher, tmp_path / "run")) == 2  # nothing is overwritten
    assert "already holds files" in capsys.readouterr().err


def test_recipe_layers_from_the_command_to_integers(folder, teacher, tmp_path, capsys):
    args = quantize_args(folder, teacher, tmp_path / "run")
    args[args.index("layerwise")] = "foldable"
    args += ["--recipe", "layers", "--refined-images", "4"]
    assert main([*args, "--refined-images", "3"]) == 2 and "multiple of the batch size 4" in capsys.readouterr().err
    assert main([*args, "--preset", "paper"]) == 2 and "layers takes --epochs" in capsys.readouterr().err
    assert main(args) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["learned_steps"] and row["reestimate_batchnorm"] and row["range_quantile"] == 0.99
    assert main(["evaluate", str(tmp_path / "run"), "--data", folder, "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == row["last_top1"]
    assert main(["export", str(tmp_path / "run"), "--data", folder, "--out", str(tmp_path / "integers"), "--json"]) == 0
    assert row["image_bits"] == 0 and row["macs_low_bit"] == pytest.approx(100)
    wide = ["--image-bits", "6", "--out", str(tmp_path / "wide")]
    assert main(args + wide) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["image_bits"], row["pixel_range"]) == (6, 1.0) and 95 < row["macs_low_bit"] < 100
    student = load_run(tmp_path / "wide").student
    assert [place.bits for place in activation_places(student).values()][:2] == [6, 3]
    fixed = ["--no-learned-steps", "--pixel-range", "0.5", "--out", str(tmp_path / "fixed"), "--refined-images", "0"]
    assert main([*args[:-2], *fixed]) == 0
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["learned_steps"]
    place = next(iter(activation_places(load_run(tmp_path / "fixed").student).values()))
    low, high = pixel_bounds(describe_data(folder, "resnet20_cifar10"))
    torch.testing.assert_close(place.running_max - place.running_min, (high - low) / 2)


def test_an_image_that_no_layer_reads_has_no_range_of_its_own():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(2 * x)

    config, pixels = (
        replace(TINY, scheme="foldable", pixel_range=1.0),
        (-torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)),
    )
    with pytest.raises(ValueError, match="image is not quantized"):  # before the warm-up
        Trainer(Doubled(*tiny_network()), config, pixels=pixels)


def test_teacher_command_on_digits(tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    args = f"teacher --data digits --network resnet20_cifar10 --out {out} --epochs 4 --json --device cpu".split()
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["top1"] > 20
    assert main(args) == 2
    load_teacher("resnet20_cifar10", describe_data("digits"), out)
    assert len(load_split(describe_data("digits"), "test")) == 450


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "nope"), "known: digits"), (("--data", "folder:/nope"), "does not exist"),
        (("--network", "nope"), "known are pytorchcv"), (("--scheme", "nope"), "known: release"),
        (("--bits", "1,3"), "from 2 to 8"), (("--bits", "three"), "from 2"), (("--data", "digits"), "does not fit"),
        (("--teacher", "/nope.pt"), "does not exist"), (("--epochs", "0"), "at least 1"),
        (("--recipe", "nope"), "known: adadfq"), (("--image-size", "64"), "was trained at 32 pixels"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(folder, teacher, tmp_path, capsys, change, message):
    args = quantize_args(folder, teacher, tmp_path / "run") + list(change)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_corrupt_teacher(folder, tmp_path, capsys):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"garbage")
    assert main(quantize_args(folder, bad, tmp_path / "run")) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def test_a_run_starts_from_the_generator_of_another(tmp_path):
    network, measured = tiny_network(), []

    def evaluate(student):
        measured.append(student(torch.full((1, 3, 8, 8), 100.0)))  # far outside: it would move ranges that still move
        return float(len(measured))

    warm = replace(TINY, recipe="gdfq", epochs=2, warmup_epochs=2)
    assert len(train(network, warm, out=tmp_path / "warm", evaluate=evaluate).history) == 2 and len(measured) == 1
    generator = load_generator(tmp_path / "warm")
    for scheme in ("layerwise", "release"):
        config = replace(TINY, scheme=scheme, epochs=1, warmup_epochs=0, reestimate_batchnorm=scheme == "release")
        result = train(network, config, generator=generator, evaluate=evaluate, out=tmp_path / scheme)
        assert result.ptq_top1 == len(measured) - 1 and result.last_top1 == len(measured)
        assert (result.student.get_submodule("1").running_mean - network[1].running_mean).abs().max() > 0 or (
            scheme == "layerwise"
        )
        for place in activation_places(result.student).values():
            assert not place.tracked or place.running_max.max() < 50
    with pytest.raises(ValueError, match="no usable checkpoint"):  # another generator is another run
        train(network, config, out=tmp_path / "release", resume=True)
    with pytest.raises(ValueError, match="draws 3 classes at 8 pixels, but this run needs 3 classes at 16"):
        wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 3)).eval()
        train(wide, replace(config, image_size=16), generator=generator)
    with pytest.raises(ValueError, match="holds no run"):
        load_generator(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("demo --seeds 0", "--seeds must be at least 1"), ("demo --epochs 0", "--epochs must be at least 1"),
        ("sweep --jobs 0", "--jobs must be at least 1"), ("bench --repetitions 0", "--repetitions must be at least 1"),
        ("teacher --data digits --network resnet20_cifar10 --device foo", "unknown device 'foo'"),
        ("teacher --data digits --network resnet20_cifar10 --device cuda:99", "there is no device 'cuda:99' here"),
        ("sweep --data digits --network a a --schemes strict --bits 3,3", "names one network twice"),
        ("teacher --data digits --network resnet20_cifar10 --image-size 30", "must be a multiple of 4, got 30"),
        ("teacher --data digits --network resnet20_cifar10 --image-size -4", "must be a multiple of 4, got -4"),
        ("teacher --data digits --network resnet20_cifar10 --lr nan", "lr must be above 0 and finite"),
        ("teacher --data digits --network resnet18", "ResNet cannot take images of (1, 3, 32, 32)"),
        ("teacher --data digits --network resnet20_cifar10 --pretrained --resume", "--pretrained needs none"),
        ("audit --network resnet20_cifar10 --image-size -1", "--image-size must be at least 1"),
        ("audit --network resnet20_cifar10 --classes -3", "--classes must be at least 1"),
        ("quantize --data digits --network resnet20_cifar10 --scheme strict --bits 3,3 --recipe a", "known: adadfq"),
    ],
)  # fmt: skip
def test_numbers_and_devices_are_checked_first(command, message, tmp_path, capsys):
    assert main([*command.split(), "--out", str(tmp_path / "new.safetensors")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_threads_spin_as_long_as_the_user_says(monkeypatch):
    for given, wanted in ((None, "3000"), ("7", "7")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        main(["bench", "--repetitions", "0"])
        assert os.environ["GOMP_SPINCOUNT"] == wanted


def test_a_run_of_a_scheme_of_ones_own_is_read_again(tmp_path):
    scheme = Scheme("per_kernel", "per_sample", skip=("4",))
    config = replace(TINY, scheme=scheme, epochs=1, warmup_epochs=0)
    train(tiny_network(), config, out=tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["config"]
    assert QATConfig.from_dict(saved) == config
