"""Timings: what is timed computes the same as the library, rows are complete, counts are right. No clock decides."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from granq import losses
from granq.config import QATConfig
from granq.convert import calibrate, quantize_model
from granq.data import DataSpec, batches, describe_data, load_split
from granq.errors import UserError
from granq.generator import batchnorm_loss, build_generator, synthesize
from granq.measure import latency
from granq.models import load_teacher
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


@pytest.mark.parametrize("bits", [3, 8])
def test_scaling_rows_and_memory(capfd, bits):
    """A row for each execution and shape; the grouped one holds every partial sum twice (int32, then rescaled)."""
    frame = latency.measure_latency_scaling((2, 4), (1, 2), fixed=(2, 2), size=8, bits=bits, repetitions=3)
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


class Called(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["granq", "layerwise", "foldable"])
def test_a_forward_needs_nothing_from_python_that_a_gpu_would_wait_for(tiny, scheme):
    """No tensor is made of a number of Python (its copy waits), and none becomes a number."""
    student, images = quantize_model(tiny, scheme, 3, 3), torch.randn(2, 3, 8, 8)
    calibrate(student, [images])
    with Called() as called:
        losses.student_loss(tiny(images), student(images), 20.0).backward()
    assert "convolution" in called.names
    assert not {"lift_fresh", "_local_scalar_dense"} & {*called.names}


def test_quantizers_compared_compute_the_same(benchmarks, capsys):
    """Where zero is in every range. Not the plain copy, nor one scale a channel for all images."""
    import quantizers

    x = torch.randn(3, 5, 6, 7).relu().requires_grad_()
    found = quantizers.methods()
    assert ("torchao affine" in found) != ("torchao is not installed" in capsys.readouterr().out)
    expected, other = fake_quantize(x, 3).detach(), fake_quantize(x, 3, "per_channel").detach()
    for name, method in found.items():
        if name == "granq, compiled":  # tests/test_quantizer.py; it takes time
            continue
        value = method(x, 3)
        assert torch.equal(torch.autograd.grad(value.sum(), x)[0].round(decimals=5), torch.ones_like(x)), name
        right = {"copy": x.detach(), "torch observer, per channel": other}.get(name, expected)
        torch.testing.assert_close(value.detach(), right, msg=lambda text, name=name: f"{name}: {text}")


def test_quantizer_rows(benchmarks, monkeypatch):
    import quantizers

    few = {name: quantizers.METHODS[name] for name in ("granq", "copy")}
    monkeypatch.setattr(quantizers, "methods", lambda: few | {"loop for scales": quantizers.loop_for_scales})
    frame = quantizers.measure_latency_quantizers([(2, 3, 4, 4), (1, 2, 4, 4)], repetitions=2)
    assert len(frame) == 6 and (frame.median_ms > 0).all()
    assert (frame.ratio_to_granq_q25 <= frame.ratio_to_granq_q75).all()
    assert (frame.ratio_to_granq[frame.method == "granq"] == 1).all()


def test_time_to_accuracy(benchmarks, tiny, monkeypatch):
    """The time of a row is the time of training: a slow measurement of the accuracy does not count."""
    import time_to_accuracy as bench

    tops, clock, late = iter([40.0, 50.0, 60.0] * 2), time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(late))
    monkeypatch.setattr(bench, "top1_on", lambda *_: late.append(1) or next(tops))
    config = QATConfig(epochs=3, warmup_epochs=1, iterations=2, batch_size=4, image_size=8, device="cpu")
    spec = DataSpec(name="folder", classes=3, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    settings = {"granq": config, "strict": config.change(scheme="strict", recipe="match", refined_images=8)}
    frame = bench.measure_time_to_accuracy(tiny, spec, range(7), 50.0, settings)
    assert list(frame.method) == ["granq"] * 3 + ["strict"] * 3 and list(frame.test_top1) == [40, 50, 60] * 2
    second = frame[frame.epoch == 2].set_index("method").seconds
    assert frame.reached_seconds.to_list() == [second["granq"]] * 3 + [second["strict"]] * 3
    assert len(late) == 6 and frame.seconds.between(0, 500).all()
    lines = bench.plot_time_to_accuracy(frame).get_lines()
    assert lines[0].get_ydata().tolist() == [40, 50, 60]
    assert lines[1].get_xdata() == pytest.approx(frame.seconds[3:] / 60)


def test_evaluation_rows(benchmarks, monkeypatch):
    import evaluation

    monkeypatch.setattr(torch, "compile", lambda network: network)  # a minute of it
    frame = evaluation.measure_latency_evaluation(repetitions=2, batch=2).set_index("method")
    assert len(frame) == 6 and (frame.ratio_to_full_precision[frame.index.str.startswith("full")] == 1).all()
    assert (frame.ratio_to_default[["full precision", "quantized"]] == 1).all()
    as_committed(frame.reset_index(), "evaluation_latency")


def test_a_whole_command_is_a_row(benchmarks, monkeypatch, tmp_path):
    import good_student as bench

    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup/config.json").write_text('{"config": {"epochs": 2, "iterations": 300}}')
    said = SimpleNamespace(stdout=json.dumps({"scheme": "strict", "last_top1": 90.7, "out": str(tmp_path)}))
    asked = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: asked.append(command) or said)
    for _ in range(2):
        frame = bench.main(tmp_path / "table.csv", ["--seed", "1"])
    assert frame[["scheme", "last_top1", "generator_iterations"]].to_numpy().tolist() == [["strict", 90.7, 600]] * 2
    assert asked[0][-4:] == ["quantize", "--seed", "1", "--json"]
    as_committed(frame, "good_student")


def test_gpu_parts_run_without_a_gpu(benchmarks, tmp_path, capsys, monkeypatch):
    """Tiny, on the CPU: their tables and the page that shows them."""
    import gpu

    few = {name: latency.METHODS[name] for name in ("granq", "copy")}
    monkeypatch.setattr("quantizers.methods", lambda: few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(out=tmp_path / "none") == 0 and "nothing was run" in capsys.readouterr().out
    for part in ("quantizer", "step", "run"):
        assert gpu.main(part, out=tmp_path, seconds=60, dry=True) == 0
    run = pd.read_csv(tmp_path / "cuda_run.csv")
    assert list(run.epoch) == [1, 2, 3] and run.test_top1.between(0, 100).all()
    assert {"full_precision_top1", "test_images", "torch", "device", "commit", "seed"} <= {*run.columns}
    page = gpu.page(tmp_path)
    assert page.count("Nothing was measured.") == 1  # the parts, which main("all") writes
    for title in gpu.TITLES.values():
        assert f"## {title}" in page
    assert f"{run.seconds.iloc[-1]:.3f}".rstrip("0") in page


def test_a_part_that_fails_or_hangs_leaves_the_others(benchmarks, tmp_path, monkeypatch):
    import gpu

    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\npart = sys.argv[1]\nassert sys.argv[2:4] == ['--out', sys.argv[3]]\n"
        "time.sleep(60 * (part == 'step'))\nsys.exit(3 * (part == 'quantizer'))\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "LIMITS", {"tests": 30, "quantizer": 30, "step": 1, "run": 30})
    table = gpu.execute(tmp_path, dry=True, limit=100, parts=list(gpu.LIMITS))
    assert list(table.result) == ["done", "exit code 3", "stopped after 1 s", "done"]
    assert (tmp_path / "cuda.md").read_text() == gpu.page(tmp_path)
    assert list(pd.read_csv(tmp_path / "cuda_parts.csv").part) == list(gpu.LIMITS)


def test_a_gpu_run_ends_in_time(benchmarks, tmp_path, capsys):
    import gpu

    frame = gpu.run("cpu", True, tmp_path, seconds=0.0)
    assert list(frame.epoch) == [1]  # begun too late: one epoch, measured


def test_a_bundle_holds_teacher_and_images(benchmarks, folder, teacher, tmp_path, monkeypatch, capsys):
    """Also a network of one's own file; the images and the teacher's answers are the same from there."""
    import gpu
    import gpu_bundle

    file = tmp_path / "mine.py"
    file.write_text(
        "from granq.models import build_network\n\n\ndef net(num_classes):\n"
        "    return build_network('resnet20_cifar10', num_classes)\n"
    )
    out = tmp_path / "bundle"
    gpu_bundle.main(f"{file}:net", teacher, folder, out=out, image_size=32, wheels=False)
    file.unlink()
    monkeypatch.setattr(gpu, "BUNDLE", out)
    model, spec, test = gpu.teacher_and_test(dry=False)
    expected, described = load_teacher("resnet20_cifar10", describe_data(folder, "resnet20_cifar10"), teacher)
    images = load_split(described, "test")
    assert (spec.mean, spec.classes) == (described.mean, 2)
    for (x, y), (z, w) in zip(batches(test, spec), batches(images, described), strict=True):
        assert torch.equal(x, z) and torch.equal(y, w) and torch.equal(model(x), expected(z))
    monkeypatch.setattr(gpu, "BUNDLE", tmp_path / "nowhere")
    with pytest.raises(UserError, match="make gpu-bundle"):
        gpu.teacher_and_test(dry=False)


def test_analysis_rows(benchmarks, tmp_path):
    from analysis import measure_latency_analysis

    (tmp_path / "net.py").write_text("from conftest import TinyNet\n\n\ndef make(): return TinyNet(1000)\n")
    frame = measure_latency_analysis(f"{tmp_path / 'net.py'}:make", 2, batch=2, image_size=8, repetitions=1)
    assert list(frame.method) == ["forward", "layer_error", "sensitivity", "report"] and frame.ratio_to_forwards[0] == 1
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
