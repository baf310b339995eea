"""Timings: what is timed computes the same as the library, rows are complete, counts are right. No clock decides."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from granq.config import QATConfig
from granq.generator import batchnorm_loss, build_generator, synthesize
from granq.measure import latency
from granq.qat import AdaDFQ, Game
from granq.quantizer import fake_quantize

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch) -> None:
    """The scripts, which are not part of the package, can be imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def as_committed(frame: pd.DataFrame, name: str) -> None:
    assert set(pd.read_csv(BENCHMARKS / f"results/{name}.csv").columns) <= set(frame.columns)


def test_the_timed_methods_compute_the_same():
    x = torch.randn(3, 5, 6, 7)
    expected = fake_quantize(x, 3, clamp=False)
    assert torch.equal(latency.METHODS["channel loop"](x, 3), expected) and torch.equal(
        latency.METHODS["granq"](x, 3), expected
    )
    torch.testing.assert_close(latency.textbook_chain(x, 3), expected)


def test_textbook_gradient_is_one():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(latency.textbook_chain(x, 8).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_one_row_per_method_and_shape():
    frame = latency.measure_latency_quantizer([(2, 3, 4, 4), (1, 2, 4, 4)], repetitions=2)
    assert len(frame) == 2 * len(latency.METHODS) and (frame.median_ms > 0).all()
    assert (frame.ratio_to_copy[frame.method == "copy"] == 1).all()
    assert set(pd.read_csv(BENCHMARKS.parent / "figures/quantizer_latency.csv").columns) == set(frame.columns)


def test_scaling_rows_and_memory(capfd):
    """A row for each execution and shape; the grouped one holds every partial sum twice (int32, then rescaled)."""
    frame = latency.measure_latency_scaling((2, 4), (1, 2), fixed=(2, 2), size=8, repetitions=3)
    assert len(frame) == 6 * 3 and (frame.q25_ms <= frame.median_ms).all() and (frame.median_ms <= frame.q75_ms).all()
    grouped = frame[(frame.execution == "accumulation-time, grouped") & (frame.channels == 4)].iloc[0]
    partial_bytes = 2 * 4 * 4 * 8 * 8 * 4
    assert 2 * partial_bytes <= grouped.peak_mb * 1e6 < 3.5 * partial_bytes
    assert (frame.scale_multiplications[frame.execution == "folded"] == 0).all()
    assert set(pd.read_csv(BENCHMARKS.parent / "figures/scaling_latency.csv").columns) == set(frame.columns)
    assert not capfd.readouterr().out


def test_peak_memory_is_that_of_the_largest_moment():
    def two_at_once_then_one():
        first = torch.empty(1000, 250)  # 1 MB
        second = first.clone()
        del first, second
        return torch.empty(1000, 250)

    assert abs(latency.peak_mb(two_at_once_then_one) - 2) < 0.01


def test_plain_and_fast_steps_agree_on_the_first_losses(benchmarks):
    """Same seed and teacher; the plain generator is another one, so it gets the fast one's weights."""
    from step import PlainGame

    torch.manual_seed(1)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    config = QATConfig(batch_size=8, image_size=8, device="cpu")
    plain, ours = PlainGame(teacher, config), Game(teacher, config, AdaDFQ(config))
    plain.generator.load_state_dict(ours.generator.state_dict())
    losses = []
    for game in (plain, ours):
        torch.manual_seed(2)
        losses.append(game.play(True))
    for name in ("generator_loss", "student_loss"):
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-3, atol=1e-3)


def test_batchnorm_loss_and_its_gradient_are_those_of_the_plain_formula(benchmarks):
    from step import plain_batchnorm_loss

    norm = nn.BatchNorm2d(5).eval()
    norm.running_mean.normal_()
    gradients = []
    for loss in (batchnorm_loss, plain_batchnorm_loss):
        x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        gradients.append(torch.autograd.grad(loss([(norm.double(), x)]), x)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("has", [True, False])
def test_step_rows(tiny, monkeypatch, benchmarks, has):
    import step

    monkeypatch.setattr(step, "has_bfloat16", lambda device: has)
    frame = step.measure_latency_step(tiny, (4,), image_size=8, repetitions=2)
    assert list(frame.method) == ["plain", "granq", *["granq bf16"] * has]
    assert frame.speedup[0] == 1 and (frame.median_ms > 0).all()
    as_committed(frame, "step_latency")


def test_analysis_rows(benchmarks):
    from analysis import measure_latency_analysis

    frame = measure_latency_analysis("resnet20_cifar10", 2, batch=2, image_size=32, repetitions=1)
    assert list(frame.method) == ["forwards", "layer_error"] and frame.ratio_to_forwards[0] == 1
    as_committed(frame, "analysis_latency")


def test_cost_of_known_layers(tiny, benchmarks):
    """conv1 of tiny by hand, shares that add up, and operations linear in images and quadratic in the side."""
    from cost import measure_latency_cost

    frame = measure_latency_cost(tiny, 8, image_size=16, repetitions=1)
    conv = next(m for m in tiny.modules() if isinstance(m, nn.Conv2d))
    row = frame[frame.kind == "Conv2d"].iloc[0]
    outputs = 8 * conv.out_channels * 16 * 16 // conv.stride[0] ** 2
    assert row.operations == 2 * outputs * conv.weight[0].numel()
    # the weight: 3 passes of its quantizer, and the convolution's
    assert row.bytes == 4 * (8 * 3 * 16 * 16 + 4 * conv.weight.numel() + outputs)
    assert frame.groupby("part")[["predicted_share", "measured_share"]].sum().to_numpy() == pytest.approx(1)
    assert list(frame[frame.part == "step"].name) == ["generator", "teacher", "student", "whole step"]
    whole = frame[frame.kind == "network"]
    for against, other, power in (("batch", "size", 1), ("size", "batch", 2)):
        line = whole[whole[other] == whole[other].mode()[0]]
        slope = np.polyfit(np.log(line[against]), np.log(line.operations), 1)[0]
        assert slope == pytest.approx(power, abs=0.05)
    as_committed(frame, "cost_model")


def test_images_under_autocast_change_little_and_are_float32():
    generator, images = build_generator(4, 8), {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images[bf16] = synthesize(generator, 16)[0]
    assert images[True].dtype == torch.float32 and not torch.equal(images[True], images[False])
    assert (images[True] - images[False]).abs().mean() < 0.05  # they have a standard deviation of one
