"""Run lessons, write outputs into them, and print how long each took: ``python benchmarks/lessons.py [NAME ...]``.

What is written is text, tables and pictures. Progress bars and widgets stay out: they mean nothing without a kernel.
"""

import argparse
import base64
import io
import os
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(name: str, **parameters: Any) -> NotebookNode:
    """Return notebook ``name`` after a fresh run; the first cell that fails raises."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["PYTHONPATH"] = f"{FOLDER.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # this checkout's granq
    options: dict[str, Any] = dict(cwd=FOLDER, progress_bar=False, kernel_name="python3")
    notebook = papermill.execute_notebook(FOLDER / f"{name}.ipynb", None, parameters, **options)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    return notebook


def smaller(picture: str) -> str:
    """Return a PNG, in base64, with at most 256 colors: a third of the size."""
    out, image = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(picture)))
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(picture, base64.b64encode(out.getvalue()).decode(), key=len)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in FOLDER.glob("*.ipynb")))
    for name in parser.parse_args().names:
        start, path = time.perf_counter(), FOLDER / f"{name}.ipynb"
        result = execute(name)
        nbformat.write(result, path)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.2f} MB", flush=True)
