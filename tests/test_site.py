"""The documentation site: built without a warning, it opens from its folder without a network, and its charts live.

Screenshots are kept in ``runs/browser``.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
from test_browser import SHOTS, drag, picture

import granq

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
LOADED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*?\ssrc="([^"]+)"|<link\b[^>]*?\shref="([^"]+)"')


@pytest.fixture(scope="module")
def site() -> Path:
    """The folder of the site, made by the command of ``make docs``."""
    (line,) = [line.strip() for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line]
    assert " -W " in line, "warnings are errors"
    command = line.replace("$(BIN)/python", sys.executable)
    made = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / line.split()[-1]


@pytest.fixture
def page(browser: Any) -> Any:
    """A page of the browser, which must not complain, and not ask for anything but files."""
    page, complaints = browser.new_page(viewport={"width": 1280, "height": 1000}), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda text: complaints.append(text.text) if text.type == "error" else None)
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    yield page
    page.close()
    assert complaints == []


def test_every_page_is_there(site: Path) -> None:
    pages = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")}
    assert pages >= {"index", "README", "figures/README", *(f"notebooks/{name}" for name in LESSONS)}
    assert pages >= {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} | {"docs/generated/table"}
    documented = "".join(path.read_text() for path in site.glob("docs/generated/*.html"))
    modules = {"devices", "files", "runs"}
    missing = {name for name in granq.__all__ if f'id="granq.{name}"' not in documented} - modules
    assert not missing and all(f'id="module-granq.{name}"' in documented for name in modules - {"runs"})
    assert "<math" in (site / "docs/method.html").read_text()


def test_every_page_comes_with_all_that_it_loads(site: Path) -> None:
    for path in {*site.rglob("*.html")} - {*site.glob("_static/**/*")}:
        for source in {first or second for first, second in LOADED.findall(path.read_text())}:
            if not source.startswith(("data:", "#")):
                file = path.parent / unquote(source.partition("?")[0].partition("#")[0])
                assert file.exists(), f"{path.name} loads {source}"


def test_tables_of_results_may_grow(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New columns, rows without a setting that came later, other settings: no kind of run is mixed with another."""
    monkeypatch.syspath_prepend(ROOT / "docs/_ext")
    from granq_site import measured

    row = granq.QATConfig(scheme="strict", epochs=2, warmup_epochs=0).model_dump(mode="json")
    row |= dict(layer_bits="", dataset="d", network="n", bits="W3A3", teacher_top1=90.0, last_top1=80.0, news=0.5)
    older = {key: value for key, value in row.items() if key != "bf16"} | dict(seed=1, last_top1=82.0)
    named = dict(seed=2, method="mine", data_used="photographs", true_bits_per_weight=3.2)
    pd.DataFrame([row, older, row | {"batch_size": 16}, row | named]).to_csv(tmp_path / "results_new.csv", index=False)
    pd.DataFrame({"bits": ["W3A3"]}).to_csv(tmp_path / "results_table.csv", index=False)  # holds no runs
    table = measured([tmp_path / "results_new.csv", tmp_path / "results_table.csv"])
    assert table.top1.tolist() == [81, 80, 80] and table.n.tolist() == [2, 1, 1] and (table.steps == 200).all()
    assert table.source.tolist() == [f"results_new.csv {rows}" for rows in ("1, 2", "3", "4")]
    assert table.method.tolist() == ["strict", "strict", "mine"]
    assert table.data_used.tolist() == ["generated", "generated", "photographs"]


def test_the_table_sorts(site: Path, page: Any) -> None:
    page.goto((site / "docs/generated/table.html").as_uri())
    rows = "document.querySelectorAll('table.sortable tbody tr:not([hidden])')"
    cells = f"() => [...{rows}].map(row => row.cells[%d].innerText)"
    heads = page.locator("table.sortable th")
    lost = heads.all_inner_texts().index("points lost")
    for sign in (1, -1):
        heads.nth(lost).get_by_role("button").click()
        shown = page.evaluate(cells % lost)
        numbers = [sign * float(text) for text in shown if text]
        assert numbers == sorted(numbers) and len({*numbers}) > 20
        assert shown[len(numbers) :] == [""] * (len(shown) - len(numbers)), "what is not known comes last"
    page.locator("input.filter").fill("w4a4 imagenet")
    assert {*page.evaluate(cells % 1)} == {"W4A4"} and {*page.evaluate(cells % 2)} == {"imagenet"}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_shows_its_charts(name: str, site: Path, page: Any) -> None:
    path = site / f"notebooks/{name}.html"
    charts = path.read_text().count('<script class="chart"')
    assert charts or name == "solutions"
    page.set_viewport_size({"width": 700, "height": 1000})
    page.goto(path.as_uri())
    page.wait_for_function(f"() => document.querySelectorAll('svg.marks').length == {charts}")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 700


@pytest.mark.parametrize("name", ["00_start_here", "01_anatomy_of_the_quantizer"])
def test_an_explorer_follows_the_mouse(name: str, site: Path, page: Any) -> None:
    page.goto((site / f"notebooks/{name}.html").as_uri())
    slider = page.locator(".vega-bindings input[type=range]").first
    slider.scroll_into_view_if_needed()
    before = picture(page)
    print(f"{name}: {drag(page, slider):.1f} ms from a step of the slider to the picture")
    assert picture(page) != before


@pytest.mark.parametrize("name", ["index", "notebooks/01_anatomy_of_the_quantizer", "figures/README",
                                  "docs/generated/table", "docs/generated/granq.quantizer"])  # fmt: skip
def test_a_page_fits(name: str, site: Path, page: Any) -> None:
    """Narrow and wide, light and dark, for the eye: ``runs/browser`` keeps what it looks like."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.goto((site / f"{name}.html").as_uri())
    for width in (700, 1280, 1920):
        for theme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 1000})
            page.emulate_media(color_scheme=theme)
            page.wait_for_function(f"() => document.documentElement.dataset.theme == '{theme}'")
            page.screenshot(path=SHOTS / f"site_{Path(name).name}_{width}_{theme}.png")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
