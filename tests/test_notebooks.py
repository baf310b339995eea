"""The form of every notebook: what a reader may rely on, without running it (``make notebooks`` does)."""

import re
from pathlib import Path
from statistics import median

import nbformat
import pytest
import torch
from nbformat import NotebookNode

import granq

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LESSONS = [name for name in NAMES if re.match(r"0[0-7]_", name)]  # 08 draws the registry; the others have no lesson
EXPLORERS = (
    r"granq\.(distortion_microscope|quantizer_playground|scale_explorer|layer_explorer|speed_lab|synthetic_against_real"
    r"|method_figure|integer_walk|training_monitor)\("
)


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def sources(name: str, kind: str) -> list[str]:
    return [cell.source for cell in read(name).cells if cell.cell_type == kind]


def section(name: str, title: str) -> str:
    """The markdown cell under ``## title``."""
    found = [text for text in sources(name, "markdown") if text.startswith(f"## {title}")]
    assert len(found) == 1, f"{name} has {len(found)} cells '## {title}'"
    return found[0].split("\n## ")[0]


def test_notebooks_exist() -> None:
    assert "00_start_here" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_title_is_a_question_and_says_what_to_expect(name: str) -> None:
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# [^\n]+\?(\n|$)", first.source)
    if name in LESSONS:
        assert all(f"**{word}**" in first.source for word in ("You learn", "Run time", "Previous", "Next"))


@pytest.mark.parametrize("name", NAMES)
def test_valid_and_stripped(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata  # it breaks GitHub's view
    for cell in notebook.cells:
        assert cell.get("id")
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_small(name: str) -> None:
    lines = [len(text.splitlines()) for text in sources(name, "code")]
    assert max(lines) <= 25 and median(lines) <= 8


@pytest.mark.parametrize("name", NAMES)
def test_asserts_what_it_claims(name: str) -> None:
    assert any(re.search(r"^\s*assert ", text, re.M) for text in sources(name, "code"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "solutions"])
def test_one_parameters_cell(name: str) -> None:
    cells = [c for c in read(name).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1 and cells[0].cell_type == "code"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    text = "\n".join(sources(name, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (FOLDER / target).exists(), target
    if name in LESSONS:
        assert re.search(r"!\[[^]]{10,}\]\(\.\./figures/\w+\.(png|svg)\)", text), "no committed figure with alt text"


@pytest.mark.parametrize("name", NAMES)
def test_an_explorer_is_the_last_line_of_its_cell(name: str) -> None:
    for text in sources(name, "code"):
        if re.search(EXPLORERS, text):
            assert re.search(EXPLORERS, text.rstrip().splitlines()[-1]), "a notebook shows the last line only"


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_order(name: str) -> None:
    idea = section(name, "The idea").split("**Predict**")[0]
    assert "$" in idea and len(re.sub(r"\$[^$]+\$", "formula", idea).split()) <= 120
    text = "\n".join(cell.source for cell in read(name).cells)
    marks = ["## The idea", "**Predict**", "**Notice**", "**It does not show**", "## Exercises", "## Summary"]
    places = [text.find(mark) for mark in marks]
    assert -1 not in places and places == sorted(places), dict(zip(marks, places, strict=True))


@pytest.mark.parametrize("name", LESSONS)
def test_three_exercises_with_hints(name: str) -> None:
    exercises = section(name, "Exercises")
    assert re.findall(r"^(\d)\. ", exercises, re.M) == ["1", "2", "3"]
    assert len(re.findall(r"\*Hint\*:", exercises)) == 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_trap_catches_and_every_cure_cures(bits: int) -> None:
    """The six cells of lesson 01, which assert both, at every width."""
    cells = read("01_anatomy_of_the_quantizer").cells
    start = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Seven traps"))
    end = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    traps = [cell.source for cell in cells[start:end] if cell.cell_type == "code"]
    assert len(traps) == 7
    for trap in traps:
        exec(trap, {"granq": granq, "torch": torch, "bits": bits})
