"""Whatever is put in: an answer, or an error before anything was written. Never a hang, never a wrong file.

``GRANQ_FUZZ=1000 pytest tests/test_fuzz.py`` tries so many cases a test instead of a few.
"""

import io
import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import granq
from granq.app import cli
from granq.config import QATConfig
from granq.runs import RunFolder

CASES = int(os.environ.get("GRANQ_FUZZ", 20))
fuzz = settings(
    max_examples=CASES, deadline=20_000, derandomize="GRANQ_FUZZ" not in os.environ, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

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
    """The result, or None after an error of any kind that is no sign of a crash or of an assertion of ours."""
    try:
        return function(*args, **kwargs)
    except (AssertionError, RecursionError, MemoryError, SystemError):
        raise
    except Exception:
        return None


bits = st.integers(0, 10) | junk


def is_width(value: Any) -> bool:
    return type(value) is int and 2 <= value <= 8


@fuzz
@given(tensors(), bits, st.sampled_from(granq.GRANULARITIES) | junk, st.booleans())
def test_quantizer(x, bits, granularity, clamp):
    value = answers(granq.fake_quantize, x, bits, granularity, clamp)
    right = is_width(bits) and granularity in granq.GRANULARITIES and x.is_floating_point() and x.dim() in (2, 4)
    assert value is not None or not right
    if value is None:
        return
    assert value.shape == x.shape and value.dtype == x.dtype and 2 <= bits <= 8
    codes = answers(granq.quantize, x, *granq.choose_qparams(x, bits, granularity), bits, clamp)
    if codes is not None and clamp and codes.numel():
        assert -(2 ** (bits - 1)) <= codes.min() <= codes.max() < 2 ** (bits - 1)


@fuzz
@given(st.sampled_from([*granq.SCHEMES]) | junk, bits, bits, tensors(st.just([2, 3, 8, 8])) | junk)
def test_conversion_and_audit(scheme, weight_bits, act_bits, images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    student = answers(granq.quantize_model, model, scheme, weight_bits, act_bits)
    known = isinstance(scheme, str) and scheme in granq.SCHEMES
    assert (student is not None) == (known and is_width(weight_bits) and is_width(act_bits))
    frame = answers(granq.audit, student if student is not None else model, images)
    assert frame is None or len(frame) == 2


@fuzz
@given(st.dictionaries(st.sampled_from([*QATConfig.model_fields]) | text, junk, max_size=4))
def test_settings(values):
    config = answers(lambda: QATConfig(**values))
    if config is not None:
        assert QATConfig.model_validate_json(config.model_dump_json()) == config
        assert {name: getattr(config, name) for name in values} == values


@fuzz
@given(st.sampled_from(["digits", "cifar10", "imagenet", "folder:", "folder:.", "folder:/"]) | text, text)
def test_names(data, network):
    spec = answers(granq.describe_data, data, network)
    assert spec is None or spec.classes > 0
    for name in (data, network):
        assert answers(granq.build_network, name, 10) is None


@fuzz
@given(st.binary(max_size=200), st.sampled_from(["t.pt", "t.safetensors", "t"]))
def test_files(tmp_path, content, name):
    for file in (name, "checkpoint.pt", "config.json"):
        (tmp_path / file).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert answers(granq.load_teacher, "resnet20_cifar10", granq.describe_data("digits"), tmp_path / name) is None
    assert answers(RunFolder(tmp_path).load) is None
    assert answers(RunFolder(tmp_path).read_config) is None
    assert answers(granq.load_run, tmp_path) is None
    assert sorted(tmp_path.iterdir()) == before


COMMANDS = {
    "quantize": {
        "--data": "FOLDER", "--network": "resnet20_cifar10", "--teacher": "TEACHER", "--scheme": "strict",
        "--bits": "3,3", "--epochs": "1", "--warmup-epochs": "1", "--iterations": "1", "--batch-size": "2",
        "--seed": "0", "--recipe": "adadfq", "--preset": "quick", "--image-size": "32", "--device": "cpu",
        "--student-lr": "0.001", "--image-bits": "6", "--bf16": None,
    },
    "audit": {"--network": "resnet20_cifar10", "--scheme": "granq", "--bits": "3,3", "--image-size": "32",
              "--data": "digits", "--fail-under": "10", "--teacher": "TEACHER"},
    "sweep": {"--data": "digits", "--network": "resnet20_cifar10", "--schemes": "strict", "--bits": "3,3",
              "--seeds": "0", "--epochs": "3", "--warmup-epochs": "1", "--status": None},
    "evaluate": {"RUN": "FINISHED", "--data": "FOLDER"},
    "export": {"RUN": "FINISHED", "--data": "FOLDER"},
    "figures": {"NAME": "nothing", "--budget": "quick", "--seed": "0"},
    "factorial": {"--data": "FOLDER", "--network": "resnet20_cifar10", "--teacher": "/nowhere", "--bits": "2",
                  "--images": "2"},
    "sensitivity": {"--data": "FOLDER", "--network": "resnet20_cifar10", "--teacher": "/nowhere", "--bits": "2",
                    "--images": "2", "--kinds": "alone", "--parts": "weights", "--scheme": "strict"},
    "bench": {"WHAT": "quantizer", "--repetitions": "0"},
    "teacher": {"--data": "nothing", "--network": "resnet20_cifar10", "--epochs": "1", "--lr": "0.1", "--seed": "0"},
}  # fmt: skip
#: without these a command rightly starts hours of work, or writes what was asked for
KEPT = {"NAME", "--status", "--repetitions", "--iterations"}
words = st.sampled_from(["", "-1", "0", "1", "2", "nan", "inf", "3,3", "9,9", "3", "a,b", "..", "/", "digits", "\0"])


@pytest.fixture
def files(folder, teacher, tmp_path_factory) -> dict[str, str]:
    """What stands for the capital words, a finished run among them."""
    out = tmp_path_factory.mktemp("finished")
    arguments = f"quantize --data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme foldable --bits 3,3"
    arguments += " --epochs 1 --warmup-epochs 0 --iterations 1 --batch-size 2 --recipe match --refined-images 2"
    assert cli.main([*arguments.split(), "--device", "cpu", "--out", str(out / "run")]) == 0
    return {"FOLDER": folder, "TEACHER": str(teacher), "FINISHED": str(out / "run")}


@fuzz
@given(st.sampled_from([*COMMANDS]), st.data())
def test_commands(files, tmp_path_factory, name, draw):
    given = dict(COMMANDS[name])
    for option in draw.draw(st.lists(st.sampled_from(sorted(given.keys() - KEPT)), min_size=1, max_size=2)):
        given[option] = draw.draw(words | text)
    if draw.draw(st.booleans()):
        given.pop(draw.draw(st.sampled_from(sorted(given.keys() - KEPT))))
    out = tmp_path_factory.mktemp("fuzz") / "out"
    arguments = [name, "--json", *(["--out", str(out)] if name != "evaluate" else [])]
    for option, value in given.items():
        arguments += [option] if option.startswith("-") else []
        arguments += [files.get(value, value)] if value is not None else []
    said, shown = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(shown):
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # of tyro and argparse
            code = end.code
        except Exception:
            code = None
    if code == 2 and said.getvalue().splitlines()[-1].startswith("granq: "):
        assert not shown.getvalue()
    if code in (None, 2):
        assert not out.exists(), arguments  # refused before anything is written
    elif code == 1 and not shown.getvalue():  # a download without a network
        assert re.match(r"granq: \w+Error: ", said.getvalue().splitlines()[-1]), said.getvalue()
    elif "--help" not in arguments and "-h" not in arguments:
        result = json.loads(shown.getvalue())
        assert code in (0, 1) and (name not in ("quantize", "evaluate") or "teacher_top1" in result)


def test_the_probe_lets_assertions_through():
    def wrong() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        answers(wrong)
    assert answers(int, "x") is None and answers(int, "1") == 1
