"""What every lesson uses: its workbench, a box that answers a prediction, and exercises that check themselves."""

import io
import logging
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from itertools import islice
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from matplotlib import pyplot as plt
from torch import nn

import granq
from granq.data import data_root
from granq.qat import quantized
from granq.runs import RunFolder, fingerprint
from granq.schemes import check_bits, get_scheme
from granq.show.explorers.base import TEXT, WIDTH, finish
from granq.show.style import GREY, STYLE

LESSON: dict[str, Any] = {}  #: the parameters of the lesson that runs: bench, bits, widths, schemes, data, network
warnings.filterwarnings("ignore", category=DeprecationWarning)  # of other packages; nothing a reader can mend
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"


def start(
    bits: int | Sequence[int] = 2, schemes: Sequence[str] = ("granq",), *, data: str = "digits",
    network: str = "resnet20_cifar10", teacher: str | Path | None = None, zero_shot: bool = True,
) -> granq.Workbench:  # fmt: skip
    """Return the workbench of a lesson's parameters, with the lesson's look and seed set.

    Args:
        bits: a width or several, 2 to 8.
        schemes: names in ``granq.SCHEMES``.
        data, network, teacher: as of ``granq.Workbench``; without a teacher the digits' own, which comes with granq.
        zero_shot: make the short zero-shot run now, if no lesson has; it takes half a minute and is kept in the cache.

    Raises:
        granq.UserError: at once, and not after the work, if a parameter is wrong.
    """
    widths = [check_bits(k) for k in ([bits] if isinstance(bits, int) else bits)]
    for scheme in schemes:
        get_scheme(scheme)
    if teacher is None and data != "digits":
        raise granq.UserError(f"a teacher of {dataset(data)} is needed: teacher = 'FILE.safetensors'")
    plt.style.use(STYLE)
    plt.rcParams["figure.dpi"] = 150
    torch.manual_seed(0)
    bench = granq.Workbench(data=data, network=network, teacher=teacher)
    LESSON.update(bench=bench, bits=widths[0], widths=widths, schemes=list(schemes), data=data, network=network)
    print(f"granq {granq.__version__}, torch {torch.__version__}")
    print(f"teacher: {network}, {bench.top1:.1f} % of {len(bench.test)} test images of {dataset(data)}")
    if zero_shot:
        with redirect_stderr(io.StringIO()):  # what a short run says about itself, lesson 02 explains
            bench.zero_shot  # noqa: B018
    return bench


def dataset(data: str) -> str:
    """Return the name of the data without a path."""
    return "an image folder" if data.startswith("folder:") else data


def make_student(bench: granq.Workbench, scheme: str, bits: int, batches: int | None = None) -> nn.Module:
    """Return a student that was never trained; static ranges are set on generated images, on all ``batches`` or few."""
    student = granq.quantize_model(bench.teacher, scheme, bits, bits)
    if granq.SCHEMES[scheme].tracked:
        granq.calibrate(student, islice(bench.synthetic(), batches))
    return student


def convolutions(bench: granq.Workbench) -> list[str]:
    """Return the layers that read maps. In front of a Linear an image has one range for all of its features."""
    modules = bench.teacher.get_submodule
    return [name for name in granq.layer_names(bench.teacher) if isinstance(modules(name), nn.Conv2d)]


def train_once(
    bench: granq.Workbench, scheme: str, bits: int, generator: nn.Module | None = None, **changes: Any
) -> granq.Result:
    """Return a run of ``granq.train``, made once: it is kept in the cache, under settings, teacher and generator."""
    config = bench.config(scheme=scheme, weight_bits=bits, act_bits=bits, **changes)
    run = run_folder(bench, config, generator)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{run.path}.lock"), redirect_stderr(io.StringIO()):
        found = run.load() if run.config.is_file() else None
        if found is None or found["epoch"] < config.epochs:
            how: dict[str, Any] = dict(evaluate=bench.evaluate, out=run.path, resume=run.path.exists())
            return granq.train(bench.teacher, config, generator=generator, **how)
    history, student = pd.DataFrame(found["rows"]), quantized(bench.teacher, config)
    student.load_state_dict(found["student"])
    trained = history.test_top1[~history.warmup.astype(bool)]
    tops = found["ptq_top1"], float(trained.iloc[-1]), float(trained.max())
    return granq.Result(student, granq.load_generator(run.path), config, history, *tops, found["seconds"])


def run_folder(bench: granq.Workbench, config: granq.QATConfig, generator: nn.Module | None = None) -> RunFolder:
    """Return the folder in the cache of a run with these settings."""
    return RunFolder(data_root() / "runs" / fingerprint(config, bench.spec, bench.teacher, generator)[:16])


def predict(question: str, measured: float, unit: str = "", words: str = "") -> alt.LayerChart:
    """Ask for a number; the chart answers once the reader typed one, without a kernel.

    Args:
        question: the title.
        measured: the right number, out of sight until then.
        unit: stands after both numbers, such as "dB".
        words: the answer in words, which appears with it.
    """
    unit, words = f" {unit}" if unit else "", textwrap.fill(words, 50)
    bind = alt.BindInput(input="number", name="your prediction ", placeholder="a number", debounce=700)
    guess = alt.param(name="guess", value="", bind=bind)
    rows = pd.DataFrame({"who": ["you said", "measured"], "number": [0.0, float(measured)]})
    chart = alt.Chart(rows).transform_calculate(
        value="datum.who == 'measured' ? datum.number : toNumber(guess)", far="toNumber(guess) - datum.number"
    )
    near = "abs(datum.far) <= abs(datum.number) / 10"  # within a tenth counts as right
    far = f"{_number('abs(datum.far)')} + '{unit} too ' + (datum.far > 0 ? 'high' : 'low') + '.'"
    given = chart.transform_filter("guess !== ''")  # all is drawn within the size of the empty chart
    y = alt.Y("who:N", sort=["you said", "measured"], axis=None, scale=alt.Scale(range=[0, 44]))
    x = alt.X("value:Q", axis=None, scale=alt.Scale(range=[70, {"expr": "max(width, 300) - 130"}]))
    bars = given.mark_bar(size=14, color=GREY).encode(x, y)
    names = given.mark_text(align="left", color=TEXT).encode(y, text="who:N", x=alt.value(0))
    numbers = given.transform_calculate(text=f"{_number('datum.value')} + '{unit}'")
    numbers = numbers.mark_text(align="left", dx=5, color=TEXT).encode(x, y, text="text:N")
    one = chart.transform_filter("datum.who == 'measured'").transform_calculate(
        text=f"guess === '' ? 'Type a number into the box below.' : ({near} ? 'Right.' : {far}) + {chr(10) + words!r}"
    )
    told = one.mark_text(align="left", baseline="top", lineBreak="\n", fontSize=12, color=TEXT)
    told = told.encode(text="text:N", x=alt.value(0), y=alt.value(50))
    chart = alt.layer(bars, names, numbers, told).properties(width=WIDTH, height=72 + 17 * len(words.splitlines()))
    return finish(chart, question, f"A question to answer with a number: {question}", guess)


def _number(value: str) -> str:
    """Return a number as text, as an expression: whole, or with three digits."""
    return f"({value} == round({value}) ? format({value}, ',') : format({value}, '.3~r'))"


def check_exercise(name: str, answer: Any) -> None:
    """Say whether an answer is right, and give a hint if it is not; ``name`` is "00-1": lesson 00, exercise 1."""
    import exercises  # which imports this file

    hint = "" if answer is ... else exercises.CHECKS[name](answer)
    if answer is ... or hint:
        print(f"{name}: {f'not yet. {hint}' if hint else 'put your answer in place of the dots'}")
    else:
        number = not isinstance(answer, str | set) and np.ndim(answer) == 0
        print(f"{name}: right, {f'{round(float(answer), 3):,.6g}' if number else answer}.")
