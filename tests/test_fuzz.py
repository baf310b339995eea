"""Whatever is put in: an answer, or one clear error of ours; never a traceback from inside, never a hang.

``GRANQ_FUZZ=1000 pytest tests/test_fuzz.py`` tries so many cases a test instead of a few.
"""

import io
import json
import os
import re
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import granq
from granq import cli
from granq.runs import RunFolder

CASES = int(os.environ.get("GRANQ_FUZZ", 25))
fuzz = settings(
    max_examples=CASES, deadline=20_000, derandomize="GRANQ_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
SOURCES = str(Path(granq.__file__).parent)
FIGURES = Path(__file__).parent.parent / "figures"

text = st.text(max_size=12)
numbers = st.integers(-3, 40) | st.floats(allow_nan=True, allow_infinity=True)
junk = st.none() | text | numbers | st.booleans() | st.lists(numbers, max_size=3) | st.binary(max_size=8)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
shapes = st.lists(st.integers(0, 4), max_size=5)


@st.composite
def tensors(draw: st.DrawFn, shape: st.SearchStrategy = shapes) -> torch.Tensor:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(shape), generator=rng) * draw(st.sampled_from([1.0, 0.0, 1e-30, 1e30]))
    if x.numel() and draw(st.booleans()):
        x.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0]))
    return x.to(draw(dtypes))


def answers(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result, or None after an error that this package raised on purpose: its own type, place and one sentence."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.filename.startswith(SOURCES), f"raised inside {last.filename}: {error!r}"
        assert "raise" in (last.line or ""), f"not raised on purpose: {last.line}"
        assert str(error).strip() and "\n" not in str(error)
        return None


bits = st.integers(0, 10) | junk
granularities = st.sampled_from(granq.GRANULARITIES) | junk


@fuzz
@given(tensors() | junk, bits, granularities, st.booleans())
def test_quantizer(x, bits, granularity, clamp):
    qparams = answers(granq.choose_qparams, x, bits, granularity)
    value = answers(granq.fake_quantize, x, bits, granularity, clamp)
    assert (qparams is None) == (value is None)  # they refuse the same input
    if value is not None:
        assert value.shape == x.shape and value.dtype == x.dtype
        codes = answers(granq.quantize, x, *qparams, bits, clamp)
        if codes is not None:
            assert granq.dequantize(codes, *qparams).shape == x.shape
            assert not clamp or codes.numel() == 0 or -(2 ** (bits - 1)) <= codes.min() <= codes.max() < 2 ** (bits - 1)


@fuzz
@given(st.sampled_from([*granq.SCHEMES]) | junk, bits, bits, tensors(st.just([2, 3, 8, 8])) | tensors() | junk)
def test_conversion_and_audit(scheme, weight_bits, act_bits, images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    student = answers(granq.quantize_model, model, scheme, weight_bits, act_bits)
    frame = answers(granq.audit, student if student is not None else model, images)
    assert frame is None or len(frame) == 2


@fuzz
@given(junk | tensors() | st.just(nn.ReLU()), junk | tensors() | st.lists(tensors(), max_size=2), junk)
def test_measurements(model, batches, third):
    layers = third if isinstance(third, list) else ["0"]
    for measure, args in (
        (granq.audit, (batches,)),
        (granq.quantize_model, (third, 3, 3)),
        (granq.measure_channel_scales, (batches,)),
        (granq.measure_layer_error, (batches, ["strict"], 3)),
        (granq.measure_synthetic_gap, (batches, batches)),
        (granq.measure_scale_maps, (batches, layers, 3)),
    ):
        answers(measure, model, *args)
        if not isinstance(batches, int | float | bool | type(None)):
            answers(measure, nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()), *args)


PLOTS = {
    name: pd.read_csv(path)
    for name in granq.__all__
    if name.startswith("plot_") and (path := FIGURES / f"{name.removeprefix('plot_')}.csv").exists()
}


def good_arguments() -> dict[str, tuple]:
    """Function -> arguments it accepts, for those that no other test here calls."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
    x, generator = torch.randn(2, 3, 8, 8), granq.build_generator(3, 8)
    spec = granq.DataSpec("any", 3, 8, (0.5,) * 3, (0.5,) * 3)
    foldable = granq.quantize_model(model, "foldable", 3, 3)
    granq.calibrate(foldable, [x])
    return {
        "activation_places": (model,), "build_generator": (3, 8), "calibrate": (foldable, [x]),
        "decode_pixels": ("00" * 12, 2), "freeze_ranges": (foldable, True), "integer_model": (foldable,),
        "layer_names": (model,), "learn_steps": (foldable,), "load_split": (granq.describe_data("digits"), "test"),
        "measure_activation_distortion": (model, [x], ["0"], [3]), "measure_generated_images": (generator, model, spec),
        "measure_channel_histograms": (model, {"real": x}, ["0"], [3]), "measure_integer_agreement": (foldable, x),
        "measure_latency_quantizer": ([(1, 2, 4, 4)], 0), "measure_latency_scaling": ([0], [1]),
        "load_generator": ("nowhere",), "load_run": ("nowhere", "cpu"),
        "redraw_figures": (["nothing"], Path("nowhere")),
        "reestimate_batchnorm": (foldable, model, x), "set_image_range": (foldable, x[:1, :, :1, :1], x[:1, :, :1, :1]),
        "pixel_bounds": (spec,),
        "vary": (x, 0.5), "refine": (model, x, torch.tensor([0, 1]), 1), "synthesize": (generator, 2),
        "random_shapes": (2, 8),
        "make_figures": (["nothing"], 5),
        "results_table": (PLOTS["plot_accuracy_bits"],),
        "sqnr_db": (x, x, (0,)), "top1_on": (model, [], spec),
        "summarize_audit": (granq.audit(model, x),),
        "train": (model, granq.QATConfig(epochs=1, warmup_epochs=1, iterations=1, batch_size=2, image_size=8)),
    }  # fmt: skip


GOOD = good_arguments()


@fuzz
@given(st.sampled_from([*GOOD]), st.data())
def test_one_wrong_argument(name, draw):
    arguments = list(GOOD[name])
    wrong = junk | tensors() | st.just(pd.DataFrame({"x": [1.0]})) | st.just(nn.ReLU())
    arguments[draw.draw(st.integers(0, len(arguments) - 1))] = draw.draw(wrong)
    if "latency" not in name or not isinstance(arguments[0], list):  # a time is an answer, and long
        answers(getattr(granq, name), *arguments)


#: what others return, a switch, and what trains or writes: each has tests of its own
ELSEWHERE = {
    "Result",
    "SavedRun",
    "Scheme",
    "Setting",
    "QParams",
    "compile_quantizer",
    "digits_teacher",
    "train_teacher",
}
ELSEWHERE |= {"export_onnx", "save_integers", "save_teacher", "save_figure"}


def test_every_public_name_is_tried():
    source = Path(__file__).read_text()
    assert not [n for n in granq.__all__ if not n.startswith("plot_") and not re.search(rf"\b{n}\b", source)]
    assert ELSEWHERE <= {*granq.__all__}


@fuzz
@given(st.dictionaries(st.sampled_from([*granq.QATConfig.__dataclass_fields__]), junk, max_size=4) | junk)
def test_settings(values):
    config = answers(granq.QATConfig.from_dict, values)
    assert config is None or granq.QATConfig.from_dict(vars(config) | {"milestones": [*config.milestones]}) == config


@fuzz
@given(st.sampled_from(["digits", "cifar10", "imagenet", "folder:", "folder:.", "folder:/"]) | text, text)
def test_names(data, network):
    answers(granq.describe_data, data, network)
    answers(granq.build_network, network, 10)
    answers(granq.build_network, data, 10)


@fuzz
@given(st.binary(max_size=200), st.sampled_from(["t.pt", "t.safetensors", "t"]))
def test_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    answers(granq.load_teacher, "resnet20_cifar10", granq.describe_data("digits"), tmp_path / name)
    (tmp_path / "checkpoint.pt").write_bytes(content)
    (tmp_path / "config.json").write_bytes(content)
    answers(RunFolder(tmp_path).load)
    answers(RunFolder(tmp_path).read_config)


@fuzz
@given(st.sampled_from([n for n in granq.__all__ if n.startswith("plot_")]), st.data())
def test_plots(name, draw):
    import matplotlib.pyplot as plt

    plt.close("all")  # what a case that stopped early left behind
    plot = getattr(granq, name)
    answers(plot, draw.draw(junk | st.just(pd.DataFrame()) | st.just(pd.DataFrame({"x": [1.0]}))))
    if name in PLOTS:
        data = PLOTS[name]
        answers(plot, data.drop(columns=draw.draw(st.sampled_from([*data.columns]))))
        option = draw.draw(st.sampled_from(["quantity", "metric", "mode", "layer", "bits", "granularity", "against"]))
        if option in plot.__wrapped__.__kwdefaults__:
            answers(plot, data, **{option: draw.draw(text)})
    plt.close("all")


COMMANDS = {
    "quantize": {
        "--data": "FOLDER", "--network": "resnet20_cifar10", "--teacher": "TEACHER", "--scheme": "strict",
        "--bits": "3,3", "--epochs": "1", "--warmup-epochs": "1", "--iterations": "1", "--batch-size": "2",
        "--seed": "0", "--recipe": "adadfq", "--preset": "quick", "--image-size": "32", "--device": "cpu",
        "--student-lr": "0.001", "--range-quantile": "0.99", "--learned-steps": None,
    },
    "audit": {"--network": "resnet20_cifar10", "--scheme": "release", "--bits": "3,3", "--image-size": "32",
              "--classes": "10", "--fail-under": "10", "--teacher": "TEACHER"},
    "sweep": {"--data": "digits", "--network": "resnet20_cifar10", "--schemes": "strict", "--bits": "3,3",
              "--seeds": "0", "--status": None},
    "evaluate": {"RUN": "FINISHED", "--data": "FOLDER"},
    "export": {"RUN": "FINISHED", "--data": "FOLDER"},
    "rerun": {"TABLE": "ROWS", "ROW": "1", "--data": "FOLDER", "--teacher": "TEACHER", "--device": "cpu"},
    "figures": {"NAME": "nothing", "--preset": "quick", "--seed": "0"},
    "factorial": {"--data": "FOLDER", "--network": "resnet20_cifar10", "--teacher": "/nowhere", "--bits": "2",
                  "--images": "2"},
    "bench": {"WHAT": "quantizer", "--repetitions": "0"},
    "teacher": {"--data": "nothing", "--network": "resnet20_cifar10", "--epochs": "1", "--lr": "0.1", "--seed": "0"},
}  # fmt: skip
#: without these a command rightly starts hours of work
KEPT = {"NAME", "--status", "--repetitions"}
words = st.sampled_from(["", "-1", "0", "1", "2", "nan", "inf", "3,3", "9,9", "3", "a,b", "..", "/", "digits", "\0"])


@pytest.fixture
def files(folder, teacher, tmp_path_factory) -> dict[str, str]:
    """What stands for the capital words: a finished run among them, and a table with its row."""
    out = tmp_path_factory.mktemp("finished")
    arguments = f"quantize --data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme foldable --bits 3,3"
    arguments += " --epochs 1 --warmup-epochs 0 --iterations 1 --batch-size 2 --recipe layers --refined-images 2"
    assert cli.main([*arguments.split(), "--device", "cpu", "--out", str(out / "run")]) == 0
    row = json.loads((out / "run/result.json").read_text())
    pd.DataFrame([row]).to_csv(out / "rows.csv", index=False)
    return {"FOLDER": folder, "TEACHER": str(teacher), "FINISHED": str(out / "run"), "ROWS": str(out / "rows.csv")}


@fuzz
@given(st.sampled_from([*COMMANDS]), st.data())
def test_commands(files, tmp_path_factory, name, draw):
    given = dict(COMMANDS[name])
    for option in draw.draw(st.lists(st.sampled_from(sorted(given.keys() - KEPT)), min_size=1, max_size=2)):
        given[option] = draw.draw(words | text)
    if draw.draw(st.booleans()):
        given.pop(draw.draw(st.sampled_from(sorted(given.keys() - KEPT - {"--iterations"}))))
    out = tmp_path_factory.mktemp("fuzz") / "out"
    arguments = [name, "--out", str(out)] if name != "evaluate" else [name]
    for option, value in given.items():
        arguments += [option] if option.startswith("-") else []
        arguments += [files.get(value, value)] if value is not None else []
    said, shown = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(shown):
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # of argparse
            code = end.code
    assert code in (0, 1, 2), arguments
    assert "Traceback" not in said.getvalue()
    if code == 2 and "usage:" not in said.getvalue():
        lines = [line for line in said.getvalue().splitlines() if "torch/utils/cpp_extension" not in line]
        assert len(lines) == 1 and lines[0].startswith("granq: "), said.getvalue()
        assert not out.exists(), arguments  # bad input is refused before anything is written
    if code == 0 and name in ("quantize", "evaluate", "rerun"):
        assert "top1" in shown.getvalue()


def test_the_probe_notices_errors_from_inside():
    with pytest.raises(AssertionError, match="raised inside"):
        answers(lambda: int("x"))
