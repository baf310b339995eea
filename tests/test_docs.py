"""The pages: their examples run, their links lead somewhere, their commands are commands, and they stay short."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import granq
from granq.app.cli import parse
from granq.app.commands import COMMANDS

ROOT = Path(__file__).parent.parent
LIMITS = {"README.md": 120, "docs/method.md": 160} | {
    f"docs/{name}.md": 100 for name in ("results", "speed", "reliability", "reproduction", "extending", "python")
}
PAGES = [
    *LIMITS,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "NOTICE.md",
    "figures/README.md",
    "notebooks/README.md",
    "benchmarks/README.md",
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def shown(value: str) -> str:
    """How a page writes a value of a CSV: 1,024 for 1024, and torch without its build."""
    return f"{int(value):,}" if value.isdecimal() else value.partition("+")[0]


@pytest.mark.parametrize("name", LIMITS)
def test_a_page_stays_short(name: str) -> None:
    assert len(page(name).splitlines()) <= LIMITS[name]


def test_the_readme_fits_on_a_screen() -> None:
    assert max(map(len, page("README.md").splitlines())) <= 120


def test_every_page_is_checked() -> None:
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} <= {*PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in LINK.findall(page(name)):
        if link.startswith("https://"):
            assert not re.search(r"colab|mybinder|github\.com/granq", link), f"{link} does not exist"
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_gallery_shows_every_picture_with_text_and_command() -> None:
    text = page("figures/README.md")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    pictures = {path.stem for path in (ROOT / "figures").glob("*.png")}
    assert {name for name in sections if name in pictures} == pictures
    for name in pictures:
        assert re.search(rf"!\[[^\]]{{40,}}\]\({name}\.png\)", sections[name]), f"{name} needs a text for the blind"
        assert re.search(r"^Made by `(granq|python benchmarks/\S+) .*`\.$", sections[name], re.MULTILINE), name
        assert re.search(r"^Provenance: ", sections[name], re.MULTILINE), name
        table = pd.read_csv(ROOT / f"figures/{name}.csv", dtype=str)
        for column in {"torch", "commit", "images"} & {*table}:
            for value in table[column].dropna().unique():
                assert shown(value) in sections[name].replace("\n", " "), f"{name}: {column} {value}"


def test_the_pages_use_todays_names() -> None:
    old = r"`release`|`layers`|--preset cifar10|granq rerun|moonshot|arithmetic\.md|granq\.(explore|figures|analysis)\b"
    for name in PAGES:
        assert not re.findall(old, page(name)), name


def examples(name: str) -> list[str]:
    """The blocks of Python of a page, each of which is short."""
    blocks = [code for language, code in BLOCK.findall(page(name)) if language == "python"]
    assert blocks and all(len(code.splitlines()) < 20 for code in blocks)
    return blocks


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would paste them; those of docs/extending.md in the next test."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in examples(name):
        exec(compile(code, name, "exec"), names)


def test_parts_of_ones_own_are_used() -> None:
    start, *parts = examples("docs/extending.md")
    names: dict[str, Any] = {}
    exec(start, names)
    results = [granq.train(names["teacher"], names["config"])]
    for part in parts:
        exec(part, names)
        results.append(names["result"])
    usual, scheme, generator, loss = results
    assert scheme.config.scheme == names["mine"]
    assert isinstance(generator.generator, names["Blobs"])
    before, after = usual.history.student_loss.iloc[-1], loss.history.student_loss.iloc[-1]
    assert before < 0 <= after  # AdaDFQ's loss is negative


def commands(name: str) -> list[str]:
    """The complete ``granq`` command lines of a page: those in blocks, and those that make a picture."""
    text = page(name)
    lines = "\n".join(code for _, code in BLOCK.findall(text)) + "\n" + "\n".join(re.findall(r"^ {4}(.*)$", text, re.M))
    lines = re.sub(r"\s*\\\n\s*", " ", lines)
    found = [line.partition(" #")[0].strip() for line in lines.splitlines() if line.startswith("granq ")]
    found += re.findall(r"^Made by `(granq .*)`\.$", text, re.MULTILINE)
    variables = dict(re.findall(r'^([A-Z]+)="([^"]*)"$', text, re.MULTILINE))
    return [re.sub(r"\$([A-Z]+)", lambda name: variables.get(name[1], name[0]), line) for line in found]


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which every file exists that the pages name."""
    for label in "0123456789":
        for folder in ("PATH/test", "cifar10/test"):
            (tmp_path / folder / label).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / folder / label / "0.png")
    (tmp_path / "figures").symlink_to(ROOT / "figures")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [name for name in PAGES if commands(name)])
@pytest.mark.usefixtures("somewhere")
def test_commands_are_commands(name: str) -> None:
    """The command line understands each of them; nothing is executed."""
    for line in commands(name):
        parse(shlex.split(line)[1:])


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command, from their help."""
    said = io.StringIO()
    with redirect_stdout(said):
        for command in ("quantize", *COMMANDS):
            with pytest.raises(SystemExit):
                parse([command, "--help"])
    return {*re.findall(r"--[a-z][a-z0-9-]+", said.getvalue())} | {"--json", "--help"}


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_in_the_text_exist(name: str, options: set[str]) -> None:
    text = BLOCK.sub("", page(name))
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith("granq "):
            assert code.split()[1] in {"quantize", "--help", *COMMANDS}, code
        if code.startswith(("granq ", "--")):
            assert {*re.findall(r"--[a-z][a-z0-9-]+", code)} <= options, code
