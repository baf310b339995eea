"""The notebooks in a real browser: JupyterLab, all cells, sliders moved by keyboard and by mouse (``make browser``).

Screenshots are kept in ``runs/browser``.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "runs/browser"
NOTEBOOKS = ["00_start_here", "04_activation_distortion", "05_channel_scales", "06_layer_error", "07_speed"]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
#: JavaScript of the page: every code cell ran or one failed, and the kernel rests
DONE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].filter(c => c.type === 'code');
    const failed = cells.some(c => c.toJSON().outputs.some(o => o.output_type === 'error'));
    return (failed || cells.every(c => c.executionCount)) && panel.sessionContext.session.kernel.status === 'idle';
}"""
ERRORS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
    .filter(c => c.type === 'code').flatMap(c => c.toJSON().outputs)
    .filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)"""
#: scroll to the explorer's cell, the last one that calls it
SHOW = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const sources = [...notebook.model.cells].map(c => c.sharedModel.getSource());
    const index = sources.findLastIndex(s => s.includes('explorers.') && !s.startsWith('import'));
    notebook.activeCellIndex = index;
    return notebook.scrollToItem(index, 'center');
}"""
STATE = """async () => {
    const image = [...document.querySelectorAll('img.widget-image')].pop();
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    const table = [...document.querySelectorAll('.widget-html table')].pop();
    return [digest.join(), table.innerText];
}"""


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    """Address of a JupyterLab on loopback, with its token."""
    token = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--port={port}",
        "--ip=127.0.0.1",
        "--no-browser",
        "--allow-root",
        "--LabApp.expose_app_in_browser=True",
    ]
    options += [f"--ServerApp.root_dir={ROOT}", f"--IdentityProvider.token={token}", "--LabApp.news_url=", "-y"]
    SHOTS.mkdir(parents=True, exist_ok=True)
    with open(SHOTS / "jupyter.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}") as answer:
                    assert "kernels" in json.load(answer)
                break
            except OSError:
                assert server.poll() is None, (SHOTS / "jupyter.log").read_text()[-2000:]
                time.sleep(0.5)
        with pytest.raises(urllib.error.HTTPError, match="403"):  # nobody without the token
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents")
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/{{}}.ipynb?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or os.environ.get("CHROMIUM", "")
    assert chromium, "chromium is missing: make browser installs it"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def moved(page, before: list[str], what: str, numbers: bool = True) -> list[str]:
    """The state after the picture has changed, and the numbers as well."""
    for _ in range(100):
        now = page.evaluate(STATE)
        if now[0] != before[0] and (now[1] != before[1] or not numbers):
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f"{what} changed {'the picture only' if now[0] != before[0] else 'nothing'}")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_in_the_browser(lab: str, browser, name: str) -> None:
    before = (ROOT / f"notebooks/{name}.ipynb").read_bytes()
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(lab.format(name))
    page.wait_for_function(
        "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel", timeout=90_000
    )
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(DONE, timeout=900_000, polling=500)
    assert page.evaluate(ERRORS) == []

    page.evaluate(SHOW)
    picture = page.locator("img.widget-image").last
    picture.wait_for(timeout=30_000)
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS / f"{name}.png")
    state = page.evaluate(STATE)
    box = picture.locator("xpath=ancestor::*[contains(@class, 'widget-vbox')][1]")
    height = box.bounding_box()["height"]

    handles = box.locator(".noUi-handle")
    assert handles.count() >= 1
    handles.first.focus()
    page.keyboard.press("ArrowRight")
    state = moved(page, state, "the right arrow key")

    track = box.locator(".noUi-base").first.bounding_box()
    page.mouse.click(track["x"] + track["width"] - 1, track["y"] + track["height"] / 2)  # its end
    state = moved(page, state, "a click on the slider")

    if (select := box.locator("select").first).count():
        select.select_option(index=select.locator("option").count() - 1)
        # the first layer has the same numbers on clean and on quantized input
        moved(page, state, "another choice in a list", numbers=False)
    assert abs(box.bounding_box()["height"] - height) < 1  # nothing jumps
    page.screenshot(path=SHOTS / f"{name}_moved.png")
    assert complaints == []
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
    (ROOT / f"notebooks/{name}.ipynb").write_bytes(before)  # JupyterLab may have saved outputs
