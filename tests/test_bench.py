import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch import nn

from granq import QATConfig, bench, fake_quantize, measure_latency_quantizer
from granq.bench import (
    METHODS,
    PlainTrainer,
    _peak_mb,
    channel_loop,
    growth,
    measure_latency_analysis,
    measure_latency_cost,
    measure_latency_scaling,
    measure_latency_step,
    plain_batchnorm_loss,
    textbook_chain,
)
from granq.generator import batchnorm_loss, build_generator, synthesize
from granq.qat import Trainer


def test_the_timed_methods_compute_the_same():
    x = torch.randn(3, 5, 6, 7)
    expected = fake_quantize(x, 3, clamp=False)
    assert torch.equal(channel_loop(x, 3), expected)
    torch.testing.assert_close(textbook_chain(x, 3), expected)


def test_plain_and_fast_steps_agree_on_the_first_losses():
    """Same seed and teacher; the plain generator is another one, so it gets the fast one's weights."""
    torch.manual_seed(1)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    config = QATConfig(batch_size=8, image_size=8, device="cpu")
    plain, ours = PlainTrainer(teacher, config), Trainer(teacher, config)
    plain.generator.load_state_dict(ours.generator.state_dict())
    losses = []
    for trainer in (plain, ours):
        torch.manual_seed(2)
        losses.append(trainer.step(True))
    for name in ("generator_loss", "student_loss"):
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-3, atol=1e-3)


def test_step_evaluation_and_analysis_rows(tiny, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(bench, "has_bfloat16", lambda device, has=has: has)
        frame = measure_latency_step(tiny, (4,), image_size=8, repetitions=2, compiled=False)
        assert list(frame.method) == ["plain", "granq", *["granq bf16"] * has]
        assert frame.speedup[0] == 1 and (frame.median_ms > 0).all()
    frame = measure_latency_analysis("resnet20_cifar10", 2, batch=2, image_size=32, repetitions=1)
    assert list(frame.method) == ["forwards", "layer_error"] and frame.ratio_to_forwards[0] == 1


def test_cost_of_known_layers(tiny):
    """conv1 of tiny by hand, shares that add up, and operations linear in images and quadratic in the side."""
    frame = measure_latency_cost(tiny, 8, image_size=16, repetitions=1)
    conv = next(m for m in tiny.modules() if isinstance(m, nn.Conv2d))
    row = frame[frame.kind == "Conv2d"].iloc[0]
    outputs = 8 * conv.out_channels * 16 * 16 // conv.stride[0] ** 2
    assert row.operations == 2 * outputs * conv.weight[0].numel()
    # the weight: 3 passes of its quantizer, and the convolution's
    assert row.bytes == 4 * (8 * 3 * 16 * 16 + 4 * conv.weight.numel() + outputs)
    assert frame.groupby("part")[["predicted_share", "measured_share"]].sum().to_numpy() == pytest.approx(1)
    assert list(frame[frame.part == "step"].name) == ["generator", "teacher", "student", "whole step"]
    slopes = growth(frame[frame.kind == "network"], ("operations",), ("batch", "size")).set_index("against")
    assert slopes.operations["batch"] == pytest.approx(1) and slopes.operations["size"] == pytest.approx(2, abs=0.05)


def test_help_and_import_load_no_torch():
    for code in ("import granq", "from granq.cli import build_parser; build_parser().format_help()"):
        check = f"{code}; import sys; assert not {{'torch', 'pandas', 'matplotlib'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", check], check=True)


def test_images_under_autocast_change_little_and_are_float32(tiny):
    generator, images = build_generator(4, 8), {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images[bf16] = synthesize(generator, 16)[0]
    assert images[True].dtype == torch.float32 and not torch.equal(images[True], images[False])
    assert (images[True] - images[False]).abs().mean() < 0.05  # they have a standard deviation of one


def test_growth_of_known_powers():
    shapes = [(c, 16) for c in (8, 16, 32)] + [(32, n) for n in (1, 4)]
    frame = pd.DataFrame(shapes, columns=["channels", "batch"]).assign(execution="e", scale_multiplications=0)
    frame["median_ms"] = frame.channels**2 * frame.batch * 0.3
    frame["bytes"] = frame.channels * frame.batch
    slopes = growth(frame).set_index("against")
    assert slopes.median_ms["channels"] == pytest.approx(2) and slopes.bytes["batch"] == pytest.approx(1)
    assert slopes.scale_multiplications.isna().all()


def test_textbook_gradient_is_one():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(textbook_chain(x, 8).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_one_row_per_method_and_shape():
    frame = measure_latency_quantizer([(2, 3, 4, 4), (1, 2, 4, 4)], repetitions=2)
    assert len(frame) == 2 * len(METHODS) and (frame.median_ms > 0).all()
    assert (frame.ratio_to_copy[frame.method == "copy"] == 1).all()


def test_scaling_rows_and_memory(capfd):
    """A row for each execution and shape; the grouped one holds every partial sum twice (int32, then rescaled)."""
    frame = measure_latency_scaling((2, 4), (1, 2), fixed=(2, 2), size=8, repetitions=3)
    assert len(frame) == 6 * 3 and (frame.q25_ms <= frame.median_ms).all() and (frame.median_ms <= frame.q75_ms).all()
    grouped = frame[(frame.execution == "accumulation-time, grouped") & (frame.channels == 4)].iloc[0]
    partial_bytes = 2 * 4 * 4 * 8 * 8 * 4
    assert 2 * partial_bytes <= grouped.peak_mb * 1e6 < 3.5 * partial_bytes
    assert (frame.scale_multiplications[frame.execution == "folded"] == 0).all()
    assert not capfd.readouterr().out


def test_peak_memory_is_that_of_the_largest_moment():
    def two_at_once_then_one():
        first = torch.empty(1000, 250)  # 1 MB
        second = first.clone()
        del first, second
        return torch.empty(1000, 250)

    assert abs(_peak_mb(two_at_once_then_one) - 2) < 0.01


def test_batchnorm_loss_and_its_gradient_are_those_of_the_plain_formula():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).eval()
    norm.running_mean.normal_()
    gradients = []
    for loss in (batchnorm_loss, plain_batchnorm_loss):
        x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        gradients.append(torch.autograd.grad(loss([(norm.double(), x)]), x)[0])
    torch.testing.assert_close(*gradients)
