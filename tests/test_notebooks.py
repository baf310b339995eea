"""The form of every notebook, which holds without running it; and, with ``-m notebooks``, a fresh run of each."""

import functools
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
import vl_convert
from nbformat import NotebookNode

import granq

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LESSONS = [name for name in NAMES if re.match(r"0[0-7]_", name)]  # 08 draws the registry; the others have no lesson
EXPLORERS = (
    r"granq\.(distortion_microscope|quantizer_playground|scale_explorer|layer_explorer|speed_lab|synthetic_against_real"
    r"|method_figure|integer_walk|training_monitor)\(|^predict\("
)
ORDER = [
    "00_start_here", "01_anatomy_of_the_quantizer", "02_synthetic_images", "03_zero_shot_qat",
    "04_activation_distortion", "05_channel_scales", "06_layer_error", "07_speed", "08_paper_figures",
    "your_own_network", "solutions",
]  # fmt: skip


@functools.cache
def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def sources(name: str, kind: str) -> list[str]:
    return [cell.source for cell in read(name).cells if cell.cell_type == kind]


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def section(name: str, title: str) -> str:
    """The markdown cell under ``## title``."""
    found = [text for text in sources(name, "markdown") if text.startswith(f"## {title}")]
    assert len(found) == 1, f"{name} has {len(found)} cells '## {title}'"
    return found[0].split("\n## ")[0]


def text_of(cell: NotebookNode) -> str:
    """What a cell printed or returned, as text."""
    return "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs)


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The helper modules of the notebooks."""
    monkeypatch.syspath_prepend(FOLDER)
    import lesson

    yield lesson
    for name in ("lesson", "exercises"):
        sys.modules.pop(name, None)


def test_every_notebook_leads_to_the_next() -> None:
    assert sorted(ORDER) == NAMES
    for name, following in zip(ORDER, ORDER[1:], strict=False):
        assert re.search(rf"\*\*Next\*\* \[[^]]+\]\({following}\.ipynb\)", sources(name, "markdown")[0]), name
    for name, before in zip(ORDER[1:-1], ORDER, strict=False):
        assert re.search(rf"\*\*Previous\*\* \[[^]]+\]\({before}\.ipynb\)", sources(name, "markdown")[0]), name
    table = (FOLDER / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", table, re.M) == ORDER


@pytest.mark.parametrize("name", NAMES)
def test_title_is_a_question_and_says_what_to_expect(name: str) -> None:
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# [^\n]+\?(\n|$)", first.source)
    if name in LESSONS:
        marks = ("You learn", "Why it matters", "Run time", "Previous", "Next")
        assert all(f"**{word}**" in first.source for word in marks)


@pytest.mark.parametrize("name", NAMES)
def test_valid_with_outputs(name: str) -> None:
    """Outputs are there, as text and pictures; no widget state, no error, no stderr, and at most 1.5 MB."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1.5e6
    assert "widgets" not in notebook.metadata  # it breaks GitHub's view
    for cell in notebook.cells:
        assert cell.get("id")
        if cell.cell_type == "code":
            assert cell.execution_count
            for output in cell.outputs:
                assert output.output_type != "error" and output.get("name") != "stderr", output
                assert not any("widget" in kind for kind in output.get("data", {}))
            if re.search(r"plot_\w+\(|plt\.subplots|" + EXPLORERS, cell.source) and "def " not in cell.source:
                kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
                assert "image/png" in kinds or "training_monitor" in cell.source, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_small(name: str) -> None:
    lines = [len(text.splitlines()) for text in sources(name, "code")]
    assert max(lines) <= 25 and median(lines) <= 8


@pytest.mark.parametrize("name", NAMES)
def test_what_is_claimed_is_asserted_out_of_sight(name: str) -> None:
    tests = [cell for cell in read(name).cells if tagged(cell, "test")]
    assert tests and all(cell.metadata.jupyter.source_hidden for cell in tests)
    assert all(re.search(r"^\s*assert ", cell.source, re.M) for cell in tests)
    others = [c.source for c in read(name).cells if c.cell_type == "code" and not tagged(c, "test")]
    assert not any(re.search(r"^\s*assert ", text, re.M) for text in others)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "solutions"])
def test_one_parameters_cell(name: str) -> None:
    """Assignments of plain values, so that papermill can put others after them."""
    cells = [cell for cell in read(name).cells if tagged(cell, "parameters")]
    assert (
        len(cells) == 1 and cells[0].cell_type == "code" and "granq" not in re.sub(r'"[^"]*"|#.*', "", cells[0].source)
    )


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_pictures_have_words(name: str) -> None:
    text = "\n".join(sources(name, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (FOLDER / target).exists(), target
    assert "<img" not in text and all(len(words) >= 10 for words in re.findall(r"!\[([^]]*)\]", text))
    if name in LESSONS:
        assert re.search(r"!\[[^]]{10,}\]\((\.\./figures/)?\w+\.(png|svg)\)", text), "no committed figure with alt text"


@pytest.mark.parametrize("name", NAMES)
def test_an_explorer_is_the_last_line_of_its_cell(name: str) -> None:
    for text in sources(name, "code"):
        if re.search(EXPLORERS, text, re.M):
            last = text.rstrip()[text.rstrip().rfind("\n", 0, re.search(EXPLORERS, text, re.M).start()) + 1 :]
            assert re.match(EXPLORERS, last), "a notebook shows the last expression only"


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_order(name: str) -> None:
    idea = section(name, "The idea")
    assert "$" in idea and len(re.sub(r"\$[^$]+\$", "formula", idea).split()) <= 120
    text = "\n".join(cell.source for cell in read(name).cells)
    marks = ["## The idea", "\npredict(", "**The answer**", "**It does not show**", "## Exercises", "## Summary"]
    places = [text.find(mark) for mark in marks]
    assert -1 not in places and places == sorted(places), dict(zip(marks, places, strict=True))


@pytest.mark.parametrize("name", LESSONS)
def test_three_exercises_with_hints_that_check_themselves(name: str, lessons: Any) -> None:
    exercises = section(name, "Exercises")
    assert re.findall(r"^(\d)\. ", exercises, re.M) == ["1", "2", "3"]
    assert len(re.findall(r"\*Hint\*:", exercises)) == 3
    asked = [f"{name[:2]}-{number}" for number in (1, 2, 3)]
    code = "\n".join(sources(name, "code"))
    assert re.findall(r'check_exercise\("(\d\d-\d)", \.\.\.\)', code) == asked
    import exercises as checks

    assert set(asked) <= checks.CHECKS.keys()
    solved = "\n".join(sources("solutions", "code"))
    assert [one for one in asked if f'check_exercise("{one}", ' not in solved] == []


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_trap_catches_and_every_cure_cures(bits: int) -> None:
    """The traps of lesson 01 and the tests after them, at every width."""
    cells = read("01_anatomy_of_the_quantizer").cells
    start = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Seven traps"))
    end = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    traps = [cell for cell in cells[start:end] if cell.cell_type == "code"]
    assert len([cell for cell in traps if not tagged(cell, "test")]) == 7
    names: dict[str, Any] = {"granq": granq, "torch": torch, "bits": bits}
    for trap in traps:
        exec(trap.source, names)


@pytest.mark.parametrize(
    "guess, shown", [("", []), ("5", ["you said", "measured", "5 dB", "8 dB", "3 dB too low.", "since"]),
                     ("8.5", ["you said", "measured", "8.5 dB", "8 dB", "Right.", "since"])]
)  # fmt: skip
def test_a_prediction_is_answered_and_the_number_stays_out_of_sight_before(
    guess: str, shown: list[str], lessons: Any
) -> None:
    """As the browser evaluates it."""
    spec = lessons.predict("How many?", 8, "dB", "since").to_dict()
    spec["params"] = [p | {"value": guess} if p["name"] == "guess" else p for p in spec["params"]]
    marks = str(vl_convert.vegalite_to_scenegraph(spec)["scenegraph"])
    texts = {line for text in re.findall(r"'text': '([^']*)'", marks) for line in text.split(r"\n")}
    assert texts - {"How many?"} == set(shown or ["Type a number into the box below."])


def test_an_exercise_is_told_right_from_wrong(lessons: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import exercises

    exercises.exercise("99-1")(lambda answer: exercises.near(answer, 3.0, 0.5, "Count the levels."))
    for answer in (..., 2, 3.2):
        lessons.check_exercise("99-1", answer)
    exercises.exercise("99-2")(lambda answer: "")
    for answer in (torch.tensor(1234.5), pd.Series(["a"]), {"b"}, "c"):
        lessons.check_exercise("99-2", answer)
    waiting, wrong, right, *more = capsys.readouterr().out.splitlines()
    assert more[0] == "99-2: right, 1,234.5." and more[-2:] == ["99-2: right, {'b'}.", "99-2: right, c."]
    assert "your answer" in waiting and wrong.endswith("Count the levels.") and right == "99-1: right, 3.2."


@pytest.mark.notebooks
@pytest.mark.timeout(600)
def test_no_exercise_takes_a_wrong_answer(lessons: Any) -> None:
    """Right ones are in the solutions, whose fresh run must print "right" for each."""
    import exercises

    lessons.start(2, ["layerwise", "granq"])
    names = {"00-3": ["stem"], "06-3": ["stem", "body", "head"]}
    assert [name for name, check in exercises.CHECKS.items() if not check(names.get(name, -1))] == []


@pytest.mark.parametrize(
    "wrong, said", [({"bits": 9}, "2 to 8"), ({"schemes": ["release"]}, "unknown scheme"),
                    ({"data": "folder:x"}, "teacher")]
)  # fmt: skip
def test_wrong_parameters_are_refused_before_the_work(wrong: dict[str, Any], said: str, lessons: Any) -> None:
    with pytest.raises(granq.UserError, match=said):
        lessons.start(**wrong)


@pytest.mark.notebooks
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ORDER)
def test_a_fresh_run_prints_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs. Outputs of cells tagged ``stable`` are the committed ones; others differ between processors."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from lessons import execute

    fresh, committed = (
        {cell.id: re.sub(r"right, .*", "right", text_of(cell)) for cell in cells if tagged(cell, "stable")}
        for cells in (execute(name).cells, read(name).cells)
    )
    assert fresh == committed  # but for the numbers of right answers


OTHER = [
    ("00_start_here", {"bits": 5, "schemes": ["strict", "foldable"]}),
    ("03_zero_shot_qat", {"bits": 3, "schemes": ["foldable"]}),
]


@pytest.mark.notebooks
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name, parameters", OTHER)
def test_a_lesson_follows_its_parameters(
    name: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from lessons import execute

    printed = "".join(text_of(cell) for cell in execute(name, **parameters).cells if "outputs" in cell)
    assert all(scheme in printed for scheme in parameters["schemes"])
