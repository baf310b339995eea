"""What lesson 00 alone uses: ten images, students of every width, and a chart of their answers."""

from collections.abc import Iterator
from itertools import islice

import altair as alt
from pandas import DataFrame
from torch import Tensor, nn

import granq
from granq.convert import Quantizer
from granq.show.explorers.base import TEXT, finish, slider
from granq.show.explorers.synthetic import data_url
from granq.show.style import ROLES


def ten_images(bench: granq.Workbench) -> tuple[Tensor, Tensor]:
    """Return the first test image of each of the first ten classes, and the labels."""
    images, labels = next(bench.sample(0, len(bench.test), len(bench.test)))
    places = [int((labels == label).nonzero()[0]) for label in labels.unique()[:10]]
    return images[places], labels[places]


def every_width(bench: granq.Workbench, scheme: str) -> Iterator[tuple[int, nn.Module]]:
    """Yield 2 to 8 bits, each with a student that was never trained.

    It is one student whose width changes. Static ranges are those of the full-precision network on 64 drawn images.
    """
    student = granq.quantize_model(bench.teacher, scheme, 2, 2)
    if granq.SCHEMES[scheme].tracked:
        granq.calibrate(student, islice(bench.synthetic(), 1), full_precision=True)
    for bits in range(2, 9):
        for part in student.modules():
            if isinstance(part, Quantizer):
                part.bits = bits
        yield bits, student


def answers_chart(answers: DataFrame, images: DataFrame, bits: int) -> alt.VConcatChart:
    """Show images and what students answer, a row for each scheme; the bits are a slider.

    Args:
        answers: columns scheme, bits, place, answer; ``place`` is a row of ``images``.
        images: rows of ``granq.measure_images``.
        bits: at which the chart opens.
    """
    schemes = answers.scheme.unique().tolist()
    pictures = DataFrame({"place": range(len(images)), "label": images.label.tolist()})
    answers = answers.merge(pictures)
    pictures["picture"] = [data_url(row) for row in images.to_dict("records")]
    place = alt.X("place:O", axis=None)
    top = alt.Chart(pictures).mark_image(width=44, height=44).encode(place, url="picture:N", tooltip="label:N")
    shown = alt.Chart(answers).transform_filter("datum.bits == bits")
    shown = shown.transform_calculate(wrong="datum.answer != datum.label")
    y = alt.Y("scheme:N", sort=schemes, title=None, axis=alt.Axis(ticks=False, domain=False, grid=False))
    wrong = shown.transform_filter("datum.wrong").mark_square(size=560, opacity=0.8, color=ROLES["per_channel"].color)
    hover = ["scheme:N", "bits:Q", "label:N", "answer:N"]
    numbers = shown.mark_text(fontSize=15, color=TEXT).encode(place, y, text="answer:N", tooltip=hover)
    table = alt.layer(wrong.encode(place, y, tooltip=hover), numbers).properties(width=460, height=28 * len(schemes))
    chart = alt.vconcat(top.properties(width=460, height=48), table, spacing=4)
    told = "Ten images, and below each what a student of every scheme answers; wrong answers have an orange square."
    return finish(chart, "Which answers are wrong (orange)?", told, slider("bits", bits, 2, 8))
